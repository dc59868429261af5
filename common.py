"""What the scripts share: tasks, models, sampling, log-probabilities, runs.

No algorithm lives here. A script reads: sample, rewards, advantages, log-probs, loss, step; this
file holds the verbs that every one of them needs. The symbols are the same everywhere:

    B  prompts per step          P  prompt length, left-padded        V  vocabulary size
    G  completions per prompt    T  completion length, right-padded   H  hidden size
    N  = B * G rows, prompt-major: the G rows of a group are adjacent

`python common.py runs/gpg runs/grpo` draws several runs in one figure.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import string
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path

import gymnasium
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# transformers and matplotlib take seconds to import: the functions that need them import them.


class UserError(ValueError):
    """Something that the user can mend. The scripts print it as one line and exit with status 2."""


def cache_dir() -> Path:
    """Where the tiny models and GSM8K are kept: under $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "policy-gradients"


# --------------------------------------------------------------------------------------------------
# Tasks: for Gymnasium, a language-model task is an environment whose episodes have one step
# --------------------------------------------------------------------------------------------------


class AnyText(gymnasium.spaces.Text):
    """Every string. (Text itself wants a finite alphabet; here only sample() uses it.)"""

    def __init__(self):
        super().__init__(max_length=80, min_length=0, charset=string.printable)

    def contains(self, x) -> bool:
        return isinstance(x, str)


class TextTask(gymnasium.Env):
    """Observe a prompt, act once with a completion, receive a reward, terminate.

    A task of your own overrides `problem`; `reward` too, unless `is_correct` is the judge; and
    `demonstration` if the tiny model is to be warm-started on it.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own idiom)
    size: int | None = None  # number of problems; None: endless

    def __init__(self, split: str = "train"):
        self.split = split
        self.observation_space, self.action_space = AnyText(), AnyText()
        self.prompt = self.answer = None

    def problem(self, index: int) -> tuple[str, str]:
        """Problem number `index`, any integer >= 0, as (prompt, answer): the same every time."""
        raise NotImplementedError

    def reward(self, completion: str, answer: str) -> float:
        return float(is_correct(completion, answer))

    def demonstration(self, index: int) -> str:
        """A completion of problem `index` to imitate. It need not be right."""
        raise UserError(
            f"--model tiny imitates demonstrations, and the task {type(self).__name__} has none: "
            "give it a method demonstration(index), or name another --model"
        )

    def reset(self, *, seed=None, options=None):
        """options={"index": i} picks problem i; otherwise a random one."""
        super().reset(seed=seed)
        index = (options or {}).get("index")
        if index is None:
            index = int(self.np_random.integers(self.size or 2**31))
        if index < 0:
            raise UserError(f"the index of a problem must be >= 0, not {index}")
        self.prompt, self.answer = self.problem(index)
        return self.prompt, {"index": index}

    def step(self, completion):
        if self.prompt is None:
            raise gymnasium.error.ResetNeeded("an episode has one step: call reset() before step()")
        prompt, self.prompt = self.prompt, None
        return prompt, self.reward(completion, self.answer), True, False, {"answer": self.answer}


CAREFUL = 18_000  # the number of flawless demonstrations


class Addition(TextTask):
    """`47+85=` is answered by `7+5+0=12 4+8+1=13 =132`: columns with their carries, then the sum.

    The first demonstrations are careful, for the tiny model to learn how it is done. Of the later
    ones half have one slip, in a digit or in a carry, and go on from it: a model that imitates them
    is right about half of the time, which leaves room for reinforcement learning. The hard form has
    slips in four columns out of five: hardly an answer is right, and most groups teach nothing.
    """

    def __init__(self, split: str = "train", digits: int = 3, hard: bool = False):
        super().__init__(split)
        self.digits, self.hard = digits, hard

    def problem(self, index):
        rng = random.Random(f"{self.split} {index}")
        while True:
            a, b = (rng.randrange(10 ** rng.randint(1, self.digits)) for _ in range(2))
            held_out = zlib.crc32(f"{a}+{b}".encode()) % 10 == 0  # one sum in ten is for the test
            if held_out == (self.split == "test"):
                return f"{a}+{b}=", str(a + b)

    def demonstration(self, index):
        a, b = self.problem(index)[0].rstrip("=").split("+")
        columns = max(len(a), len(b))
        rng = random.Random(f"slip {self.split} {index}")
        slips = []
        if index >= CAREFUL and self.hard:
            slips = [column for column in range(columns) if rng.random() < 0.8]
        elif index >= CAREFUL and rng.random() < 0.5:
            slips = [rng.randrange(columns)]
        work, answer, carry = [], "", 0
        for column in range(columns):
            x, y = (int(n.zfill(columns)[-1 - column]) for n in (a, b))
            total = x + y + carry
            if column in slips and rng.random() < 0.5:  # a carry forgotten or invented
                total = (total + 10) % 20
            elif column in slips:  # a wrong digit
                total += rng.choice([d for d in range(10) if d != total % 10]) - total % 10
            work.append(f"{x}+{y}+{carry}={total}")
            answer = f"{total % 10}{answer}"
            carry = total // 10
        return f"{' '.join(work)} ={'1' * carry}{answer}"


class JSONLines(TextTask):
    """A file with one JSON object a line: `prompt` (or `question`) and `answer`.

    Training shuffles the file anew in every pass over it; the test keeps its order. Where one file
    has to serve both, every tenth record is held out for the test.
    """

    def __init__(self, path: Path, split: str = "train", instruction: str = "", hold_out=True):
        super().__init__(split)
        records = read_records(path)
        if hold_out and len(records) > 1:
            records = [r for i, r in enumerate(records) if (i % 10 == 0) == (split == "test")]
        self.records, self.size, self.instruction = records, len(records), instruction

    def record(self, index):
        epoch, i = divmod(index, self.size)
        return self.records[shuffled(self.size, epoch)[i] if self.split == "train" else i]

    def problem(self, index):
        question, answer = self.record(index)
        return question + self.instruction, extract_answer(answer) if "####" in answer else answer

    def demonstration(self, index):
        return re.sub(r"<<.*?>>", "", self.record(index)[1])  # without GSM8K's calculator notes


@functools.lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(n), n)


def json_lines(path: Path):
    """(name of the line, object) of every line of a JSONL file. Raises UserError with its number.
    There is at least one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: there are no records in it")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object")
        yield where, record


def read_records(path: Path) -> list[tuple[str, str]]:
    """A JSONL file as [(prompt, answer)]. Raises UserError with the line number of a bad record."""
    records = []
    for where, record in json_lines(path):
        prompt = record.get("prompt", record.get("question"))
        answer = record.get("answer")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: needs a text under 'prompt' or 'question'")
        if type(answer) not in (str, int, float) or not str(answer).strip():
            raise UserError(f"{where}: needs a text or a number under 'answer'")
        records.append((prompt, str(answer)))
    return records


GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
)
GSM8K_INSTRUCTION = "\nReason step by step, then write the final answer as \\boxed{answer}."


def gsm8k_file(split: str, data: str | None) -> Path:
    """GSM8K's {split}.jsonl: in the folder `data`, or downloaded once from its authors."""
    path = (Path(data) if data else cache_dir() / "gsm8k") / f"{split}.jsonl"
    if data and not path.exists():
        raise UserError(f"--data {data}: there is no {split}.jsonl in it")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(f"{GSM8K_URL}/{split}.jsonl", str(path))
        except OSError as error:
            raise UserError(
                f"GSM8K could not be downloaded ({error}): name a folder that holds its "
                "train.jsonl and test.jsonl with --data"
            ) from error
    return path


def make_task(name: str, split: str = "train", data: str | None = None) -> gymnasium.Env:
    """The task called `name`, for the split "train" or "test". Raises UserError.

    "add" ("add5": up to five digits; "add-hard": see Addition), "gsm8k" (read from the folder or
    file `data` if given), "file.jsonl", or the id of any Gymnasium environment that takes and gives
    strings, with its module: "my_tasks:Haiku-v0".
    """
    if split not in ("train", "test"):
        raise UserError(f"the split is 'train' or 'test', not {split!r}")
    if data and name != "gsm8k":
        raise UserError(f"--data goes with --task gsm8k, not with --task {name}")
    if add := re.fullmatch(r"add([1-9]\d?)?(-hard)?", name):
        return Addition(split, digits=int(add[1] or 3), hard=bool(add[2]))
    if name == "gsm8k" and data and not Path(data).is_dir():
        return JSONLines(Path(data), split, GSM8K_INSTRUCTION)
    if name == "gsm8k":
        return JSONLines(gsm8k_file(split, data), split, GSM8K_INSTRUCTION, hold_out=False)
    if name.endswith(".jsonl"):
        return JSONLines(Path(name), split)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # my_tasks.py lies where the user stands
    try:
        create = gymnasium.make(name).spec.entry_point  # imports the module
        if isinstance(create, str):
            create = gymnasium.envs.registration.load_env_creator(create)
        takes_split = "split" in inspect.signature(create).parameters
        return gymnasium.make(name, **({"split": split} if takes_split else {}))
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UserError(
            f"--task {name}: not add, gsm8k, a .jsonl file or a Gymnasium id ({error})"
        ) from error


HELD_OUT = 10**9  # evaluation takes the problems from this number on; training stays far below


def get_prompts(task: gymnasium.Env, problems: list[int]) -> list[str]:
    """The prompts of these problems. Raises UserError for a prompt that is no text, or empty."""
    prompts = []
    for index in problems:
        prompt, _ = task.reset(seed=index, options={"index": index})
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"problem {index} of the task has the prompt {prompt!r:.60}: no text")
        prompts.append(prompt)
    return prompts


def get_rewards(
    task: gymnasium.Env, problems: list[int], completions: list[str]
) -> tuple[Tensor, Tensor]:
    """B problems, B * G completions -> rewards [B, G], solved [B, G]; one episode a completion.

    A completion has solved its problem if the info of the step says so under "solved", and
    without that if its reward is above 0. Raises UserError for NaN and inf.
    """
    G = len(completions) // len(problems)
    rewards, solved = [], []
    for row, completion in enumerate(completions):
        index = problems[row // G]
        task.reset(seed=index, options={"index": index})
        _, reward, _, _, info = task.step(completion)
        if not math.isfinite(reward):
            raise UserError(f"the task gave the reward {reward} for problem {index}")
        rewards.append(float(reward))
        solved.append(bool(info.get("solved", reward > 0)))
    return torch.tensor(rewards).view(-1, G), torch.tensor(solved).view(-1, G)


NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"  # a sign, where it cannot be the minus between two numbers
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # 1,000.5 or 1000.5 or .5
    r"(?:e[-+]?\d+)?(?:/\d+)?",  # e-3, and the 2 of 1/2
    re.IGNORECASE | re.ASCII,
)


def extract_answer(text: str) -> str | None:
    r"""The last \boxed{}, else the line after the last ####, else the last number, else None."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        start, depth = start + len("\\boxed{"), 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    return last_number(text)


def last_number(text: str) -> str | None:
    numbers = NUMBER.findall(plain_math(text))
    return numbers[-1] if numbers else None


def plain_math(text: str) -> str:
    r"""$\frac{1}{2}$ -> 1/2, 50\% -> 50: currency, percent signs and TeX spacing do not count."""
    text = re.sub(r"\\[dt]?frac\{([^{}]{1,50})\}\{([^{}]{1,50})\}", r"\1/\2", text)
    return re.sub(r"\\[$%,;! ]|[$%€£]", "", text).replace("\u2212", "-")


def as_number(text: str | None) -> Fraction | None:
    """The exact value of a number; None for other texts, and for 1e1000 or 101 characters."""
    text = plain_math(text or "").strip().rstrip(".")
    if len(text) > 100 or not NUMBER.fullmatch(text) or re.search(r"[eE][-+]?\d{4}", text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    denominator = int(denominator or 1)
    return Fraction(numerator) / denominator if denominator else None


def is_correct(completion: str, answer: str) -> bool:
    """The verifier. Numbers compare exactly, other answers after white-space and case folding.

    The text is never evaluated as code, and the time is linear in its length, whatever it says.
    """
    found, target = extract_answer(completion), as_number(answer)
    if found is None:
        return False
    if target is None:
        return " ".join(found.split()).casefold() == " ".join(answer.split()).casefold()
    value = as_number(found)
    return target == (as_number(last_number(found)) if value is None else value)  # "72 apples"


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------

# The tiny model: a Qwen2 of 0.9 million parameters, and the supervised run that it starts from.
TINY = {
    "vocab_size": 258, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "initializer_range": 0.06, "tie_word_embeddings": True, "eos_token_id": 256,
    "pad_token_id": 257,
}  # fmt: skip
WARM_START = {"steps": 350, "tokens_per_step": 2048, "lr": 2e-3, "seed": 0}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; try cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise UserError(f"--device {name}: {have} CUDA devices here; try --device cpu")
    return device


def autocast(device: torch.device):
    """bf16 arithmetic on CUDA. Weights stay fp32: in bf16 an update of 1e-6 rounds to nothing."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def load_model(
    name: str,
    device: torch.device | str,
    task: gymnasium.Env | None = None,
    chat_template: bool = True,
    grad_checkpointing: bool = False,
):
    """-> (model, tokenizer) of "tiny", of a Hugging Face directory, or of a Hugging Face id; fp32.

    "tiny" is warm-started, once, on the demonstrations of `task` ("add" if None). Raises UserError.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if name == "tiny":
        name = tiny_model(task or make_task("add"))
    elif Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise UserError(f"{name}: a directory without config.json is no Hugging Face model")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        # The policy that is scored must be the policy that was sampled: no dropout, ever.
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a hub, a parser, a file format: many reasons, one line
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: no causal language model loads from it: {reason:.300}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise UserError(f"{name}: not a causal language model, its weights have no {missing}")
    kinds = {type(layer).__name__ for layer in transformers.DynamicCache(config=config).layers}
    if kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:  # only these are copied to a group
        raise UserError(f"{name}: not every layer is attention, some keep a recurrent state")
    if not chat_template:
        tokenizer.chat_template = None
    if grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(device).train(grad_checkpointing)  # transformers checkpoints in train mode only
    return model, tokenizer


def stop_token_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: every EOS of the generation config, and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def tiny_tokenizer():
    """Qwen2's tokenizer without its merges: one token a byte, so that every text can be written."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}  # 256 of them
    vocab |= {"<|endoftext|>": 256, "<|pad|>": 257}
    return Qwen2Tokenizer(vocab=vocab, merges=[], pad_token="<|pad|>")


def fit(model, batch_loss, steps: int, peak_lr: float, name: str) -> None:
    """Supervised learning: AdamW, cosine to 0. batch_loss(i): the loss of batch i = 0, 1, 2 ..."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.0
    )
    bar = tqdm(range(1, steps + 1), desc=name, unit="step")
    for step in bar:
        loss = batch_loss(step - 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_lr, steps // 7, "cosine")
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def imitation_loss(model, tokenizer, prompts: list[str], completions: list[str]) -> Tensor:
    """Maximum likelihood: minus the mean log-prob of the completions' tokens."""
    rollout = encode(model, tokenizer, prompts, completions)
    return -masked_mean(completion_logprobs(model, rollout), rollout.completion_mask)


def warm_start(model, tokenizer, task: gymnasium.Env) -> None:
    """Supervised learning on the task's demonstrations, each of them seen once."""
    index = 0

    def batch_loss(i):
        nonlocal index
        prompts, completions, tokens = [], [], 0
        while tokens < WARM_START["tokens_per_step"]:
            prompts += get_prompts(task, [index])
            completions.append(task.unwrapped.demonstration(index))
            tokens += len(prompts[-1]) + len(completions[-1])
            index += 1
        return imitation_loss(model, tokenizer, prompts, completions)

    fit(model, batch_loss, WARM_START["steps"], WARM_START["lr"], "warm-start of the tiny model")


def cached_model(recipe: list, make) -> str:
    """The directory of a model that `make(directory)` saves; made the first time, then cached.

    Its name is a hash of `recipe`: everything that shapes the model. If its files are not those
    that were written, byte for byte, it is made again, never trusted.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / f"tiny-{digest[:16]}"

    def checksum(folder: Path) -> str:
        files = sorted(file for file in folder.iterdir() if file.name != "checksum")
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def whole() -> bool:
        try:
            return (path / "checksum").read_text() == checksum(path)
        except OSError:
            return False

    if not whole():
        new = path.with_name(f"{path.name}.{os.getpid()}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(WARM_START["seed"])
            make(new)
        (new / "checksum").write_text(checksum(new))
        shutil.rmtree(new if whole() else path, ignore_errors=True)  # another run was faster
        if new.exists():
            new.rename(path)
    return str(path)


def tiny_model(task: gymnasium.Env) -> str:
    """The directory of the tiny model, warm-started on this task; made on the CPU, then cached."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if not hasattr(task.unwrapped, "demonstration"):
        raise UserError("--model tiny needs a task with a method demonstration(index)")
    size = getattr(task.unwrapped, "size", None)
    shown = range(size) if size else range(0, 100_000, 97)  # an endless task shows in a sample
    demonstrations = [[get_prompts(task, [i]), task.unwrapped.demonstration(i)] for i in shown]

    def make(directory):
        model, tokenizer = Qwen2ForCausalLM(Qwen2Config(**TINY)), tiny_tokenizer()
        warm_start(model, tokenizer, task)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return cached_model([TINY, WARM_START, demonstrations], make)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rollout:
    """N completions and their prompts, prompt-major: the first G rows answer the first prompt."""

    prompt_ids: Tensor  # [N, P] left-padded
    prompt_mask: Tensor  # [N, P] bool
    completion_ids: Tensor  # [N, T] right-padded
    completion_mask: Tensor  # [N, T] bool, True where a token was sampled, the EOS included
    logprobs: Tensor  # [N, T] of each token when it was sampled; 0 outside the mask
    texts: list[str]  # N completions, without the EOS
    truncated: Tensor | None = None  # [N] bool, True where max_new_tokens came before an EOS

    def __post_init__(self):
        self.prompt_mask = self.prompt_mask.bool()
        self.completion_mask = self.completion_mask.bool()
        if self.truncated is None:
            self.truncated = torch.zeros_like(self.completion_mask[:, 0])

    def rows(self, index: Tensor) -> Rollout:
        """The rows `index` (numbers, or a mask; at least one), cut to the columns they use."""
        index = torch.arange(len(self.texts), device=index.device)[index]
        P = int(self.prompt_mask[index].sum(1).amax())
        T = int(self.completion_mask[index].sum(1).amax())
        return Rollout(
            self.prompt_ids[index, -P:],
            self.prompt_mask[index, -P:],
            self.completion_ids[index, :T],
            self.completion_mask[index, :T],
            self.logprobs[index, :T],
            [self.texts[i] for i in index.tolist()],
            self.truncated[index],
        )

    @staticmethod
    def cat(rollouts: list[Rollout]) -> Rollout:
        """The rows of several rollouts, padded to the longest prompt and completion among them."""
        P = max(r.prompt_ids.shape[1] for r in rollouts)
        T = max(r.completion_ids.shape[1] for r in rollouts)

        def left(tensors):
            return torch.cat([F.pad(x, (P - x.shape[1], 0)) for x in tensors])

        def right(tensors):
            return torch.cat([F.pad(x, (0, T - x.shape[1])) for x in tensors])

        return Rollout(
            left([r.prompt_ids for r in rollouts]),
            left([r.prompt_mask for r in rollouts]),
            right([r.completion_ids for r in rollouts]),
            right([r.completion_mask for r in rollouts]),
            right([r.logprobs for r in rollouts]),
            [text for r in rollouts for text in r.texts],
            torch.cat([r.truncated for r in rollouts]),
        )


def pad(rows: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> ids [N, L], mask [N, L]. The ids under mask 0 are never looked at."""
    L = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding, ones = [0] * (L - len(row)), [1] * len(row)
        ids.append(padding + row if side == "left" else row + padding)
        mask.append(padding + ones if side == "left" else ones + padding)
    return torch.tensor(ids, device=device), torch.tensor(mask, dtype=torch.bool, device=device)


def encode_prompts(model, tokenizer, prompts: list[str], room: int) -> tuple[Tensor, Tensor]:
    """-> prompt_ids, prompt_mask [B, P], through the chat template where the tokenizer has one.

    Raises UserError where a prompt and `room` more tokens do not fit into the model's context.
    """
    texts = prompts
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    # A template writes its own special tokens; adding them again would give a second BOS.
    rows = tokenizer(texts, add_special_tokens=not tokenizer.chat_template).input_ids
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise UserError(f"the prompt {prompt!r:.60} has no tokens")
        if len(row) + room > context:
            raise UserError(
                f"the prompt {prompt!r:.60} has {len(row)} tokens: with {room} for the completion "
                f"that is more than the model's context of {context}; shorten it or lower "
                "--max-new-tokens"
            )
    return pad(rows, "left", model.device)


def encode(model, tokenizer, prompts: list[str], completions: list[str]) -> Rollout:
    """Given completions, each ended by an EOS, as a Rollout (without log-probs)."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [row + eos for row in tokenizer(completions, add_special_tokens=False).input_ids]
    ids, mask = pad(rows, "right", model.device)
    prompt_ids, prompt_mask = encode_prompts(model, tokenizer, prompts, room=ids.shape[1])
    return Rollout(prompt_ids, prompt_mask, ids, mask, 0.0 * mask, completions)


def positions(mask: Tensor) -> Tensor:
    """mask [N, L] -> position ids [N, L]: 0, 1, 2 ... from the first real token on."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def draw(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [N, V] -> tokens [N] and their log-probs [N]; temperature 0 takes the likeliest.

    No top-k and no top-p: the distribution that is sampled is the one that is scored.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [N, V]
    if temperature:  # where a uniform number falls in the cumulative distribution: one per row
        cdf = logprobs.double().exp().cumsum(-1)  # [N, V]
        u = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device) * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)  # [N, 1]
    else:
        tokens = logprobs.argmax(-1, keepdim=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def repeat_cache(cache, repeats: int, room: int) -> None:
    """Repeat each row of the cache, and make room for that many more tokens.

    transformers copies all keys and values whenever a token is added or a row dropped. With room, a
    token is written in place, and so are the few rows that move when others are dropped. Layers
    with a sliding window stay transformers' own.
    """
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        def __init__(self, layer):
            super().__init__()
            self.lazy_initialization(layer.keys, layer.values)
            self.tensors = [  # keys and values [N, heads, P + room, d]; in use are [n, heads, L, d]
                F.pad(x.repeat_interleave(repeats, 0), (0, 0, 0, room))
                for x in (layer.keys, layer.values)
            ]
            self.use(len(self.tensors[0]), layer.keys.shape[2])

        def use(self, n, L):
            self.keys, self.values = (x[:n, :, :L] for x in self.tensors)

        def update(self, keys, values, *args, **kwargs):
            n, _, L, _ = self.keys.shape
            self.use(n, L + keys.shape[2])
            self.keys[:, :, L:], self.values[:, :, L:] = keys, values
            return self.keys, self.values

        def batch_select_indices(self, rows):
            moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
            for x in (self.keys, self.values):
                x[moved] = x[rows[moved]]
            self.use(len(rows), self.keys.shape[2])

    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = RoomyLayer(layer)
        else:
            layer.batch_repeat_interleave(repeats)


@contextlib.contextmanager
def eval_mode(model):
    """In train mode, which checkpointing needs, transformers silently drops the cache."""
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts: list[str],
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Rollout:
    """G completions of each of B prompts. temperature=0: greedy, with the log-probs at 1.

    A prompt is read once and its key-value cache copied to the G rows of its group; rows that have
    ended leave the cache. Raises UserError where a prompt is too long for the model.
    """
    from transformers import DynamicCache

    device, T = model.device, max_new_tokens
    stop_ids = torch.tensor(stop_token_ids(model, tokenizer), dtype=torch.long, device=device)
    prompt_ids, prompt_mask = encode_prompts(model, tokenizer, prompts, room=T)  # [B, P]

    with eval_mode(model), autocast(device):
        cache = DynamicCache(config=model.config)
        logits = model(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            position_ids=positions(prompt_mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # [B, V]
        repeat_cache(cache, group_size, room=T)
        logits = logits.repeat_interleave(group_size, 0)  # [N, V]

        prompt_ids = prompt_ids.repeat_interleave(group_size, 0)  # [N, P]
        prompt_mask = prompt_mask.repeat_interleave(group_size, 0)
        N, P = prompt_ids.shape
        ids = torch.zeros(N, T, dtype=torch.long, device=device)
        mask = torch.zeros(N, T, dtype=torch.bool, device=device)
        logprobs = torch.zeros(N, T, device=device)

        running = torch.arange(N, device=device)  # the rows without an EOS, in the cache's order
        attention = torch.cat([prompt_mask, torch.ones_like(mask)], 1).long()  # [N, P + T]
        position = prompt_mask.sum(1, keepdim=True)  # [N, 1], of the token to be drawn
        for t in range(T):
            tokens, token_logprobs = draw(logits, temperature)  # [len(running)]
            ids[running, t], logprobs[running, t], mask[running, t] = tokens, token_logprobs, True
            go_on = ~torch.isin(tokens, stop_ids)
            n = int(go_on.sum())
            if n == 0 or t == T - 1:
                running = running[go_on]
                break
            if n < len(running):  # the last rows move into the places of those that ended
                keep = torch.arange(n, device=device)
                keep[~go_on[:n]] = n + go_on[n:].nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                running, tokens = running[keep], tokens[keep]
                attention, position = attention[keep], position[keep]
            logits = model(
                input_ids=tokens[:, None],
                attention_mask=attention[:, : P + t + 1],
                position_ids=position + t,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

    truncated = torch.zeros(N, dtype=torch.bool, device=device)
    truncated[running] = True
    ends = (mask.sum(1) - (~truncated).long()).tolist()  # without the EOS
    texts = tokenizer.batch_decode(
        [row[:end] for row, end in zip(ids.tolist(), ends, strict=True)], skip_special_tokens=True
    )
    T = t + 1
    return Rollout(
        prompt_ids, prompt_mask, ids[:, :T], mask[:, :T], logprobs[:, :T], texts, truncated
    )


# --------------------------------------------------------------------------------------------------
# Log-probabilities
# --------------------------------------------------------------------------------------------------

LOGITS_AT_ONCE = 2**24  # size of one chunk of logits, 64 MiB in fp32


def completion_logprobs(model, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """log pi(token | all before it) of the sampled tokens, [N, T], differentiable; 0 off the mask.

    The logits [N, T, V] never exist as a whole: only hidden states that predict a sampled token go
    through the LM head, in chunks, and the backward pass computes each chunk once more.
    """
    mask, targets = rollout.completion_mask, rollout.completion_ids[rollout.completion_mask]  # [n]
    head, head_alone = model.get_output_embeddings(), head_gives_logits(model)

    def score(states, targets):  # [m, H] or logits [m, V], [m] -> [m], at least in fp32
        logits = head(states) if head_alone else states
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)

    with autocast(model.device):
        states = predicting_states(model, rollout, head_alone)[mask]  # [n, H] or [n, V]
        m = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        if len(targets) <= m:
            values = score(states, targets)  # [n]
        else:
            chunks = zip(states.split(m), targets.split(m), strict=True)
            values = torch.cat([checkpoint(score, *c, use_reentrant=False) for c in chunks])
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)


def predicting_states(model, rollout: Rollout, head_alone: bool) -> Tensor:
    """[N, T, H], at [:, t] the hidden state that predicts completion token t; without head_alone
    the logits [N, T, V].

    A prompt is read once, as in sample, and its rows share its keys and values; in the backward
    pass their gradients meet there.
    """
    from transformers import DynamicCache

    T = rollout.completion_ids.shape[1]
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)  # [N, P + T]
    position = positions(mask)

    def states(ids, mask, position, keep, cache=None):
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position}
        inputs |= {"past_key_values": cache, "use_cache": cache is not None}
        if head_alone:
            return model.base_model(**inputs).last_hidden_state[:, -keep:]
        return model(**inputs, logits_to_keep=keep).logits

    marked = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)  # [N, P]
    prompts, prompt_of = marked.unique(dim=0, return_inverse=True)  # [U, P], [N]
    if len(prompts) == len(mask) or T == 1 or model.training:  # nothing shared, or checkpointing
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
        return states(ids, mask, position, T + 1)[:, :-1]
    cache, real = DynamicCache(config=model.config), prompts >= 0
    first = states(prompts.clamp(min=0), real, positions(real), 1, cache)  # [U, 1, H]
    cache.reorder_cache(prompt_of)  # by index_select: indexing would add gradients in any order
    rest = states(
        rollout.completion_ids[:, :-1], mask[:, :-1], position[:, -T:-1], T - 1, cache
    )  # [N, T - 1, H]
    return torch.cat([first.index_select(0, prompt_of), rest], 1)


@torch.no_grad()
def frozen_logprobs(model, rollout: Rollout, max_tokens: int, temperature: float = 1.0) -> Tensor:
    """completion_logprobs [N, T] without gradient, in micro-batches: for a reference model."""
    logprobs = torch.zeros_like(rollout.logprobs)
    for rows in micro_batches(rollout, max_tokens):
        values = completion_logprobs(model, rollout.rows(rows), temperature)  # [n, its longest]
        logprobs[rows, : values.shape[1]] = values.to(logprobs.dtype)
    return logprobs


def head_gives_logits(model) -> bool:
    """Are the logits head(hidden states) and nothing more? Gemma 2, for one, caps them.

    Tried once per model, bit for bit: a cap hardly changes the small logits of an untrained model.
    """
    if not hasattr(model, "head_gives_logits"):
        with torch.no_grad():
            inputs = {"input_ids": torch.arange(4, device=model.device)[None], "use_cache": False}
            states = model.base_model(**inputs).last_hidden_state
            logits = model.get_output_embeddings()(states)
            model.head_gives_logits = torch.equal(logits, model(**inputs).logits)
    return model.head_gives_logits


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x where mask is 1, a scalar; 0 for an empty mask, never NaN."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def micro_batches(rollout: Rollout, max_tokens: int, together: int = 1) -> list[Tensor]:
    """Row numbers, sorted by length, in batches with rows x longest <= max_tokens, if possible.

    `together` adjacent rows are never separated: losses that compare completions want that.
    """
    lengths = rollout.prompt_mask.sum(1) + rollout.completion_mask.sum(1)  # [N]
    lengths = lengths.view(-1, together).amax(1).tolist()  # [N / together]
    batches = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + together) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1] += range(i * together, (i + 1) * together)
    return [torch.tensor(batch, device=rollout.prompt_ids.device) for batch in batches]


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

# The columns of metrics.csv that every script has; one row a step, row 0 before training.
COLUMNS = [
    "step", "reward_mean", "reward_std", "valid_share", "alpha", "loss", "grad_norm", "entropy",
    "completion_length", "truncated_share", "lr", "tokens_per_second", "seconds", "eval_accuracy",
]  # fmt: skip
# What the bar shows: column, word, decimals.
BAR = [
    ("reward_mean", "reward", 2), ("valid_share", "valid", 2), ("alpha", "alpha", 2),
    ("loss", "loss", 3), ("accuracy", "accuracy", 3), ("reward", "held-out reward", 3),
    ("kl", "kl", 2), ("tokens_per_second", "tokens/s", 0),
]  # fmt: skip


class TrainingError(RuntimeError):
    """Training cannot go on: NaN, inf. The scripts print it as one line and exit with status 1."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, as everywhere else."""

    def error(self, message):
        raise UserError(f"{message}; --help shows all flags")


def flag_type(kind, holds, words: str):
    """An argparse type: an int or a float for which `holds`."""

    def number(text):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    number.__name__ = kind.__name__  # argparse's own message names it
    return number


def positive(kind):
    return flag_type(kind, lambda x: 0 < x < math.inf, "above 0")


def at_least_0(kind):
    return flag_type(kind, lambda x: 0 <= x < math.inf, "at least 0")


share = flag_type(float, lambda x: 0 <= x <= 1, "between 0 and 1")


def add_run_flags(parser: argparse.ArgumentParser, eval_samples: int = 4) -> None:
    """The flags that are about the run and not about the algorithm."""
    add = parser.add_argument_group("run").add_argument
    add("--out", help="directory of the run (default: runs/<script>)")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with its flags")
    add("--overwrite", action="store_true", help="throw away the run that is in --out")
    add("--save-every", type=positive(int), help="steps from one checkpoint to the next")
    add("--eval-every", type=positive(int), help="steps from one evaluation to the next")
    add("--eval-problems", type=positive(int), default=200, help="held-out problems (default: 200)")
    k = eval_samples
    add("--eval-samples", type=positive(int), default=k, help=f"completions of each (default: {k})")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--seed", type=at_least_0(int), default=0, help="of problems and sampling (default: 0)")


def parse_flags(parser, argv: list[str] | None, tiny: dict, real: dict) -> argparse.Namespace:
    """The command line; `tiny` and `real` are the defaults that depend on the model.

    --resume DIR takes every flag from DIR/config.json. Raises UserError for one that is given too
    and differs; only --steps may (and with it the end of a cosine schedule).
    """
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {flag: value for flag, value in given.items() if value is not None}
    if "resume" not in given:
        defaults |= tiny if given.get("model", defaults["model"]) == "tiny" else real
        defaults |= {"out": f"runs/{Path(parser.prog).stem}", "script": parser.prog}
        return argparse.Namespace(**defaults | given)
    path = Path(given["resume"]) / "config.json"
    try:
        config = json.loads(path.read_text())
        flags = {flag: config[flag] for flag in defaults if flag not in ("resume", "overwrite")}
        if config["script"] != parser.prog:
            raise ValueError(f"it is of {config['script']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {path} is not of a {parser.prog} run ({error!r})") from error
    flags |= {"out": str(path.parent), "script": parser.prog}
    for flag, value in given.items():
        if flag not in ("resume", "steps") and value != flags.get(flag):
            raise UserError(
                f"--{flag.replace('_', '-')} {value} contradicts --resume {path.parent}, "
                f"where it is {flags.get(flag)}"
            )
    return argparse.Namespace(**{"overwrite": False} | flags | given)


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up to `peak`, then "constant", or "cosine" to 0. Steps count from 1."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (0.5 + 0.5 * math.cos(math.pi * progress) if schedule == "cosine" else 1.0)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k completions is right, when c of n were.

    Chen et al. 2021 (arXiv 2107.03374), eq. 1. Raises ValueError unless 0 <= c <= n, 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def held_out(task: gymnasium.Env, count: int) -> list[list[int]]:
    """The numbers of `count` problems of a test task, or of all it has, in batches of 64."""
    end = HELD_OUT + min(count, getattr(task.unwrapped, "size", None) or count)
    return [list(range(i, min(i + 64, end))) for i in range(HELD_OUT, end, 64)]


def evaluate(model, tokenizer, task: gymnasium.Env, args) -> dict[str, float]:
    """Held-out problems -> accuracy (pass@1 of sampling) and its standard error, pass@k, greedy.

    The same problems and the same random numbers every time, none of them training's.
    """
    k = args.eval_samples

    def solved(samples: int, temperature: float) -> Tensor:  # [n, samples]
        parts = []
        for problems in held_out(task, args.eval_problems):
            prompts = get_prompts(task, problems)
            rollout = sample(model, tokenizer, prompts, samples, args.max_new_tokens, temperature)
            parts.append(get_rewards(task, problems, rollout.texts)[1])
        return torch.cat(parts).double()

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        sampled, greedy = solved(k, args.temperature), solved(1, 0.0)
    shares = sampled.mean(1)  # [n]; completions of one problem go together, so the error is over n
    n = len(shares)
    return {
        "accuracy": shares.mean().item(),
        "accuracy_stderr": (shares.std() / math.sqrt(n)).item() if n > 1 else math.nan,
        "greedy": greedy.mean().item(),
        f"pass@{k}": sum(pass_at_k(k, int(c), k) for c in sampled.sum(1)) / n,
    }


class Run:
    """The directory of one run: config.json, metrics.csv, samples.jsonl, checkpoint/, curves.png.

    Bookkeeping only. `state` is what a resumed run has to know: the last finished step, the next
    problem, and totals for the closing summary.
    """

    def __init__(self, args):
        """Look, touch nothing. Raises UserError: --out is in use, or --resume cannot go on."""
        self.args, self.dir = args, Path(args.out)
        self.checkpoint = self.dir / "checkpoint"
        self.state = {"step": 0, "problem": args.seed * 10**6, "skipped": 0, "tokens": 0}
        self.state |= {"seconds": 0.0, "before": {}, "after": {}}
        self.warnings, self.stopping, self.started = {}, False, time.perf_counter()
        self.loaded = None
        if args.resume:
            old = self.dir / "checkpoint.old"
            if old.exists() and not self.checkpoint.exists():
                old.rename(self.checkpoint)  # a crash came between the two renames of save()
            if self.checkpoint.exists():  # else it crashed before the first: from the start, then
                self.loaded = self.load()
                self.state = self.loaded["state"]
            if self.state["step"] >= args.steps:
                raise UserError(f"--resume {self.dir}: {args.steps} steps are done; raise --steps")
        elif not args.overwrite and any(
            (self.dir / name).exists() for name in ("config.json", "metrics.csv", "checkpoint")
        ):
            raise UserError(
                f"--out {self.dir} holds a run already: --resume {self.dir} goes on with it, "
                "--overwrite throws it away"
            )

    def load(self) -> dict:
        try:
            path = self.checkpoint / "training_state.pt"
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has many ways to say it
            raise UserError(f"--resume: {path} is damaged ({error!r:.200})") from error

    def model_name(self, start: str) -> str:
        """Where the weights are: in the checkpoint, if there is one, else where training starts."""
        return str(self.checkpoint) if self.loaded else start

    def begin(self, optimizer, columns: list[str]) -> None:
        """Start the directory, or restore optimizer and random states. Files change from here."""
        metrics, samples = self.dir / "metrics.csv", self.dir / "samples.jsonl"
        if self.loaded:
            optimizer.load_state_dict(self.loaded["optimizer"])
            torch.set_rng_state(self.loaded["rng"])
            if torch.cuda.is_available() and self.loaded["cuda_rng"]:
                torch.cuda.set_rng_state_all(self.loaded["cuda_rng"])
            keep_steps(metrics, self.state["step"])
            keep_steps(samples, self.state["step"])
            self.loaded = None  # Adam's moments need not stay in memory twice
        else:
            for path in self.dir.glob("checkpoint*"):
                shutil.rmtree(path)
            for path in (metrics, samples, self.dir / "curves.png"):
                path.unlink(missing_ok=True)
        self.dir.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in vars(self.args).items() if k not in ("resume", "overwrite")}
        write_whole(self.dir / "config.json", json.dumps(config, indent=2) + "\n")
        self.columns = columns
        self.metrics = metrics.open("a", encoding="utf-8")
        self.samples = samples.open("a", encoding="utf-8")
        if metrics.stat().st_size == 0:
            self.metrics.write(",".join(self.columns) + "\n")

    def steps(self, total: int):
        """The numbers of the steps to do, with a bar; Ctrl-C and SIGTERM end them early."""
        previous = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=total, initial=self.state["step"], unit="step") as self.bar:
                while self.state["step"] < total and not self.stopping:
                    self.started = time.perf_counter()
                    yield self.state["step"] + 1
                    self.bar.update()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def stop(self, signum, frame) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        tqdm.write("\nfinishing this step and saving; again: stop at once", file=sys.stderr)

    def next_problems(self, count: int) -> list[int]:
        """The numbers of the next training problems."""
        first = self.state["problem"]
        self.state["problem"] += count
        return list(range(first, first + count))

    def warn(self, step: int, message: str) -> None:
        """Say it the 1st, 2nd, 4th, 8th ... time: neither the message nor the bar gets lost."""
        times = self.warnings[message] = self.warnings.get(message, 0) + 1
        if times & (times - 1) == 0:
            times = f" ({times} times)" if times > 1 else ""
            tqdm.write(f"step {step}: {message}{times}", file=sys.stderr)

    def check_finite(self, step: int, **values: float) -> None:
        """Raises TrainingError for NaN and inf; to be called before the optimizer sees them."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {step}: {name} is {value}, so training stops; {self.checkpoint} is the "
                    "last good checkpoint. A lower --lr may help"
                )

    def log(
        self,
        step: int,
        prompts: list[str] = (),
        rollout: Rollout | None = None,
        rewards: Tensor | None = None,  # [groups, G], of the rows of the rollout
        evaluation: dict[str, float] | None = None,
        samples: list[dict] = (),
        **row: float,
    ) -> None:
        """The step's row of metrics.csv; its first group, and `samples`, in samples.jsonl; the bar.

        `row` holds the columns that only the script knows. The step counts as done from here on.
        """
        seconds = time.perf_counter() - self.started
        row |= {"step": step, "seconds": seconds}
        if evaluation:
            self.state["after" if step else "before"] = evaluation
            row |= {f"eval_{name}": value for name, value in evaluation.items()}
        if rollout:
            lengths = rollout.completion_mask.sum(1).double()  # [N]
            row["reward_mean"] = rewards.mean().item()
            row["reward_std"] = rewards.std(1).mean().item()  # within the groups
            # -log pi of tokens drawn from pi: an unbiased estimate of the entropy, at no cost
            row["entropy"] = masked_mean(-rollout.logprobs, rollout.completion_mask).item()
            row["completion_length"] = lengths.mean().item()
            row["truncated_share"] = rollout.truncated.double().mean().item()
            row["tokens_per_second"] = lengths.sum().item() / seconds
            self.state["tokens"] += int(lengths.sum())
            group = zip(rollout.texts, rewards[0].tolist(), strict=False)
            samples = [
                {"prompt": prompts[0], "completion": text, "reward": reward}
                for text, reward in group
            ] + list(samples)
            if rollout.truncated.all():
                limit = self.args.max_new_tokens
                self.warn(step, f"no completion ended within --max-new-tokens {limit}")
        if step:
            latest = row | (self.state["after"] or self.state["before"])
            shown = [f"{word} {latest[name]:.{n}f}" for name, word, n in BAR if name in latest]
            self.bar.set_postfix_str(", ".join(shown), refresh=False)
        cells = (f"{row[name]:.6g}" if name in row else "" for name in self.columns)
        self.metrics.write(",".join(cells) + "\n")
        for sample in samples:
            line = json.dumps({"step": step} | sample, ensure_ascii=False)
            self.samples.write(line + "\n")
        self.metrics.flush()
        self.samples.flush()
        self.state["step"] = step
        self.state["seconds"] += seconds

    def save(self, model, tokenizer, optimizer) -> None:
        """checkpoint/, if one is due: a Hugging Face directory and the training state beside it.

        Written under another name and renamed: at every instant `checkpoint` is whole or, between
        the two renames, `checkpoint.old`. Raises UserError where it cannot be written.
        """
        step = self.state["step"]
        if step % self.args.save_every and step != self.args.steps and not self.stopping:
            return
        new, old = self.dir / "checkpoint.new", self.dir / "checkpoint.old"
        state = {"state": self.state, "optimizer": optimizer.state_dict()}
        state |= {"rng": torch.get_rng_state(), "cuda_rng": []}
        if model.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state_all()
        try:
            shutil.rmtree(new, ignore_errors=True)
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            torch.save(state, new / "training_state.pt")
            for path in new.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if self.checkpoint.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.checkpoint.rename(old)
            new.rename(self.checkpoint)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # a full disk: OSError, RuntimeError or SafetensorError
            raise UserError(
                f"{new} could not be written ({error}); the checkpoint before it is whole: make "
                f"room, then --resume {self.dir}"
            ) from error

    def finish(self, model) -> None:
        """Curves and closing summary, or how to go on after an early stop."""
        self.metrics.close()
        self.samples.close()
        draw_curves([self.dir], self.dir / "curves.png")
        args, state = self.args, self.state
        if state["step"] < args.steps:
            go_on = f"python {args.script} --resume {self.dir}"
            print(f"stopped after step {state['step']} of {args.steps}; {go_on} goes on")
            return
        memory = math.nan
        if model.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(model.device)
        else:
            with contextlib.suppress(ImportError):  # Windows has no such module
                import resource

                unit = 1 if sys.platform == "darwin" else 1024
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        task = args.task or args.data
        print(f"\n{args.model} on {task}, {state['step']} steps, seed {args.seed}")
        for when in ("before", "after"):
            print(f"  {when:7} {describe(state[when])}")
        print(
            f"  took    {state['seconds']:.0f} s, {state['tokens']} sampled tokens, "
            f"{memory / 2**30:.2f} GiB at the peak; {state['skipped']} steps skipped\n"
            f"  see     {self.dir}: curves.png, samples.jsonl, metrics.csv, checkpoint/"
        )


def describe(evaluation: dict[str, float]) -> str:
    """An evaluation as one line: every figure, with its standard error if there is one."""
    figures = []
    for name, value in evaluation.items():
        if not name.endswith("_stderr"):
            error = evaluation.get(f"{name}_stderr")
            figures.append(f"{name} {value:.3f}" + ("" if error is None else f" +- {error:.3f}"))
    return "   ".join(figures)


def keep_steps(path: Path, last: int) -> None:
    """Cut from metrics.csv or samples.jsonl what came after step `last`, half a line included."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        number = re.match(r'(?:\{"step": )?(\d+)', line)  # a header has none
        if not number or int(number[1]) <= last:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))


def finished(directory: Path) -> bool:
    """Has the run in this directory come to its last step?"""
    try:
        steps = json.loads((directory / "config.json").read_text())["steps"]
        last = (directory / "metrics.csv").read_text().splitlines()[-1]
        return last.startswith(f"{steps},")
    except (OSError, ValueError):
        return False


def write_whole(path: Path, text: str) -> None:
    """Under another name first: a crash leaves the old file or the new one, never half of it."""
    path.with_name(path.name + ".new").write_text(text, encoding="utf-8")
    path.with_name(path.name + ".new").replace(path)


PANELS = [  # of curves.png: the first six of which there are values
    "reward_mean", "eval_accuracy", "valid_share", "alpha", "entropy", "completion_length",
    "eval_reward", "eval_kl", "eval_utility", "eval_length", "loss", "grad_norm",
]  # fmt: skip


def draw_curves(runs: list[Path], out: Path) -> None:
    """The metrics.csv of one or several runs as one figure. Raises UserError."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    tables = []
    for run in runs:
        try:
            with (run / "metrics.csv").open(encoding="utf-8") as file:
                tables.append(list(csv.DictReader(file)))
        except OSError as error:
            raise UserError(f"{run}: there is no metrics.csv in it ({error.strerror})") from error
    panels = [name for name in PANELS if any(row.get(name) for rows in tables for row in rows)][:6]
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for rows in tables:
        for axis, name in zip(axes.flat, panels, strict=False):
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            marker = "." if name.startswith("eval") else None
            axis.plot([x for x, _ in points], [y for _, y in points], lw=1, marker=marker)
            axis.set_title(name.replace("_", " "), fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=8)
    if len(runs) > 1:
        axes[0, 0].legend([str(run) for run in runs], fontsize=8)
    figure.savefig(out, dpi=100)
    plt.close(figure)


@contextlib.contextmanager
def plain_errors(script: str):
    """What the user can mend becomes one line on stderr and an exit status, not a traceback."""
    try:
        yield
        return
    except UserError as error:
        line, status = str(error), 2
    except TrainingError as error:
        line, status = str(error), 1
    except torch.cuda.OutOfMemoryError:
        line = "CUDA out of memory: lower --micro-batch-tokens, --prompts or --max-new-tokens"
        line, status = line + ", or add --grad-checkpointing", 2
    except OSError as error:  # a full disk, a directory that may not be written
        line, status = str(error), 2
    except KeyboardInterrupt:
        line, status = "stopped", 130
    print(f"{script}: {line}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    with plain_errors("common.py"):
        parser = Parser("common.py", description="Draw the curves of several runs in one figure.")
        parser.add_argument("runs", nargs="+", type=Path)
        parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the figure")
        flags = parser.parse_args()
        draw_curves(flags.runs, flags.out)
        print(flags.out)

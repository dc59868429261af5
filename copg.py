"""CoPG, Contrastive Policy Gradient (Flet-Berliac et al. 2024, arXiv 2406.19185).

Learn from pairs of scored completions that somebody else has written: offline, off-policy, for any
reward, without importance weights and without a critic. Compare the rewards of two completions of
a prompt with their log-probabilities under the policy; make the second difference follow the first.

    h(y)     = ln(pi(y | x) / pi_ref(y | x)), of the whole completion: a sum over its tokens
    R_b(y)   = R(y) - b h(y), the reward regularised with strength b                       eq. 2
    l        = (R_{beta/2}(y) - R_{beta/2}(y')) (h(y) - h(y')), to maximise              eq. 7-9
             = [dR^2 - (dR - beta dh)^2] / (2 beta),  d: difference of y and y'
    loss     = mean of (dR - beta dh)^2 / (2 beta), to minimise                       eq. 10, 17
    gradient = -(R_beta(y) - R_beta(y')) (grad ln pi(y) - grad ln pi(y'))               eq. 18-19

At the minimum pi = pi_ref exp(R / beta) / Z, whoever wrote the pairs (theorem 1). With both from pi
this is RLOO; with R = 1/4 for the preferred and -1/4 for the other it is IPO, divided by 2 beta.

    python copg.py                   section 6 in small, on a CPU: summaries, and a learned reward
    python copg.py --sweep           CoPG, IPO and DPO over the paper's betas; figures 5 and 6
    python copg.py --task add        any Gymnasium task instead, with its own reward
    python copg.py --model Qwen/Qwen2.5-0.5B --data pairs.jsonl --reward-model DIR_OR_ID
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import random
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

import common
from common import TextTask, UserError, at_least_0, positive

# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------

# The defaults that depend on the model. The paper trains Llama-2-7B (section 6).
TINY = {
    "lr": 1e-4, "prompts": 64, "max_new_tokens": 48, "micro_batch_tokens": 4096,
    "eval_every": 20, "save_every": 10,
}  # fmt: skip
REAL = {
    "lr": 1e-6, "prompts": 128, "max_new_tokens": 128, "micro_batch_tokens": 8192,
    "eval_every": 50, "save_every": 50,
}  # fmt: skip
# The best of the paper (section 6.2), and the best of `--sweep` for the tiny model.
BETA = {"copg": 0.06, "ipo": 0.01, "dpo": 0.1}
TINY_BETA = {"copg": 0.3, "ipo": 0.06, "dpo": 1.0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line as flags. Raises UserError."""
    parser = common.Parser("copg.py", description="Contrastive Policy Gradient, IPO and DPO.")

    add = parser.add_argument_group("model, reward and data").add_argument
    add("--model", default="tiny", help="tiny, a Hugging Face directory or id (default: tiny)")
    add("--reward-model", help="sequence classifier with one label; without it the task's reward")
    add("--task", help="posts (default without --data), add, gsm8k, file.jsonl, module:Name-v0")
    add("--data", help="file.jsonl with scored completions or preferences")
    add("--no-chat-template", action="store_true", help="give the model the bare prompt")
    add("--pairs", type=positive(int), default=6400, help="prompts to make data for (6400)")
    add("--completions", type=positive(int), default=2, help="K of each, sampled (default: 2)")
    add("--make-data", metavar="OUT.jsonl", help="sample and score such a file, and stop")

    add = parser.add_argument_group("Contrastive Policy Gradient").add_argument
    add("--loss", choices=BETA, help="default: copg; IPO and DPO see only which one is best")
    add("--beta", type=positive(float), help="default: .06, .01 (ipo), .1 (dpo), as the paper; "
        "tiny: .3, .06, 1")  # fmt: skip
    add("--online", action="store_true", help="sample from the current policy, K a prompt: RLOO")
    add("--sweep", action="store_true", help="the three losses over the paper's betas")

    add = parser.add_argument_group("optimisation").add_argument
    add("--prompts", type=positive(int), help="per step (default: 128, as the paper; tiny: 64)")
    add("--epochs", type=positive(int), default=2, help="over the data (default: 2, as the paper)")
    add("--steps", type=positive(int), help="in place of --epochs")
    add("--lr", type=positive(float), help="default: 1e-6, as the paper; tiny: 1e-4")
    add("--warmup", type=at_least_0(int), help="steps of linear warm-up (default: a tenth)")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="after the warm-up")
    add("--weight-decay", type=at_least_0(float), default=0.0, help="default: 0")
    add("--clip-grad", type=positive(float), default=1.0, help="norm of the gradient (default: 1)")
    add("--max-new-tokens", type=positive(int), help="of a sampled completion: 128; tiny: 48")
    add("--micro-batch-tokens", type=positive(int), help="per forward pass; changes no result")
    add("--grad-checkpointing", action="store_true", help="less memory, a third more time")

    common.add_run_flags(parser, eval_samples=1)
    args = common.parse_flags(parser, argv, TINY, REAL)
    if args.sweep and (args.loss or args.beta) and not args.resume:
        raise UserError("--sweep goes through its own --loss and --beta: leave them out")
    args.task = args.task or (None if args.data else "posts")
    args.loss = args.loss or "copg"
    args.beta = args.beta or (TINY_BETA if args.model == "tiny" else BETA)[args.loss]
    if args.completions == 1:
        raise UserError("--completions 1: a completion needs another one to compare with")
    if args.data and (args.online or args.make_data):
        raise UserError("--online and --make-data sample their own completions: leave out --data")
    return args


# --------------------------------------------------------------------------------------------------
# The equations
# --------------------------------------------------------------------------------------------------


def copg_loss(logratios: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """h [P, K], R [P, K] -> the scalar to minimise (eq. 7-10 and 17, as a square).

    K = 2 is the paper's. K > 2 is the mean over prompts of the sum over pairs, divided by K - 1
    (Command A, arXiv 2504.00698): its gradient is RLOO's, with the mean of the others as baseline.
    """
    K = rewards.shape[1]
    R_beta = rewards - beta * logratios  # [P, K]
    i, j = torch.triu_indices(K, K, 1)  # all pairs i < j
    pairs = (R_beta[:, i] - R_beta[:, j]) ** 2 / (2 * beta)  # [P, K (K - 1) / 2]
    return pairs.sum(1).mean() / (K - 1)


def ipo_loss(logratio_chosen: Tensor, logratio_rejected: Tensor, beta: float) -> Tensor:
    """h [P], h [P] -> scalar. Azar et al. 2023 (arXiv 2310.12036), as in the paper's eq. 20-22."""
    return ((0.5 - beta * (logratio_chosen - logratio_rejected)) ** 2).mean()


def dpo_loss(logratio_chosen: Tensor, logratio_rejected: Tensor, beta: float) -> Tensor:
    """h [P], h [P] -> scalar. Rafailov et al. 2023 (arXiv 2305.18290), eq. 7."""
    return -logsigmoid(beta * (logratio_chosen - logratio_rejected)).mean()


def bradley_terry_loss(score_chosen: Tensor, score_rejected: Tensor) -> Tensor:
    """Scores [P], [P] of a reward model -> scalar: -ln P(chosen is preferred). Section 6.1."""
    return -logsigmoid(score_chosen - score_rejected).mean()


def policy_loss(loss: str, logratios: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """h [P, K], R [P, K] -> scalar. IPO and DPO see the best and the worst of the K, not how much
    better; where all are equal they see nothing."""
    if loss == "copg":
        return copg_loss(logratios, rewards, beta)
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)  # [P, 1]
    h_best, h_worst = logratios.gather(1, best)[:, 0], logratios.gather(1, worst)[:, 0]  # [P]
    return {"ipo": ipo_loss, "dpo": dpo_loss}[loss](h_best, h_worst, beta)


# --------------------------------------------------------------------------------------------------
# A world of posts and summaries, where the hidden utility stands for human judgment
# --------------------------------------------------------------------------------------------------

WORDS = {
    "who": "sister brother boss roommate neighbour cousin teacher friend uncle aunt mother father "
    "doctor barber landlord nephew niece grandmother",
    "did": "lost broke sold ate read burned took washed hid copied painted returned borrowed "
    "dropped kept buried opened wrapped",
    "thing": "phone bike diary keys essay shoes guitar lunch umbrella letter camera coat hat lamp "
    "ticket wallet piano kite",
    "place": "beach park school library station garden office market zoo kitchen church stadium "
    "museum harbour forest hotel theatre bakery",
    "cause": "bet dream storm party quarrel rumour fever joke promise mistake film wedding game "
    "strike concert flood holiday dare",
    "ask": "forgive call thank visit ignore invite warn help trust tell follow forget pay avoid "
    "praise question hug leave",
    "food": "soup bread rice cake tea cheese fish pizza honey salad pasta jam beans plums",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "mood": "tired hungry cheerful bored nervous proud lonely curious lazy grumpy calm silly",
    "sky": "cloudy sunny windy foggy snowy rainy stormy icy warm mild",
}
WORDS = {kind: words.split() for kind, words in WORDS.items()}
FACTS = [
    "my {who} {did} my {thing}", "in the {place}", "because of a {cause}", "should i {ask} them",
]  # fmt: skip
WORTH = [2.0, 0.6, 0.6, 1.0]  # of each fact in a summary
POST = [
    "my {who} {did} my {thing}", "it happened in the {place}",
    "they say it was because of a {cause}",
]  # fmt: skip
CHATTER = [
    "sorry for my english", "thanks for reading", "i am new here", "this is a long story",
    "please be kind", "i feel {mood} today", "it was {sky} on {day}", "my {who} likes {food}",
    "my {who} cooks {food} on {day}", "i was in the {place} on {day}", "my {who} is {mood}",
    "on {day} we talked about a {cause}", "i like {food} too", "we had {food} and {food}",
]  # fmt: skip


def say(template: str, rng: random.Random) -> str:
    """The template, with a random word of the right kind in every gap."""
    return template.format(**{kind: rng.choice(words) for kind, words in WORDS.items()})


class Posts(TextTask):
    """A post says four things that matter, among chatter. A good summary says them, briefly, and
    nothing else. The answer to a post is the summary that leaves out nothing; the reward is what a
    summary is worth to the reader, which no learner here ever sees."""

    def problem(self, index):
        rng = random.Random(f"{self.split} {index}")
        while True:
            words = {kind: rng.choice(words) for kind, words in WORDS.items()}
            facts = [fact.format(**words) for fact in FACTS]
            held_out = zlib.crc32(facts[0].encode()) % 10 == 0  # one event in ten is for the test
            if held_out == (self.split == "test"):
                break
        sentences = [sentence.format(**words) for sentence in POST]
        for _ in range(rng.randint(1, 3)):
            sentences.insert(rng.randint(0, len(sentences)), say(rng.choice(CHATTER), rng))
        post = " . ".join(sentences) + f" . {facts[3]} ? summary :"
        return post, " ; ".join(facts)

    def reward(self, completion, answer):
        """The worth of the facts that it states, less 1 for anything else, less .1 for a word."""
        worth = dict(zip(answer.split(" ; "), WORTH, strict=True))
        stated = completion.split(" ; ")
        utility = sum(worth[clause] for clause in set(stated) if clause in worth)
        utility -= sum(clause not in worth for clause in stated)
        return utility - 0.1 * len(completion.replace(";", "").split())

    def write(self, index, writer):
        """The summary by a writer, good or bad: facts left out, mistaken or said twice; chatter."""
        rng = random.Random(f"{self.split} {index} writer {writer}")
        skill, clauses = rng.random(), []
        for fact, template in zip(self.problem(index)[1].split(" ; "), FACTS, strict=True):
            if rng.random() < 0.3 + 0.65 * skill:
                mistaken = rng.random() < 0.25 * (1 - skill)
                clauses += [say(template, rng) if mistaken else fact]
                clauses += clauses[-1:] if rng.random() < 0.25 * (1 - skill) else []
        for _ in range(2):
            if rng.random() < 0.6 * (1 - skill):
                clauses.insert(rng.randint(0, len(clauses)), say(rng.choice(CHATTER), rng))
        return " ; ".join(clauses) or say(CHATTER[0], rng)

    def demonstration(self, index):
        return self.write(index, writer=0)

    def preference(self, index):
        """-> prompt, two summaries, the preferred one first: Bradley-Terry on the utility."""
        prompt, answer = self.problem(index)
        first, second = self.write(index, writer=1), self.write(index, writer=2)
        margin = self.reward(first, answer) - self.reward(second, answer)
        rng = random.Random(f"{self.split} {index} preference")
        swapped = rng.random() > 1 / (1 + math.exp(-margin))
        return prompt, [second, first] if swapped else [first, second]


# --------------------------------------------------------------------------------------------------
# The supervised model and the learned reward model of that world (section 6.1)
# --------------------------------------------------------------------------------------------------

SFT = {"steps": 300, "posts_per_step": 40, "lr": 2e-3}
REWARD_MODEL = {"pairs": 6400, "epochs": 2, "pairs_per_step": 32, "lr": 3e-4}
PREFERENCES = 10**6  # the posts of the preference split, and of its test split, start here


def word_tokenizer():
    """One token a word, made by `tokenizers`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [*FACTS, *POST, *CHATTER, ". ? ; summary :", *(" ".join(w) for w in WORDS.values())]
    words = sorted({word for text in texts for word in text.split() if "{" not in word})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def supervised_model() -> str:
    """The directory of the policy that imitates the writers: pi_ref, and every method's start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    task, tokenizer = Posts(), word_tokenizer()
    sizes = common.TINY | {"vocab_size": len(tokenizer), "bos_token_id": None}
    sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}

    def make(directory):
        model, n = LlamaForCausalLM(LlamaConfig(**sizes)), SFT["posts_per_step"]

        def batch_loss(i):
            posts = list(range(i * n, (i + 1) * n))
            summaries = [task.demonstration(post) for post in posts]
            prompts = common.get_prompts(task, posts)
            return common.imitation_loss(model, tokenizer, prompts, summaries)

        common.fit(model, batch_loss, SFT["steps"], SFT["lr"], "supervised model")
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return common.cached_model([sizes, SFT, world()], make)


def learned_reward_model() -> str:
    """The directory of a reward model: the supervised one, fitted to the preferences."""
    task, start = Posts(), supervised_model()

    def make(directory):
        model, tokenizer = load_reward_model(start, "cpu")
        n, pairs = REWARD_MODEL["pairs_per_step"], REWARD_MODEL["pairs"]

        def batch_loss(i):
            epoch, first = divmod(i * n, pairs)
            order = common.shuffled(pairs, epoch)[first : first + n]
            return bradley_terry_loss(*preference_scores(model, tokenizer, task, order))

        steps = REWARD_MODEL["epochs"] * pairs // n
        common.fit(model, batch_loss, steps, REWARD_MODEL["lr"], "reward model")
        accuracy = {}
        for split in ("train", "test"):
            with torch.no_grad():
                scores = preference_scores(model, tokenizer, Posts(split), range(1000))
            accuracy[split] = (scores[0] > scores[1]).double().mean().item()
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "accuracy.json").write_text(json.dumps(accuracy))

    path = common.cached_model([Path(start).name, REWARD_MODEL], make)
    accuracy = json.loads((Path(path) / "accuracy.json").read_text())
    print(
        f"reward model: agrees with {accuracy['train']:.3f} of the preferences that it was fitted "
        f"to, {accuracy['test']:.3f} of others (paper: .891, .728)"
    )
    return path


def world() -> list:
    """A sample of everything that the world says: if it changes, cached models are made anew."""
    task = Posts()
    return [(task.demonstration(i), task.preference(PREFERENCES + i)) for i in range(0, 6400, 97)]


def load_reward_model(name: str, device):
    """-> (model, tokenizer) of a sequence classifier with one label. Raises UserError."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as in common.load_model
        reason = " ".join(str(error).split())
        line = f"--reward-model {name}: no sequence classifier loads from it: {reason:.300}"
        raise UserError(line) from error
    if model.config.pad_token_id is None:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.config.pad_token_id = pad
    return model.to(device).eval(), tokenizer


def score(model, tokenizer, prompts: list[str], completions: list[str]) -> Tensor:
    """The reward model's score of each completion of each prompt, [N]; differentiable."""
    if tokenizer.chat_template:
        chats = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        rows = tokenizer(texts, add_special_tokens=False).input_ids
    else:
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends = tokenizer(completions, add_special_tokens=False).input_ids
        starts = tokenizer(prompts).input_ids
        rows = [start + end + eos for start, end in zip(starts, ends, strict=True)]
    ids, mask = common.pad(rows, "right", model.device)  # [N, L]
    ids = ids.where(mask, model.config.pad_token_id)  # it reads its score at the last other token
    with common.autocast(model.device):
        return model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()


def preference_scores(model, tokenizer, task: Posts, pairs) -> tuple[Tensor, Tensor]:
    """The scores of the preferred summaries and of the others, [P], [P]."""
    prompts, summaries = zip(*(task.preference(PREFERENCES + i) for i in pairs), strict=True)
    both = [pair[0] for pair in summaries] + [pair[1] for pair in summaries]
    return score(model, tokenizer, list(prompts) * 2, both).chunk(2)


@torch.no_grad()
def frozen_scores(model, tokenizer, prompts, completions, rows: int = 64) -> Tensor:
    """score [N] without gradient, a few rows at a time."""
    parts = [
        score(model, tokenizer, prompts[i : i + rows], completions[i : i + rows])
        for i in range(0, len(prompts), rows)
    ]
    return torch.cat(parts).cpu()


# --------------------------------------------------------------------------------------------------
# Data: P prompts with K scored completions each
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    prompts: list[str]  # P
    completions: list[list[str]]  # P lists of K
    rewards: Tensor | None = None  # [P, K]
    ref_logprobs: Tensor | None = None  # [P, K], ln pi_ref of whole completions
    where: list[str] = dataclasses.field(default_factory=list)  # file and line of each

    def rows(self, index) -> tuple[list[str], list[str]]:
        """Prompts and completions of the records `index`, a row for each completion."""
        prompts = [self.prompts[i] for i in index for _ in self.completions[i]]
        return prompts, [completion for i in index for completion in self.completions[i]]

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(vars(self), buffer)
        path.write_bytes(buffer.getvalue())  # a full disk is an OSError, one line

    @staticmethod
    def load(path: Path) -> Data:
        try:
            return Data(**torch.load(path, weights_only=True))
        except Exception as error:  # torch.load has many ways to say it
            raise UserError(f"{path} is damaged or gone ({error!r:.200})") from error

    def split(self) -> tuple[Data, list[str]]:
        """-> what to train on, and every tenth prompt, held out. (A single record serves both.)"""
        index = [i for i in range(len(self.prompts)) if i % 10] or [0]
        rest = Data(
            [self.prompts[i] for i in index],
            [self.completions[i] for i in index],
            None if self.rewards is None else self.rewards[index],
            where=[self.where[i] for i in index],
        )
        return rest, self.prompts[::10]


def read_data(path: str) -> Data:
    """A JSONL file of {"prompt", "completions": [K texts], "rewards": [K numbers]}, the rewards
    optional, or of {"prompt", "chosen", "rejected"}. Raises UserError with the line number.

    A preference without scores becomes R = 1/4 and -1/4, with which CoPG is IPO (property 3).
    """
    data, rewards = Data([], []), []
    for where, record in common.json_lines(path):
        prompt, completions = record.get("prompt"), record.get("completions")
        given = record.get("rewards")
        if "chosen" in record:
            completions, given = [record["chosen"], record.get("rejected")], [0.25, -0.25]
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: needs a text under 'prompt'")
        if not isinstance(completions, list) or len(completions) < 2:
            raise UserError(f"{where}: needs two completions or more, or 'chosen' and 'rejected'")
        if any(not isinstance(text, str) or not text.strip() for text in completions):
            raise UserError(f"{where}: a completion is empty, or no text")
        if data.completions and len(completions) != len(data.completions[0]):
            first = len(data.completions[0])
            raise UserError(f"{where}: {len(completions)} completions; those before have {first}")
        if given is not None:
            numbers = isinstance(given, list) and all(type(r) in (int, float) for r in given)
            if not numbers or len(given) != len(completions) or not all(map(math.isfinite, given)):
                raise UserError(f"{where}: needs a finite number a completion under 'rewards'")
            rewards.append(given)
        data.prompts.append(prompt)
        data.completions.append(completions)
        data.where.append(where)
    if rewards and len(rewards) < len(data.prompts):
        raise UserError(f"{path}: only {len(rewards)} of {len(data.prompts)} records have rewards")
    data.rewards = torch.tensor(rewards) if rewards else None
    return data


class Prompts(TextTask):
    """The held-out prompts of a data file as a task. It has no reward of its own."""

    def __init__(self, prompts: list[str]):
        super().__init__("test")
        self.prompts, self.size = prompts, len(prompts)

    def problem(self, index):
        return self.prompts[index % self.size], ""


def written_data(task: Posts, pairs: int) -> Data:
    """The two summaries of every preference, not yet scored."""
    preferences = [task.preference(PREFERENCES + i) for i in range(pairs)]
    return Data([prompt for prompt, _ in preferences], [texts for _, texts in preferences])


def sample_data(model, tokenizer, reward_model, task, args) -> Data:
    """K scored completions of each of --pairs training prompts, from the model as it is."""
    torch.manual_seed(args.seed)
    data, rewards, K = Data([], []), [], args.completions
    for i in tqdm(range(0, args.pairs, 64), desc="sampling data"):
        problems = list(range(i, min(i + 64, args.pairs)))
        prompts = common.get_prompts(task, problems)
        texts = common.sample(model, tokenizer, prompts, K, args.max_new_tokens).texts
        data.prompts += prompts
        data.completions += [texts[j : j + K] for j in range(0, len(texts), K)]
        rewards.append(judge(reward_model, task, problems, prompts, texts))
    data.rewards = torch.cat(rewards)
    return data


def judge(reward_model, task, problems: list[int], prompts: list[str], completions) -> Tensor:
    """[P, K] rewards of P * K completions: of the reward model, or of the task if there is none."""
    if not reward_model:
        return common.get_rewards(task, problems, completions)[0]
    K = len(completions) // len(prompts)
    prompts = [prompt for prompt in prompts for _ in range(K)]
    return frozen_scores(*reward_model, prompts, completions).view(-1, K)


def encode_records(model, tokenizer, data: Data, index) -> common.Rollout:
    """The completions of some records. Raises UserError with the record that is too long."""
    try:
        return common.encode(model, tokenizer, *data.rows(index))
    except UserError as error:
        if len(index) == 1:
            where = data.where[index[0]] if data.where else f"record {index[0]}"
            raise UserError(f"{where}: {error}") from error
        for i in index:
            encode_records(model, tokenizer, data, [i])
        raise


def reference_logprobs(ref_model, tokenizer, data: Data, args) -> Tensor:
    """ln pi_ref of all completions [P, K], once. Raises UserError for one that is too long."""
    parts, everything = [], range(len(data.prompts))
    for i in tqdm(everything[::64], desc="log-probs of the reference"):
        index = everything[i : i + 64]
        rollout = encode_records(ref_model, tokenizer, data, index)
        logprobs = common.frozen_logprobs(ref_model, rollout, args.micro_batch_tokens)  # [N, T]
        parts.append(logprobs.sum(1).view(len(index), -1).cpu())  # [64, K]
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def setting(args):
    """-> training task, test task (None, None for a file alone), where the policy starts, and where
    the reward model is, if any. Raises UserError."""
    if args.task == "posts":
        start = supervised_model() if args.model == "tiny" else args.model
        return Posts(), Posts("test"), start, args.reward_model or learned_reward_model()
    tasks = None, None
    if args.task:
        tasks = common.make_task(args.task), common.make_task(args.task, "test")
    return *tasks, args.model, args.reward_model


def train(args: argparse.Namespace) -> common.Run:
    data, held_out = read_data(args.data).split() if args.data else (None, [])
    n = len(data.prompts) if data else args.pairs
    args.steps = args.steps or math.ceil(args.epochs * n / args.prompts)
    args.warmup = math.ceil(args.steps / 10) if args.warmup is None else args.warmup
    run = common.Run(args)
    task, test_task, start, reward_model = setting(args)
    test_task = test_task or Prompts(held_out)
    if data and data.rewards is None and not reward_model:
        raise UserError(f"{args.data}: no rewards in it; --reward-model gives them")
    device = common.pick_device(args.device)
    template = not args.no_chat_template
    model, tokenizer = common.load_model(
        run.model_name(start), device, task, template, args.grad_checkpointing
    )
    ref_model = common.load_model(start, device, task)[0].requires_grad_(False)
    reward_model = reward_model and load_reward_model(reward_model, device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)

    # The data, its rewards, and its log-probs under the reference: computed once, and kept.
    torch.manual_seed(args.seed)
    if run.loaded and not args.online:
        data = Data.load(run.dir / "data.pt")
    elif not args.online:
        if data is None and args.task == "posts":
            data = written_data(task, n)
        if data is None:
            data = sample_data(model, tokenizer, reward_model, task, args)
        elif reward_model:
            data.rewards = frozen_scores(*reward_model, *data.rows(range(n))).view(n, -1)
        data.ref_logprobs = reference_logprobs(ref_model, tokenizer, data, args)

    models = model, ref_model, tokenizer, reward_model
    before, samples = (None, []) if run.loaded else evaluate(*models, test_task, args)
    run.begin(optimizer, COLUMNS)  # whatever is wrong with the input has shown by now
    if data:
        data.save(run.dir / "data.pt")
    if before:
        run.log(0, evaluation=before, samples=samples)
        run.save(model, tokenizer, optimizer)

    P, K = args.prompts, len(data.completions[0]) if data else args.completions
    for step in run.steps(args.steps):
        # 1. The batch: P prompts with K completions each, from the data or from the policy.
        if args.online:
            problems = run.next_problems(P)
            prompts = common.get_prompts(task, problems)
            rollout = common.sample(model, tokenizer, prompts, K, args.max_new_tokens)
            rewards = judge(reward_model, task, problems, prompts, rollout.texts)  # [P, K]
            ref_logprobs = common.frozen_logprobs(ref_model, rollout, args.micro_batch_tokens)
            ref_logprobs = ref_logprobs.sum(1).view(P, K)
        else:
            index = records((step - 1) * P, P, n, args.seed)
            rollout = common.encode(model, tokenizer, *data.rows(index))  # P * K rows
            rewards, ref_logprobs = data.rewards[index], data.ref_logprobs[index]  # [P, K]
        rewards, ref_logprobs = rewards.to(device), ref_logprobs.to(device)

        # 2. One gradient step. The completions of a prompt stay in one micro-batch.
        loss, ranked = 0.0, 0
        for rows in common.micro_batches(rollout, args.micro_batch_tokens, K):
            mb, i = rollout.rows(rows), rows[::K] // K  # p * K rows, of the prompts i [p]
            logprobs = common.completion_logprobs(model, mb)  # [p * K, T]
            logratios = logprobs.sum(1).view(-1, K) - ref_logprobs[i]  # h [p, K]
            mb_loss = policy_loss(args.loss, logratios, rewards[i], args.beta) * len(i) / P
            mb_loss.backward()
            loss += mb_loss.item()
            ranked += (logratios.argmax(1) == rewards[i].argmax(1)).sum().item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad).item()
        run.check_finite(step, loss=loss, grad_norm=grad_norm)
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # 3. Write it down.
        evaluation, samples = None, []
        if step % args.eval_every == 0 or step == args.steps:
            evaluation, samples = evaluate(*models, test_task, args)
        run.log(
            step, *((prompts, rollout, rewards.cpu()) if args.online else ()),
            evaluation=evaluation, samples=samples, loss=loss, grad_norm=grad_norm, lr=lr,
            ranked=ranked / P,
        )  # fmt: skip
        run.save(model, tokenizer, optimizer)
    for sample in samples[:3]:
        print("\n" + "\n".join(f"{name:>10}  {value}" for name, value in sample.items()))
    run.finish(model)
    return run


def records(first: int, count: int, n: int, seed: int) -> list[int]:
    """Numbers of the next `count` of n records, which every epoch shuffles anew."""
    places = (divmod(i, n) for i in range(first, first + count))
    return [common.shuffled(n, seed + 1000 * epoch)[place] for epoch, place in places]


COLUMNS = [
    "step", "loss", "grad_norm", "ranked", "reward_mean", "reward_std", "entropy",
    "completion_length", "truncated_share", "lr", "tokens_per_second", "seconds", "eval_reward",
    "eval_reward_stderr", "eval_kl", "eval_kl_stderr", "eval_utility", "eval_utility_stderr",
    "eval_length",
]  # fmt: skip


def evaluate(model, ref_model, tokenizer, reward_model, task, args):
    """Completions of held-out prompts -> their mean reward, KL(pi || pi_ref), length in tokens, and
    what they are worth to the task itself (utility) where a reward model is trained on, with
    standard errors; and the first eight completions.

    The same prompts and random numbers every time.
    """
    figures, samples = {"reward": [], "utility": [], "kl": [], "length": []}, []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        for problems in common.held_out(task, args.eval_problems):  # p of them
            prompts = common.get_prompts(task, problems)
            rollout = common.sample(
                model, tokenizer, prompts, args.eval_samples, args.max_new_tokens
            )  # p * k rows
            ref = common.frozen_logprobs(ref_model, rollout, args.micro_batch_tokens)  # [p * k, T]
            new = {"kl": (rollout.logprobs - ref).sum(1)}  # E_pi[ln pi - ln pi_ref]
            new["length"] = rollout.completion_mask.sum(1)
            if reward_model or not isinstance(task, Prompts):
                new["reward"] = judge(reward_model, task, problems, prompts, rollout.texts)
            if reward_model and not isinstance(task, Prompts):
                new["utility"] = common.get_rewards(task, problems, rollout.texts)[0]
            for name, values in new.items():  # completions of a prompt go together: [p]
                figures[name].append(values.double().cpu().view(len(problems), -1).mean(1))
            if not samples:
                new = {name: values.flatten().tolist() for name, values in new.items()}
                for row, text in enumerate(rollout.texts[:8]):
                    prompt = prompts[row // args.eval_samples]
                    numbers = {name: round(values[row], 3) for name, values in new.items()}
                    samples.append({"prompt": prompt, "completion": text} | numbers)
    evaluation = {}
    for name, values in figures.items():
        if values:
            values = torch.cat(values)  # [n]
            evaluation[name] = values.mean().item()
            if len(values) > 1:
                evaluation[f"{name}_stderr"] = (values.std() / math.sqrt(len(values))).item()
    return evaluation, samples


# --------------------------------------------------------------------------------------------------
# The paper's figures 5 and 6, and a file of scored completions
# --------------------------------------------------------------------------------------------------

GRID = {  # the paper's (section 6.2)
    "copg": [0.01, 0.03, 0.06, 0.1, 0.3, 1.0],
    "ipo": [0.003, 0.01, 0.03, 0.06, 0.1, 0.3],
    "dpo": [0.01, 0.03, 0.06, 0.1, 0.3, 1.0],
}
SEEDS = 3  # of the best beta of each loss


def sweep(args: argparse.Namespace) -> None:
    """Every loss with every beta, then the best of each with more seeds: sweep.csv, sweep.png.

    The runs are in --out/<loss>-<beta>-<seed>; those that are finished are not run again."""
    out, curves = Path(args.out), {}  # (loss, beta): [{column: values} of each seed]

    def run(loss, beta, seed):  # -> the reward at the end
        directory = out / f"{loss}-{beta}-{seed}"
        if not common.finished(directory):
            print(f"\n{loss}, beta {beta}, seed {seed}")
            flags = {"loss": loss, "beta": beta, "seed": seed, "out": str(directory)}
            flags |= {"overwrite": True, "sweep": False}
            if train(argparse.Namespace(**vars(args) | flags)).stopping:
                raise KeyboardInterrupt
        with (directory / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["eval_reward"]]
        columns = ["step", *(name for name in COLUMNS if name.startswith("eval_"))]
        curve = {name: [float(row[name] or "nan") for row in rows] for name in columns}
        curves.setdefault((loss, beta), []).append(curve)
        return curve["eval_reward"][-1]

    best = {}
    for loss, betas in GRID.items():
        best[loss] = max(betas, key=lambda beta: run(loss, beta, args.seed))
        for seed in range(args.seed + 1, args.seed + SEEDS):
            run(loss, best[loss], seed)
    with (out / "sweep.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["loss", "beta", "seed", *curves[loss, best[loss]][0]])
        for key, runs in curves.items():
            for seed, curve in enumerate(runs, args.seed):
                writer.writerows([*key, seed, *row] for row in zip(*curve.values(), strict=True))
    draw_sweep(curves, best, out / "sweep.png")
    print(f"\n{'loss':5} {'beta':>6}   seeds   reward   utility   KL   length, means at the end")
    for (loss, beta), runs in curves.items():
        names = "eval_reward", "eval_utility", "eval_kl", "eval_length"
        means = [sum(run[name][-1] for run in runs) / len(runs) for name in names]
        print(f"{loss:5} {beta:6}   {len(runs)}   " + "   ".join(f"{x:.3f}" for x in means))
    print(f"see {out}: sweep.csv, sweep.png")


def draw_sweep(curves: dict, best: dict, out: Path) -> None:
    """Reward against beta (figure 5), along training (figure 6), and against the KL; utility
    against the KL. curves: {(loss, beta): [{column: values} of each seed]}."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for loss, color in zip(GRID, ["C0", "C1", "C2"], strict=True):
        first = [curves[loss, beta][0] for beta in GRID[loss]]  # the first seed of every beta
        ends = {name: [curve[name][-1] for curve in first] for name in first[0]}
        style = {"color": color, "marker": "o", "label": loss}
        axes[0, 0].plot(GRID[loss], ends["eval_reward"], **style)
        runs = curves[loss, best[loss]]
        steps, rewards = runs[0]["step"], torch.tensor([run["eval_reward"] for run in runs])
        mean, error = rewards.mean(0), rewards.std(0) / len(runs) ** 0.5
        axes[0, 1].plot(steps, mean, color=color, label=f"{loss}, beta = {best[loss]}")
        axes[0, 1].fill_between(steps, mean - error, mean + error, color=color, alpha=0.3)
        axes[1, 0].plot(ends["eval_kl"], ends["eval_reward"], **style)
        axes[1, 1].plot(ends["eval_kl"], ends["eval_utility"], **style)
    axes[0, 0].set(xscale="log", xlabel="beta", ylabel="reward at the end")
    axes[0, 1].set(xlabel="step", ylabel=f"reward, {SEEDS} seeds with standard errors")
    axes[1, 0].set(xscale="symlog", xlabel="KL(pi || pi_ref) at the end", ylabel="reward")
    axes[1, 1].set(xscale="symlog", xlabel="KL(pi || pi_ref) at the end", ylabel="hidden utility")
    for axis in axes.flat:
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def make_data(args: argparse.Namespace) -> None:
    """--make-data: a JSONL file that --data reads. Raises UserError."""
    if Path(args.make_data).exists() and not args.overwrite:
        raise UserError(f"--make-data {args.make_data}: there is such a file; or add --overwrite")
    task, _, start, reward_model = setting(args)
    device = common.pick_device(args.device)
    model, tokenizer = common.load_model(start, device, task, not args.no_chat_template)
    reward_model = reward_model and load_reward_model(reward_model, device)
    data = sample_data(model, tokenizer, reward_model, task, args)
    lines = []
    for prompt, texts, rewards in zip(
        data.prompts, data.completions, data.rewards.tolist(), strict=True
    ):
        if all(text.strip() for text in texts):  # --data refuses empty completions
            record = {"prompt": prompt, "completions": texts, "rewards": rewards}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    common.write_whole(Path(args.make_data), "".join(lines))
    print(
        f"{args.make_data}: {len(lines)} of {len(data.prompts)} prompts (the others had an empty "
        f"completion), reward {data.rewards.mean():.3f}, std {data.rewards.std():.3f}"
    )


if __name__ == "__main__":
    with common.plain_errors("copg.py"):
        flags = parse_args()
        (make_data if flags.make_data else sweep if flags.sweep else train)(flags)

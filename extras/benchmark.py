"""Speed and memory, measured beside what one would use instead: `python extras/benchmark.py`.

Each side has a process of its own, as in use, and the two take turns: the machine may be shared and
slow, the ratio of the medians is what counts. Memory is the peak resident set above the loaded
model (CPU, Linux). TRL is measured where it is installed, and is no requirement.

    step      a GPG step of the default run, against TRL's GRPOTrainer; also with dead groups
    sample    sampling, against Hugging Face generate
    logprobs  log-probs with a large vocabulary, against logits as a whole
    start     from the command to --help, and to the end of a run of one step
    growth    time and memory of a step against G, T and B
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402
import gpg  # noqa: E402
from tasks import is_correct  # noqa: E402
from tasks.tiny import tiny_model, tiny_tokenizer  # noqa: E402


def own_process():
    """An executor whose one process starts afresh, with nothing of this one in it."""
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)


def take_turns(repeats: int, **sides) -> dict[str, list]:
    """What each side, a function and its arguments, returns time after time in a process of its
    own; after one round that is not counted."""
    processes = {name: own_process() for name in sides}
    results = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, (function, *args) in sides.items():
            result = processes[name].submit(function, *args).result()
            if turn:
                results[name].append(result)
    for process in processes.values():
        process.shutdown()
    return results


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def resident(line: str) -> float:
    """VmRSS or VmHWM, the resident set of this process now or at its peak, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) / 1024


@functools.cache
def loaded() -> float:
    """What was resident when this was first asked: when the model is loaded."""
    return resident("VmRSS")


def peak() -> float:
    return resident("VmHWM") - loaded()


def versus(ours: float, theirs: float, unit: str, decimals: int) -> str:
    return f"{ours:.{decimals}f} and {theirs:.{decimals}f} {unit} (ratio {ours / theirs:.2f})"


def random_qwen2(**sizes):
    """A model with random weights, and a tokenizer, one token a byte, without an EOS."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258}
    config |= {"eos_token_id": None, "pad_token_id": 257, "max_position_embeddings": 1024}
    model = Qwen2ForCausalLM(Qwen2Config(**config | sizes)).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return model, tokenizer


# ---- a training step ----

STEPS = 8  # in a turn


@functools.cache
def our_trainer():
    task = common.make_task("add")
    model, tokenizer = common.load_model("tiny", "cpu", task)
    loaded()
    return task, model, tokenizer, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def update(model, optimizer, rollout, rewards, micro_batch_tokens=2048) -> None:
    """Parts 2 and 3 of gpg.train after one round. rewards [B, G]"""
    valid, alpha = gpg.is_valid(rewards), gpg.gradient_scale(rewards)
    if alpha == 0:  # every group is dead: nothing to learn
        return
    live = rollout.rows(valid.repeat_interleave(rewards.shape[1]).to(model.device))
    advantages = gpg.group_advantages(rewards[valid]).flatten().to(model.device)
    total = rollout.completion_mask.sum().item()
    for rows in common.micro_batches(live, micro_batch_tokens):
        mb = live.rows(rows)
        logprobs = common.completion_logprobs(model, mb)
        gpg.gpg_loss(logprobs, advantages[rows], mb.completion_mask, alpha, total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()


def our_steps(dead_share: float) -> dict:
    """STEPS steps of the default run; the first groups get equal rewards."""
    task, model, tokenizer, optimizer = our_trainer()

    def step(problems):
        prompts = common.get_prompts(task, problems)
        rollout = common.sample(model, tokenizer, prompts, 8, 48)
        rewards, _ = common.get_rewards(task, problems, rollout.texts)
        rewards[: int(16 * dead_share)] = 0.0
        update(model, optimizer, rollout, rewards)

    batches = [torch.randint(1024, (16,)).tolist() for _ in range(STEPS)]
    return {"seconds": [timed(step, problems)[0] for problems in batches], "MiB": peak()}


@functools.cache
def trl_trainer(dead_share: float):
    """TRL's GRPOTrainer on the same model directory, prompts, group size, lengths; fp32."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    task = common.make_task("add")
    problems = list(range(1024))
    prompts = common.get_prompts(task, problems)
    answers = {prompt: task.unwrapped.problem(i)[1] for i, prompt in enumerate(prompts)}
    dead = {prompt for i, prompt in enumerate(prompts) if i % 16 < 16 * dead_share}

    def reward(prompts, completions, **_):
        return [
            0.0 if p in dead else float(is_correct(c, answers[p]))
            for p, c in zip(prompts, completions, strict=True)
        ]

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=128, num_generations=8,
        beta=0.0, max_completion_length=48, learning_rate=1e-4, max_steps=10**6, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, num_iterations=1,
        scale_rewards="none", logging_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    seconds = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            seconds.append(time.perf_counter() - self.start)
            control.should_training_stop = len(seconds) % STEPS == 0

    model, tokenizer = common.load_model("tiny", "cpu", task)
    loaded()
    trainer = GRPOTrainer(
        model, reward, args=config, processing_class=tokenizer, callbacks=[Watch()],
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, seconds


def trl_steps(dead_share: float) -> dict:
    trainer, seconds = trl_trainer(dead_share)
    trainer.train()
    return {"seconds": seconds[-STEPS:], "MiB": peak()}


def step(repeats: int) -> None:
    trl = importlib.util.find_spec("trl") is not None
    for share in (0.0, 0.5):
        sides = {"ours": (our_steps, share)} | ({"theirs": (trl_steps, share)} if trl else {})
        results = take_turns(repeats, **sides)
        seconds = [statistics.median(s for x in r for s in x["seconds"]) for r in results.values()]
        memory = [max(x["MiB"] for x in r) for r in results.values()]
        line = f"step, {share:.0%} of the groups made dead: "
        if trl:
            line += f"ours and TRL's: {versus(*seconds, 's', 3)}; {versus(*memory, 'MiB', 0)}"
        else:
            line += f"{seconds[0]:.3f} s, {memory[0]:.0f} MiB (TRL is not installed)"
        print(line, flush=True)


# ---- sampling ----


@functools.cache
def sampler(ends: bool):
    """A model of 4M parameters; with `ends` a token in 32 ends its row."""
    model, tokenizer = random_qwen2(hidden_size=256, intermediate_size=768, num_hidden_layers=5)
    model.generation_config.eos_token_id = list(range(8)) if ends else None
    loaded()
    return model, tokenizer


def our_sample(B: int, G: int, P: int, T: int, ends: bool) -> dict:
    model, tokenizer = sampler(ends)
    seconds, rollout = timed(common.sample, model, tokenizer, ["x" * P] * B, G, T)
    return {"rate": rollout.completion_mask.sum().item() / seconds, "MiB": peak()}


@torch.no_grad()
def their_sample(B: int, G: int, P: int, T: int, ends: bool) -> dict:
    model, tokenizer = sampler(ends)
    batch = tokenizer(["x" * P] * B, return_tensors="pt")
    flags = {"max_new_tokens": T, "do_sample": True, "top_k": 0, "num_return_sequences": G}
    start = time.perf_counter()
    ids = model.generate(**batch, **flags, pad_token_id=257)[:, P:]
    seconds = time.perf_counter() - start
    # The tokens up to the first end, with it: those before which there is no end.
    is_end = (ids < 8) & torch.tensor(ends)
    tokens = (is_end.cumsum(1) - is_end.long() == 0).sum().item()
    return {"rate": tokens / seconds, "MiB": peak()}


def sample(repeats: int) -> None:
    for shape in (
        (16, 8, 8, 32, False),
        (16, 8, 8, 32, True),
        (16, 8, 128, 32, True),
        (1, 64, 512, 32, False),
    ):
        results = take_turns(repeats, ours=(our_sample, *shape), theirs=(their_sample, *shape))
        rates = [statistics.median(x["rate"] for x in r) for r in results.values()]
        memory = [max(x["MiB"] for x in r) for r in results.values()]
        B, G, P, T, ends = shape
        print(
            f"sample, 4.1M parameters, {B} x {G} completions of {T} tokens"
            f"{', 1 in 32 ends its row' if ends else ''}, prompts of {P}: ours and generate's: "
            f"{versus(*rates, 'tokens/s', 0)}; {versus(*memory, 'MiB', 0)}",
            flush=True,
        )


# ---- log-probs with a large vocabulary ----


def naive_logprobs(model, rollout):
    """The log-softmax of all logits, [N, P + T, V], and a gather."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
    return logprobs[:, -rollout.completion_ids.shape[1] :]


def logprobs_and_gradient(naive: bool) -> dict:
    model, _ = random_qwen2(
        vocab_size=151_936, hidden_size=64, intermediate_size=128, num_hidden_layers=2
    )
    N, P, T = 32, 16, 256
    ids = torch.randint(1000, (N, P + T))
    ones = torch.ones(N, P + T, dtype=torch.bool)
    rollout = common.Rollout(
        ids[:, :P], ones[:, :P], ids[:, P:], ones[:, P:], torch.zeros(N, T), ones[:, 0], [""] * N
    )
    common.head_gives_logits(model)  # tried once per model
    loaded()
    function = naive_logprobs if naive else common.completion_logprobs
    seconds, _ = timed(lambda: function(model, rollout).sum().backward())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"seconds": seconds, "MiB": peak(), "gradient": gradient.numpy()}


def logprobs(repeats: int) -> None:
    results = {True: [], False: []}
    for _ in range(repeats):
        for naive in results:
            with own_process() as process:
                results[naive].append(process.submit(logprobs_and_gradient, naive).result())
    seconds = [statistics.median(x["seconds"] for x in results[naive]) for naive in (False, True)]
    memory = [max(x["MiB"] for x in results[naive]) for naive in (False, True)]
    ours, naive = (torch.from_numpy(results[n][0]["gradient"]).double() for n in (False, True))
    print(
        "logprobs, 32 x 256 tokens, vocabulary 151,936, forward and backward: ours and naive: "
        f"{versus(*seconds, 's', 2)}; {versus(*memory, 'MiB', 0)}; the gradients differ by "
        f"{(ours - naive).norm() / naive.norm():.1e} of their norm",
        flush=True,
    )


# ---- start-up, growth ----


def start(repeats: int) -> None:
    def median(*argv, out=None):
        def command():
            flags = ["--out", next(out)] if out else []
            subprocess.run(
                [sys.executable, *argv, *flags], cwd=ROOT, capture_output=True, check=True
            )

        return statistics.median([timed(command)[0] for _ in range(repeats + 1)][1:])

    tiny_model(common.make_task("add"))  # cached from here on
    with tempfile.TemporaryDirectory() as folder:
        outs = (f"{folder}/{i}" for i in itertools.count())
        flags = ["--steps", "1", "--eval-problems", "1"]
        print(
            f"start: --help {median('gpg.py', '--help'):.1f} s; a run of a single step "
            f"{median('gpg.py', *flags, out=outs):.1f} s",
            flush=True,
        )


def full_length_step(B: int, G: int, T: int, repeats: int) -> dict:
    task, model, tokenizer, optimizer = our_trainer()
    model.generation_config.eos_token_id = tokenizer.eos_token = None  # all of length T
    prompts = common.get_prompts(task, range(B))  # B different ones: equal ones would be shared

    def step():
        rollout = common.sample(model, tokenizer, prompts, G, T)
        update(model, optimizer, rollout, torch.rand(B, G))

    seconds = [timed(step)[0] for _ in range(1 + repeats)][1:]
    return {"seconds": statistics.median(seconds), "MiB": peak()}


def growth(repeats: int) -> None:
    print("| B | G | T | seconds a step | MiB above the model |\n|---|---|---|---|---|")
    shapes = [(16, G, 32) for G in (2, 8, 32, 64)]
    shapes += [(16, 8, T) for T in (16, 64, 128, 512)] + [(B, 8, 32) for B in (4, 64, 128)]
    for shape in shapes:
        with own_process() as process:
            result = process.submit(full_length_step, *shape, repeats).result()
        cells = [*shape, f"{result['seconds']:.2f}", f"{result['MiB']:.0f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    parts = {f.__name__: f for f in (step, sample, logprobs, start, growth)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--repeats", type=common.count, default=5, help="default: 5")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no such part: {min(unknown)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for name in args.parts or parts:
        parts[name](args.repeats)

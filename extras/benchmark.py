"""Speed and memory, beside what one would use instead: `python extras/benchmark.py`.

On any machine. The two sides take turns, because the machine may be shared and slow: the ratio of
their medians is what counts. Memory is the peak resident set above the loaded model (Linux).

    step       a GPG step of the default run, beside TRL's GRPOTrainer if it is installed
    sample     sampling, beside Hugging Face generate
    logprobs   log-probs with a large vocabulary, beside all logits at once

On a CUDA GPU, with random weights in the shapes of Qwen2.5; --dry-run tries them on a CPU:

    precision  the scorer's probability of a sampled token over the sampler's, under bf16
    decode     tokens per second of `sample` and `generate`, and the limit of the memory bandwidth
    update     seconds, utilisation and memory of an update, by micro-batch and checkpointing
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from shared import markdown
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import gpg
from run import Parser, plain_errors, positive_int
from tasks import UserError, first_problem, get_prompts, get_rewards, make_task
from tasks.tiny import tiny_tokenizer


def random_model(device: str = "cpu", n_eos: int = 0, **sizes):
    """A Qwen2 with random weights (4.1M by default) whose first n_eos tokens end a completion, and
    a tokenizer of one token a byte."""
    torch.manual_seed(0)
    body = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258}
    config = Qwen2Config(**body | heads | sizes, eos_token_id=None, bos_token_id=None)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(range(n_eos)) or None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return model, tokenizer


@torch.no_grad()
def generate(model, tokenizer, prompts: list[str], G: int, T: int) -> torch.Tensor:
    """The completions [N, T] of Hugging Face generate, for prompts of equal length."""
    inputs = tokenizer(prompts, return_tensors="pt").to(model.device)
    flags = {"do_sample": True, "top_k": 0, "num_return_sequences": G, "pad_token_id": 257}
    with common.autocast(model.device):
        ids = model.generate(**inputs, max_new_tokens=T, **flags)
    return ids[:, inputs.input_ids.shape[1] :]


# --------------------------------------------------------------------------------------------------
# On any machine: two sides in turns
# --------------------------------------------------------------------------------------------------


def take_turns(repeats: int, fresh: bool = False, **sides) -> dict[str, list]:
    """What each side, a function and its arguments, returns time after time; the first round does
    not count. A side has a process of its own; with `fresh`, a new one each time."""
    spawn = multiprocessing.get_context("spawn")
    tasks = 1 if fresh else None
    processes = {x: ProcessPoolExecutor(1, spawn, max_tasks_per_child=tasks) for x in sides}
    results = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, (function, *args) in sides.items():
            result = processes[name].submit(function, *args).result()
            if turn > 0:
                results[name].append(result)
    for process in processes.values():
        process.shutdown()
    return results


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def report(what: str, unit: str, results: dict[str, list[float]]) -> None:
    """Print the median of each side, and their ratio."""
    medians = {name: statistics.median(values) for name, values in results.items()}
    text = ", ".join(f"{name} {median:,.5g} {unit}" for name, median in medians.items())
    if len(medians) == 2:
        ours, theirs = medians.values()
        text += f", ratio {ours / theirs:.2f}"
    print(f"{what}: {text}", flush=True)


STEPS = 8  # in a turn


def our_steps() -> float:
    """The median seconds of gpg.py's steps by default, each with one round of sampling."""
    flags = ["--device", "cpu", "--beta-th", "0", "--steps", str(STEPS), "--eval-problems", "1"]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        run = gpg.train(gpg.parse_args([*flags, "--out", out]))
    return statistics.median(row["seconds"] for row in run.rows[1:])


def trl_steps() -> float:
    """The median seconds of a step of TRL's GRPOTrainer with the same model, prompts and sizes."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task, seconds = make_task("add"), []
    problems = list(range(first_problem(0), first_problem(0) + 1024))
    data = Dataset.from_dict({"prompt": get_prompts(task, problems), "problem": problems})
    model, tokenizer = common.load_model("tiny", "cpu", task)

    def reward(completions, problem, **_):
        return get_rewards(task, problem, completions)[0].flatten().tolist()

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    config = GRPOConfig(
        num_generations=8,
        per_device_train_batch_size=128,
        max_completion_length=48,
        max_steps=STEPS,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        output_dir=tempfile.mkdtemp(),
    )
    trainer = GRPOTrainer(model, reward, config, data, None, tokenizer, callbacks=[Watch()])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return statistics.median(seconds)


def step(repeats: int) -> None:
    sides = {"ours": (our_steps,)}
    if importlib.util.find_spec("trl"):
        sides["TRL"] = (trl_steps,)
    report("step", "s", take_turns(repeats, **sides))


def our_sample(B: int, G: int, P: int, T: int, n_eos: int) -> float:
    """Tokens per second."""
    seconds, rollout = timed(common.sample, *random_model(n_eos=n_eos), ["x" * P] * B, G, T)
    return rollout.completion_mask.sum().item() / seconds


def their_sample(B: int, G: int, P: int, T: int, n_eos: int) -> float:
    """Tokens per second, up to the first EOS of each row, with it."""
    seconds, ids = timed(generate, *random_model(n_eos=n_eos), ["x" * P] * B, G, T)
    is_eos = (ids < n_eos).long()
    eos_before = is_eos.cumsum(1) - is_eos  # [N, T]
    return (eos_before == 0).sum().item() / seconds


def sample(repeats: int) -> None:
    for shape in (16, 8, 8, 32, 0), (16, 8, 8, 32, 8), (16, 8, 128, 32, 8), (1, 64, 512, 32, 0):
        B, G, P, T, n_eos = shape
        ends = ", 1 in 32 ends its row" if n_eos else ""  # 8 of 258 tokens
        what = f"sample, {B} x {G} completions of {T} tokens{ends}, prompts of {P}"
        sides = {"ours": (our_sample, *shape), "generate": (their_sample, *shape)}
        report(what, "tokens/s", take_turns(repeats, **sides))


def all_at_once(model, rollout):
    """The log-softmax of all logits, [N, P + T, V], and a gather."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
    return logprobs[:, -rollout.completion_ids.shape[1] :]


def resident(line: str) -> float:
    """VmRSS or VmHWM, the resident set of this process now or at its peak, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) / 1024


def forward_and_backward(function) -> tuple:
    """Seconds, MiB and the gradient of a function that gives log-probs."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model, _ = random_model(vocab_size=151_936, **sizes)
    N, P, T = 32, 16, 256
    ids = torch.randint(1000, (N, P + T))
    ones = torch.ones(N, P + T, dtype=torch.bool)
    rollout = common.Rollout(
        prompt_ids=ids[:, :P],
        prompt_mask=ones[:, :P],
        completion_ids=ids[:, P:],
        completion_mask=ones[:, P:],
        logprobs=torch.zeros(N, T),
        truncated=ones[:, 0],
        texts=[""] * N,
    )
    common.body_and_head(model)  # checked once per model
    before = resident("VmRSS")
    seconds, _ = timed(lambda: function(model, rollout).sum().backward())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return seconds, resident("VmHWM") - before, gradient.numpy()


def logprobs(repeats: int) -> None:
    ours = (forward_and_backward, common.completion_logprobs)
    results = take_turns(repeats, True, ours=ours, naive=(forward_and_backward, all_at_once))
    for i, unit in enumerate(("s", "MiB")):
        what = "logprobs, 32 x 256 tokens, vocabulary 151,936, forward and backward"
        report(what, unit, {name: [run[i] for run in runs] for name, runs in results.items()})
    ours, naive = (torch.tensor(runs[0][2]).double() for runs in results.values())
    print(f"the gradients differ by {(ours - naive).norm() / naive.norm():.1e} of their norm")


# --------------------------------------------------------------------------------------------------
# On a GPU: B, G, P, T as with GSM8K, or tiny
# --------------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEYS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
KEYS += ["num_key_value_heads", "vocab_size", "tie_word_embeddings"]
SHAPES = {
    "dry run": (64, 128, 2, 4, 2, 512, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}


def shaped_model(name: str, ends: bool = True):
    """Random weights in the shape of Qwen2.5; with `ends` one token in 256 ends a completion."""
    sizes = dict(zip(KEYS, SHAPES[name], strict=True))
    return random_model(DEVICE, sizes["vocab_size"] // 256 if ends else 0, **sizes)


def seconds_of(function, repeats: int = 1) -> float:
    """The mean over `repeats` calls, after one that is not counted."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    function()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - start) / repeats


def limits() -> tuple[float, float]:
    """Bytes per second that a copy reads and writes; operations per second of a bf16 product."""
    n, k = (2**30, 8192) if DEVICE == "cuda" else (2**20, 64)
    x = torch.empty(2, n, dtype=torch.uint8, device=DEVICE)
    a = torch.randn(k, k, dtype=torch.bfloat16, device=DEVICE)
    copy = seconds_of(lambda: x[0].copy_(x[1]), 10)
    return 2 * n / copy, 2 * k**3 / seconds_of(lambda: a @ a, 10)


def attempt(function, *args) -> list[str]:
    """The cells that function(*args) returns, and its peak memory; or its error."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return [*function(*args), f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"]
    except Exception as error:
        return ["out of memory" if "out of memory" in str(error) else f"{error!r:.80}"]


def precision(models: list[str], B: int, G: int, P: int, T: int) -> None:
    rows = [["model", "tokens", "mean", "std", "least", "greatest", "outside .8 to 1.2"]]
    prompts = get_prompts(make_task("add"), list(range(B)))
    loaded = {"tiny": common.load_model("tiny", DEVICE), models[0]: shaped_model(models[0])}
    for name, (model, tokenizer) in loaded.items():
        rollout = common.sample(model, tokenizer, prompts, G, T)
        scored = common.frozen_logprobs(model, rollout, 8192)
        ratio = (scored - rollout.logprobs)[rollout.completion_mask].double().exp()
        cells = [f"{x:.5f}" for x in (ratio.mean(), ratio.std(), ratio.min(), ratio.max())]
        outside = ((ratio - 1).abs() > 0.2).double().mean()
        rows.append([name, f"{len(ratio):,}", *cells, f"{outside:.2%}"])
    print(f"\nThe scorer's probability of a sampled token over the sampler's\n\n{markdown(rows)}")


def decode(models: list[str], B: int, G: int, P: int, T: int) -> None:
    prompts = [f"{i} ".ljust(P, "x") for i in range(B)]
    T = T // 4  # long enough
    bandwidth, _ = limits()

    def cells(name: str) -> list[str]:
        model, tokenizer = shaped_model(name, ends=False)
        tokens = B * G * T
        ours = tokens / seconds_of(lambda: common.sample(model, tokenizer, prompts, G, T))
        theirs = tokens / seconds_of(lambda: generate(model, tokenizer, prompts, G, T))
        c, weights = model.config, sum(p.numel() for p in model.parameters())
        head_size = c.hidden_size // c.num_attention_heads
        cache = 2 * c.num_hidden_layers * c.num_key_value_heads * head_size  # of a token
        limit = B * G * bandwidth / 2 / (weights + B * G * (P + T / 2) * cache)  # bf16: 2 bytes
        return [f"{ours:,.0f}", f"{theirs:,.0f}", f"{limit:,.0f}", f"{ours / limit:.1%}"]

    rows = [["model", "sample", "generate", "limit", "share of it", "GiB"]]
    rows += [[name, *attempt(cells, name)] for name in models]
    print(f"\n{B} x {G} completions of {T} tokens, prompts of {P}: tokens per second. The limit: a")
    print(f"bf16 copy of the weights, and the cache, read per token at {bandwidth:.3g} bytes/s\n")
    print(markdown(rows), flush=True)


def updates(models: list[str], B: int, G: int, P: int, T: int) -> None:
    prompts = [f"{i} ".ljust(P, "x") for i in range(B)]
    _, peak = limits()
    rows = [["model", "checkpointing", "--micro-batch-tokens", "seconds", "utilisation", "GiB"]]
    for name in models[:2]:
        model, tokenizer = shaped_model(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        rollout = common.sample(model, tokenizer, prompts, G, T)
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
                model.train()
            for tokens in (2048, 8192, 32_768):
                cells = attempt(update_cells, model, optimizer, rollout, G, tokens, peak)
                rows.append([name, str(checkpointing), str(tokens), *cells])
        del model, optimizer, rollout  # before the next model is made
    print(f"\n{B} x {G} completions of up to {T} tokens, prompts of {P}, all groups valid. A bf16")
    print(f"matrix product does {peak:.3g} FLOP/s; utilisation: 6 per weight and token, of that\n")
    print(markdown(rows), flush=True)


def update_cells(model, optimizer, rollout, G: int, tokens: int, peak: float) -> list[str]:
    optimizer.zero_grad()  # what an update that ran out of memory has left
    took = seconds_of(lambda: update(model, optimizer, rollout, G, tokens))
    c = model.config
    head = c.vocab_size * c.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head * (1 if c.tie_word_embeddings else 2)
    completions = rollout.completion_mask.sum().item()  # the head is for them alone
    read = completions + rollout.prompt_mask[::G].sum().item()  # each prompt once
    return [f"{took:.2f}", f"{6 * (body * read + head * completions) / took / peak:.1%}"]


def update(model, optimizer, rollout, G: int, micro_batch_tokens: int) -> None:
    """Part 3 of a step of gpg.py, with random rewards."""
    advantages = gpg.group_advantages(torch.rand(len(rollout.texts) // G, G)).flatten()  # [N]
    advantages, total = advantages.to(DEVICE), rollout.completion_mask.sum().item()
    for rows in common.micro_batches(rollout, micro_batch_tokens):
        mb = rollout.select(rows)
        logprobs = common.completion_logprobs(model, mb)
        gpg.gpg_loss(logprobs, advantages[rows], mb.completion_mask, 1.0, total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


ANYWHERE = {"step": step, "sample": sample, "logprobs": logprobs}
ON_A_GPU = {"precision": precision, "decode": decode, "update": updates}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("benchmark.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    choices = [*ANYWHERE, *ON_A_GPU, []]  # []: none of them is named
    parser.add_argument("parts", nargs="*", choices=choices, help="default: all that run here")
    parser.add_argument("--repeats", type=positive_int, default=5, help="turns (default: 5)")
    parser.add_argument("--dry-run", action="store_true", help="the GPU's parts, tiny, anywhere")
    args = parser.parse_args(argv)
    gpu = args.dry_run or torch.cuda.is_available()
    parts = args.parts or [*ANYWHERE, *(ON_A_GPU if gpu else [])]
    if set(parts) & set(ON_A_GPU) and not gpu:
        raise UserError("no CUDA GPU here; --dry-run tries these parts on the CPU")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}", flush=True)
    models, sizes = ["0.5B", "1.5B", "7B"], (16, 8, 150, 512)
    if args.dry_run:
        models, sizes = ["dry run"], (2, 2, 16, 16)
    for part in parts:
        if part in ANYWHERE:
            ANYWHERE[part](args.repeats)
        else:
            ON_A_GPU[part](models, *sizes)


if __name__ == "__main__":
    with plain_errors("benchmark.py"):
        main()

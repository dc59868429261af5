"""What only a GPU can tell, measured in one go: `python extras/gpu.py --out gpu.md`.

Writes Markdown to stdout and, line by line, to --out; planned for 25 minutes on an H100. A part
that fails says so, and the next one begins. The models have random weights in the shapes of
Qwen2.5, so nothing is downloaded, and one token in 256 ends a completion.

    tests      the test suite, with the tests marked `cuda`
    precision  the sampler's log-probs against the scorer's; do weights move at a rate of 1e-6?
    sampling   tokens per second beside generate's, and beside what the memory bandwidth allows
    update     model FLOPs utilisation against micro-batches and checkpointing; kernels, padding
    step       seconds and memory of a step of the README's GSM8K commands
    advice     is the advice of the out-of-memory message good?
    default    `python gpg.py`
"""

import argparse
import contextlib
import gc
import io
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import gymnasium
import torch
import transformers
from benchmark import update
from shared import read_metrics
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import gpg  # noqa: E402
from tasks import TextTask  # noqa: E402
from tasks.tiny import tiny_tokenizer  # noqa: E402

KEYS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
KEYS += ["num_key_value_heads", "vocab_size", "tie_word_embeddings"]
QWEN = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}
DRY_RUN = (64, 128, 2, 4, 2, 512, True)
COMPUTED = {("0.5B", False): 22, ("1.5B", True): 28}  # GiB at the peak, in the README
DATA_SHEET = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16

args = argparse.Namespace()  # flags, shapes and limits; `main` fills it


class Noise(TextTask):
    """Prompts as long as GSM8K's; rewards by chance, so that every group is valid."""

    def problem(self, index):
        return f"{index} ".ljust(args.P, "x"), ""

    def reward(self, completion, answer):
        return random.random()


def say(text: str) -> None:
    print(text, flush=True)
    if args.file:
        print(text, file=args.file, flush=True)


def row(*cells) -> None:
    say(f"| {' | '.join(map(str, cells))} |")


def head(text: str, *cells) -> None:
    say(f"{text}\n")
    row(*cells)
    row(*["---"] * len(cells))


def attempt(function, *arguments) -> str:
    """What function(*arguments) returns, or its error, as the cell of a table."""
    free()
    try:
        return str(function(*arguments))
    except Exception as error:
        text = "out of memory" if "out of memory" in str(error) else f"{error!r:.80}"
        return " ".join(text.replace("|", " ").split())


def free() -> None:
    """Give back what nobody holds, and measure the peak from here on."""
    if args.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else math.nan


def seconds(function, repeats: int = 1) -> float:
    """Of function(), after a first call that is not counted."""
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    function()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - start) / repeats


def random_model(name: str):
    config = Qwen2Config(**dict(zip(KEYS, args.shapes[name], strict=True)))
    config.eos_token_id = config.bos_token_id = None
    with torch.device(args.device):
        model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(range(config.vocab_size // 256))
    return model, tiny_tokenizer()


def prompts(task: str, n: int) -> list[str]:
    return common.get_prompts(common.make_task(task), range(n))


# ---- the parts ----


def tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only" if args.dry_run else "-rs"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    lines = (result.stdout + result.stderr).strip().splitlines()
    say("\n".join(["```", *lines[-15:], "```"]))


def precision() -> None:
    head(
        "The scorer's probability of a sampled token by the sampler's, before any update:",
        "model", "tokens", "mean", "standard deviation", "least", "greatest", "outside .8 to 1.2",
    )  # fmt: skip
    for name in ("tiny", "0.5B"):
        loaded = common.load_model(name, args.device) if name == "tiny" else random_model(name)
        rollout = common.sample(*loaded, prompts("add", args.B), args.G, args.T)
        logprobs = common.frozen_logprobs(loaded[0], rollout, 8192)
        ratio = (logprobs - rollout.logprobs)[rollout.completion_mask].double().exp()
        figures = [f"{x(ratio):.5f}" for x in (torch.mean, torch.std, torch.amin, torch.amax)]
        row(name, len(ratio), *figures, f"{((ratio - 1).abs() > 0.2).double().mean():.2%}")
    parameters = list(loaded[0].parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
    update(loaded[0], optimizer, rollout, torch.rand(args.B, args.G), 8192)
    pairs, total = list(zip(before, parameters, strict=True)), sum(p.numel() for p in before)
    fp32 = sum((a != b).sum().item() for a, b in pairs) / total
    bf16 = sum((a.bfloat16() != b.bfloat16()).sum().item() for a, b in pairs) / total
    say(f"\nOne step at 1e-6 changes {fp32:.1%} of the fp32 weights; rounded to bf16, {bf16:.1%}.")


def sampling() -> None:
    head(
        f"8 x 8 completions of {args.T // 4} tokens, prompts of {args.P}, tokens per second. The "
        "limit: a bf16 copy of the weights, and the keys and values, are read once per token.",
        "model", "sample", "generate", "generate, static cache", "limit", "share of it", "GiB",
    )  # fmt: skip
    for name in args.shapes:
        row(name, attempt(sampling_cells, name, 8, 8, args.T // 4))


def sampling_cells(name: str, B: int, G: int, T: int) -> str:
    model, tokenizer = random_model(name)
    model.generation_config.eos_token_id = tokenizer.eos_token = None  # all of length T
    texts = prompts("Noise-v0", B)
    ids, mask = common.encode_prompts(model, tokenizer, texts, room=T)
    flags = {"max_new_tokens": T, "do_sample": True, "top_k": 0, "num_return_sequences": G}
    flags |= {"attention_mask": mask.long(), "pad_token_id": 257}

    @torch.no_grad()
    def generate(cache: str) -> None:
        with common.autocast(model.device):
            model.generate(ids, cache_implementation=cache, **flags)

    def rate(cache: str) -> str:
        return f"{B * G * T / seconds(lambda: generate(cache)):,.0f}"

    ours = B * G * T / seconds(lambda: common.sample(model, tokenizer, texts, G, T))
    memory = peak_gib()
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    cache = 2 * c.num_hidden_layers * c.hidden_size * c.num_key_value_heads / c.num_attention_heads
    cache *= B * G * (args.P + T / 2)  # elements, on average
    limit = B * G * args.bandwidth / (2 * (weights + cache))
    theirs = f"{attempt(rate, 'dynamic')} | {attempt(rate, 'static')}"
    return f"{ours:,.0f} | {theirs} | {limit:,.0f} | {ours / limit:.1%} | {memory:.1f}"


def updates() -> None:
    head(
        f"{args.B} x {args.G} completions of up to {args.T} tokens, prompts of {args.P}, all "
        "groups valid; with the step of the optimizer. The operations are 6 per weight and token "
        "and those of attention, without what checkpointing computes again.",
        "model", "checkpointing", "--micro-batch-tokens", "seconds", "utilisation", "GiB",
    )  # fmt: skip
    notes = [updates_of(name) for name in ("0.5B", "1.5B")]
    say("\n" + "\n\n".join(notes))


def updates_of(name: str) -> str:
    free()
    model, tokenizer = random_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    texts = prompts("Noise-v0", args.B)
    rollout = common.sample(model, tokenizer, texts, args.G, args.T)
    rewards, operations = torch.rand(args.B, args.G), model_flops(model, rollout)

    def cells(tokens: int) -> str:
        optimizer.zero_grad()  # what an update that ran out of memory has left
        took = seconds(lambda: update(model, optimizer, rollout, rewards, tokens))
        return f"{took:.2f} | {operations / took / args.flops:.1%} | {peak_gib():.1f}"

    for tokens in (2048, 8192, 32_768):
        row(name, False, tokens, attempt(cells, tokens))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for tokens in (2048, 8192, 32_768):
        row(name, True, tokens, attempt(cells, tokens))
    model.eval()
    optimizer.zero_grad()
    free()
    with torch.profiler.profile() as profile:
        update(model, optimizer, rollout, rewards, 8192)
    kind, column = ("CUDA", "device") if args.device == "cuda" else ("CPU", "cpu")
    times = {
        event.key: getattr(event, f"self_{column}_time_total")
        for event in profile.key_averages()
        if event.device_type.name == kind  # on a GPU the kernels, not what has started them
    }
    longest = sorted(times, key=times.get, reverse=True)
    attention = [k for k in longest if any(x in k for x in ("attention", "fmha", "flash"))]
    shares = [
        f"- {times[key] / sum(times.values()):.1%} `{key[:120]}`"
        for key in dict.fromkeys(longest[:8] + attention[:4])
    ]
    lengths = rollout.prompt_mask.sum(1) + rollout.completion_mask.sum(1)
    batches = [lengths[rows] for rows in common.micro_batches(rollout, 8192)]
    padding = 1 - lengths.sum().item() / sum(len(x) * x.amax().item() for x in batches)
    text = f"{name}: {padding:.1%} of micro-batches of 8192 are padding; attention is "
    text += f"{model.config._attn_implementation}; without checkpointing, the time goes to\n"
    return "\n".join([text, *shares])


def model_flops(model, rollout) -> float:
    """Of forward and backward pass: every prompt once, the head for the completions alone."""
    c = model.config
    head = c.vocab_size * c.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head * (1 if c.tie_word_embeddings else 2)
    completions = rollout.completion_mask.sum(1)
    tokens = rollout.prompt_mask[:: args.G].sum() + completions.sum()
    lengths = rollout.prompt_mask.sum(1) + completions
    attention = c.num_hidden_layers * c.hidden_size * (lengths**2).sum()  # causal: 6, not 12
    return 6 * (body * tokens + head * completions.sum() + attention).item()


def trained(size: str, *flags) -> dict:
    """Two steps of gpg.py on noise, without evaluation and checkpoints -> the metrics."""
    directory = Path(args.folder) / size
    if not directory.exists():
        for part in random_model(size):
            part.save_pretrained(directory)
        del part
        free()
    out = tempfile.mkdtemp(dir=args.folder)
    command = f"--model {directory} --task Noise-v0 --steps 2 --prompts {args.B} --out {out}"
    command += f" --group-size {args.G} --max-new-tokens {args.T} --device {args.device}"
    with (
        contextlib.redirect_stdout(sys.stderr),
        mock.patch.object(common.Run, "save", lambda run: None),
        mock.patch.object(common, "evaluate", lambda *_: {}),
        mock.patch.object(common, "draw_curves"),
    ):
        gpg.train(gpg.parse_args([*command.split(), *flags]))
    return read_metrics(out)


def step() -> None:
    head(
        "The second step of gpg.py, with sampling; GiB at the peak, measured and as computed.",
        "model", "checkpointing", "seconds", "completion tokens/s", "GiB", "computed",
    )  # fmt: skip

    def cells(size: str, *flags) -> str:
        metrics = trained(size, *flags)
        took, rate = metrics["seconds"][-1], metrics["tokens_per_second"][-1]
        return f"{took:.1f} | {rate:,.0f} | {peak_gib():.1f}"

    for size in ("0.5B", "1.5B"):
        for checkpointing in (False, True):
            flags = ["--grad-checkpointing"] * checkpointing
            computed = COMPUTED.get((size, checkpointing), "")
            row(size, checkpointing, attempt(cells, size, *flags), computed)


def advice() -> None:
    head("0.5B with 16 GiB, and again with each advice of the error message:", "flags", "outcome")

    def outcome(flags: str) -> str:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), common.plain_errors("gpg.py"):
                trained("0.5B", *flags.split())
        except SystemExit:
            return errors.getvalue().split("gpg.py: ")[-1].splitlines()[0]
        return f"done, {peak_gib():.1f} GiB"

    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 16 * 2**30 / total))
    all_flags = ["", "--micro-batch-tokens 2048", "--prompts 2", "--max-new-tokens 128"]
    for flags in [*all_flags, "--grad-checkpointing"]:
        row(flags or "none", attempt(outcome, flags))
    if args.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


def default() -> None:
    out = tempfile.mkdtemp(dir=args.folder)
    flags = ["--steps", "2", "--eval-problems", "4"] if args.dry_run else []
    command = [sys.executable, ROOT / "gpg.py", *flags, "--out", out]
    result = subprocess.run(command, capture_output=True, text=True, timeout=540)
    say("\n".join(["```", result.stdout or result.stderr[-1000:], "```\n"]))
    metrics = read_metrics(out)
    curve = zip(metrics["step"], metrics["eval_accuracy"], strict=True)
    say("Accuracy: " + ", ".join(f"step {s}: {a:.3f}" for s, a in curve if not math.isnan(a)))


PARTS = {"tests": tests, "precision": precision, "sampling": sampling, "update": updates}
PARTS |= {"step": step, "advice": advice, "default": default}


def limits() -> None:
    """Measure what the device can do, and write it down with its name."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, a dry run"
    n, k = (2**20, 64) if args.dry_run else (2**30, 8192)
    x = torch.empty(2, n, dtype=torch.uint8, device=args.device)
    a = torch.randn(k, k, dtype=torch.bfloat16, device=args.device)
    args.bandwidth = 2 * n / seconds(lambda: x[0].copy_(x[1]), 10)  # it reads and writes
    matmul = 2 * k**3 / seconds(lambda: a @ a, 10)
    args.flops = next((peak for name, peak in DATA_SHEET.items() if name in device), matmul)
    say(
        f"# {device}\n\ntorch {torch.__version__}, transformers {transformers.__version__}, "
        f"{os.cpu_count()} CPU cores. A copy moves {args.bandwidth / 1e12:.2f} TB/s, a bf16 matrix "
        f"product does {matmul / 1e12:.0f} TFLOP/s; utilisation is of {args.flops / 1e12:.0f}."
    )


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser("gpu.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--out", help="write the Markdown to this file, too")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; without a GPU, too")
    vars(args).update(vars(parser.parse_args(argv)))
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {min(unknown)}")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.dry_run:
        raise common.UserError("no CUDA GPU here; --dry-run tries the script itself on the CPU")
    args.shapes = dict.fromkeys(QWEN, DRY_RUN) if args.dry_run else QWEN
    args.B, args.G, args.P, args.T = (2, 2, 16, 16) if args.dry_run else (16, 8, 150, 512)
    gymnasium.register("Noise-v0", Noise)
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        args.folder = stack.enter_context(tempfile.TemporaryDirectory())
        args.file = args.out and stack.enter_context(open(args.out, "w", encoding="utf-8"))
        limits()
        for name in args.parts or PARTS:
            say(f"\n## {name}\n")
            start = time.perf_counter()
            try:
                PARTS[name]()
            except Exception as error:
                traceback.print_exc()
                say(f"\n**failed**: {error!r:.500}")
            free()
            say(f"\n({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    with common.plain_errors("gpu.py"):
        main()

"""Speed and memory, measured beside what one would use instead: `python extras/benchmark.py`.

On any machine, each side in a process of its own, in turns: the machine may be shared and slow, the
ratio of the medians is what counts. Memory is the peak resident set above the loaded model (Linux).

    step       a GPG step of the default run, against TRL's GRPOTrainer if it is installed
    sample     sampling, against Hugging Face generate
    logprobs   log-probs with a large vocabulary, against logits as a whole

On a CUDA GPU, with random weights in the shapes of Qwen2.5; --dry-run tries them on a CPU:

    precision  the scorer's probability of a sampled token by the sampler's, under bf16
    decode     tokens per second of `sample` and `generate`, and the limit of the memory bandwidth
    update     seconds, utilisation and memory of an update, by micro-batch and checkpointing

Seconds and memory of a whole step on a GPU: `python gpg.py --steps 3` and its summary.
"""

import argparse
import concurrent.futures
import functools
import gc
import importlib.util
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gymnasium  # noqa: E402
import torch  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import common  # noqa: E402
import gpg  # noqa: E402
from run import Parser, plain_errors, positive_int  # noqa: E402
from tasks import TextTask, UserError, get_prompts, get_rewards, is_correct, make_task  # noqa: E402
from tasks.prompts import encode_prompts  # noqa: E402
from tasks.tiny import tiny_tokenizer  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Two sides in turns, on any machine
# --------------------------------------------------------------------------------------------------


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


def versus(ours: float, theirs: float, unit: str, decimals: int) -> str:
    return f"{ours:.{decimals}f} and {theirs:.{decimals}f} {unit} (ratio {ours / theirs:.2f})"


def random_model(device: str = "cpu", **sizes):
    """A Qwen2 with random weights, and a tokenizer, one token a byte, without an EOS."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258}
    config |= {"eos_token_id": None, "bos_token_id": None, "max_position_embeddings": 4096}
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**config | sizes)).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return model, tokenizer


# ---- a training step ----

STEPS = 8  # in a turn


@functools.cache
def our_trainer():
    task = make_task("add")
    model, tokenizer = common.load_model("tiny", "cpu", task)
    return task, model, tokenizer, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def update(model, optimizer, rollout, rewards, micro_batch_tokens=2048) -> None:
    """Parts 2 and 3 of gpg.train after one round. rewards [B, G]"""
    valid, alpha = gpg.is_valid(rewards), gpg.gradient_scale(rewards)
    if not valid.any():
        return
    live = rollout.select(valid.repeat_interleave(rewards.shape[1]).to(model.device))
    advantages = gpg.group_advantages(rewards[valid]).flatten().to(model.device)
    total = rollout.completion_mask.sum().item()
    for rows in common.micro_batches(live, micro_batch_tokens):
        mb = live.select(rows)
        logprobs = common.completion_logprobs(model, mb)
        gpg.gpg_loss(logprobs, advantages[rows], mb.completion_mask, alpha, total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()


def our_steps() -> float:
    """The median seconds of STEPS steps of the default run."""
    task, model, tokenizer, optimizer = our_trainer()

    def step(problems):
        rollout = common.sample(model, tokenizer, get_prompts(task, problems), 8, 48)
        rewards, _ = get_rewards(task, problems, rollout.texts)
        update(model, optimizer, rollout, rewards)

    batches = [torch.randint(1024, (16,)).tolist() for _ in range(STEPS)]
    return statistics.median(timed(step, problems)[0] for problems in batches)


@functools.cache
def trl_trainer():
    """TRL's GRPOTrainer on the same model directory, prompts, group size, lengths; fp32."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    task = make_task("add")
    prompts = get_prompts(task, list(range(1024)))
    answers = {prompt: task.unwrapped.problem(i)[1] for i, prompt in enumerate(prompts)}

    def reward(prompts, completions, **_):
        pairs = zip(prompts, completions, strict=True)
        return [float(is_correct(completion, answers[prompt])) for prompt, completion in pairs]

    same = {"num_generations": 8, "per_device_train_batch_size": 128, "max_completion_length": 48}
    same |= {"beta": 0.0, "learning_rate": 1e-4, "scale_rewards": "none", "num_iterations": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    quiet |= {"disable_tqdm": True, "output_dir": tempfile.mkdtemp(), "max_steps": 10**6}
    on_cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    seconds = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            seconds.append(time.perf_counter() - self.start)
            control.should_training_stop = len(seconds) % STEPS == 0

    model, tokenizer = common.load_model("tiny", "cpu", task)
    trainer = GRPOTrainer(
        model,
        reward,
        args=GRPOConfig(**same, **quiet, **on_cpu),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, seconds


def trl_steps() -> float:
    trainer, seconds = trl_trainer()
    trainer.train()
    return statistics.median(seconds[-STEPS:])


def step(repeats: int) -> None:
    sides = {"ours": (our_steps,)}
    if importlib.util.find_spec("trl"):
        sides["theirs"] = (trl_steps,)
    results = {name: statistics.median(x) for name, x in take_turns(repeats, **sides).items()}
    text = f"{results['ours']:.3f} s (TRL is not installed)"
    if "theirs" in results:
        text = f"ours and TRL's: {versus(results['ours'], results['theirs'], 's', 3)}"
    print(f"step, {text}", flush=True)


# ---- sampling ----


@functools.cache
def sampler(ends: bool):
    """A model of 4M parameters; with `ends` a token in 32 ends its row."""
    model, tokenizer = random_model(hidden_size=256, intermediate_size=768, num_hidden_layers=5)
    model.generation_config.eos_token_id = list(range(8)) if ends else None
    return model, tokenizer


def our_sample(B: int, G: int, P: int, T: int, ends: bool) -> float:
    """Tokens per second."""
    seconds, rollout = timed(common.sample, *sampler(ends), ["x" * P] * B, G, T)
    return rollout.completion_mask.sum().item() / seconds


@torch.no_grad()
def their_sample(B: int, G: int, P: int, T: int, ends: bool) -> float:
    model, tokenizer = sampler(ends)
    batch = tokenizer(["x" * P] * B, return_tensors="pt")
    flags = {"max_new_tokens": T, "do_sample": True, "top_k": 0, "num_return_sequences": G}
    seconds, ids = timed(lambda: model.generate(**batch, **flags, pad_token_id=257)[:, P:])
    # The tokens up to the first end, with it: those before which there is no end.
    is_end = (ids < 8) & torch.tensor(ends)
    return (is_end.cumsum(1) - is_end.long() == 0).sum().item() / seconds


def sample(repeats: int) -> None:
    shapes = [(16, 8, 8, 32, False), (16, 8, 8, 32, True), (16, 8, 128, 32, True)]
    for shape in [*shapes, (1, 64, 512, 32, False)]:
        results = take_turns(repeats, ours=(our_sample, *shape), theirs=(their_sample, *shape))
        rates = [statistics.median(x) for x in results.values()]
        B, G, P, T, ends = shape
        print(
            f"sample, 4.1M parameters, {B} x {G} completions of {T} tokens"
            f"{', 1 in 32 ends its row' if ends else ''}, prompts of {P}: ours and generate's: "
            f"{versus(*rates, 'tokens/s', 0)}",
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
    model, _ = random_model(
        vocab_size=151_936, hidden_size=64, intermediate_size=128, num_hidden_layers=2
    )
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
    common.body_and_head(model)  # tried once per model
    before = resident("VmRSS")
    function = naive_logprobs if naive else common.completion_logprobs
    seconds, _ = timed(lambda: function(model, rollout).sum().backward())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"seconds": seconds, "MiB": resident("VmHWM") - before, "gradient": gradient.numpy()}


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


# --------------------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------------------

KEYS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
KEYS += ["num_key_value_heads", "vocab_size", "tie_word_embeddings"]
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}
DRY_RUN = (64, 128, 2, 4, 2, 512, True)
DATA_SHEET = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16
B, G, P, T = 16, 8, 150, 512  # prompts and completions as long as GSM8K's
gpu = argparse.Namespace(device="cuda", dry_run=False, flops=math.nan, bandwidth=math.nan)


class Noise(TextTask):
    """Prompts of P tokens; rewards by chance, so that every group is valid."""

    def problem(self, index):
        return f"{index} ".ljust(P, "x"), ""

    def reward(self, completion, answer):
        return random.random()


def row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(text: str, *cells) -> None:
    print(f"\n{text}\n")
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
    gc.collect()
    if gpu.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if gpu.device == "cuda" else math.nan


def seconds(function, repeats: int = 1) -> float:
    """Of function(), after a first call that is not counted."""
    synchronize = torch.cuda.synchronize if gpu.device == "cuda" else lambda: None
    function()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - start) / repeats


def shaped_model(name: str, ends: bool = True):
    """Random weights in the shape of Qwen2.5; with `ends` one token in 256 ends a completion."""
    shape = DRY_RUN if gpu.dry_run else SHAPES[name]
    model, tokenizer = random_model(gpu.device, **dict(zip(KEYS, shape, strict=True)))
    model.generation_config.eos_token_id = list(range(shape[5] // 256)) if ends else None
    return model, tokenizer


def noise_prompts(n: int) -> list[str]:
    return get_prompts(make_task("Noise-v0"), list(range(n)))


def measure_limits() -> None:
    """What the device can do: bytes per second of a copy, operations per second of a product."""
    name = torch.cuda.get_device_name() if gpu.device == "cuda" else "CPU, a dry run"
    n, k = (2**20, 64) if gpu.dry_run else (2**30, 8192)
    x = torch.empty(2, n, dtype=torch.uint8, device=gpu.device)
    a = torch.randn(k, k, dtype=torch.bfloat16, device=gpu.device)
    gpu.bandwidth = 2 * n / seconds(lambda: x[0].copy_(x[1]), 10)  # it reads and writes
    product = 2 * k**3 / seconds(lambda: a @ a, 10)
    gpu.flops = next((peak for key, peak in DATA_SHEET.items() if key in name), product)
    print(
        f"# {name}\n\nA copy moves {gpu.bandwidth / 1e12:.2f} TB/s, a bf16 matrix product does "
        f"{product / 1e12:.0f} TFLOP/s; utilisation is of {gpu.flops / 1e12:.0f}."
    )


def precision(repeats: int) -> None:
    head(
        "The scorer's probability of a sampled token by the sampler's, before any update:",
        *("model", "tokens", "mean", "std", "least", "greatest", "outside .8 to 1.2"),
    )
    for name in ("tiny", "0.5B"):
        model, tokenizer = (
            common.load_model(name, gpu.device) if name == "tiny" else shaped_model(name)
        )
        prompts = get_prompts(make_task("add"), list(range(B)))
        rollout = common.sample(model, tokenizer, prompts, G, T)
        logprobs = common.frozen_logprobs(model, rollout, 8192)
        ratio = (logprobs - rollout.logprobs)[rollout.completion_mask].double().exp()
        numbers = [f"{x(ratio):.5f}" for x in (torch.mean, torch.std, torch.amin, torch.amax)]
        row(name, len(ratio), *numbers, f"{((ratio - 1).abs() > 0.2).double().mean():.2%}")
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
    update(model, optimizer, rollout, torch.rand(B, G), 8192)
    pairs, total = list(zip(before, parameters, strict=True)), sum(p.numel() for p in before)
    fp32 = sum((a != b).sum().item() for a, b in pairs) / total
    bf16 = sum((a.bfloat16() != b.bfloat16()).sum().item() for a, b in pairs) / total
    print(f"\nOne step at 1e-6 moves {fp32:.1%} of the fp32 weights; rounded to bf16, {bf16:.1%}.")


def decode(repeats: int) -> None:
    head(
        f"8 x 8 completions of {T // 4} tokens, prompts of {P}, tokens per second. The limit: a "
        "bf16 copy of the weights, and the keys and values, are read once per token.",
        *("model", "sample", "generate", "with a static cache", "limit", "share of it", "GiB"),
    )
    for name in SHAPES:
        row(name, attempt(decode_cells, name))


def decode_cells(name: str) -> str:
    model, tokenizer = shaped_model(name, ends=False)
    prompts, length, N = noise_prompts(8), T // 4, 64
    ids, mask, _ = encode_prompts(model, tokenizer, prompts, length)
    flags = {"max_new_tokens": length, "do_sample": True, "top_k": 0, "num_return_sequences": 8}
    flags |= {"attention_mask": mask.long(), "pad_token_id": 257}

    def rate(cache: str) -> str:
        with torch.no_grad(), common.autocast(model.device):
            took = seconds(lambda: model.generate(ids, cache_implementation=cache, **flags))
        return f"{N * length / took:,.0f}"

    ours = N * length / seconds(lambda: common.sample(model, tokenizer, prompts, 8, length))
    memory = peak_gib()
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    cache = 2 * c.num_hidden_layers * c.hidden_size * c.num_key_value_heads / c.num_attention_heads
    cache *= N * (P + length / 2)  # elements, on average
    limit = N * gpu.bandwidth / (2 * (weights + cache))
    theirs = f"{attempt(rate, 'dynamic')} | {attempt(rate, 'static')}"
    return f"{ours:,.0f} | {theirs} | {limit:,.0f} | {ours / limit:.1%} | {memory:.1f}"


def updates(repeats: int) -> None:
    head(
        f"{B} x {G} completions of up to {T} tokens, prompts of {P}, all groups valid; with the "
        "optimizer's step. Operations: 6 per weight and token and those of attention, without what "
        "checkpointing computes again.",
        *("model", "checkpointing", "--micro-batch-tokens", "seconds", "utilisation", "GiB"),
    )
    for name in ("0.5B", "1.5B"):
        free()
        model, tokenizer = shaped_model(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        rollout = common.sample(model, tokenizer, noise_prompts(B), G, T)

        def cells(tokens: int, model=model, optimizer=optimizer, rollout=rollout) -> str:
            optimizer.zero_grad()  # what an update that ran out of memory has left
            took = seconds(lambda: update(model, optimizer, rollout, torch.rand(B, G), tokens))
            use = model_flops(model, rollout) / took / gpu.flops
            return f"{took:.2f} | {use:.1%} | {peak_gib():.1f}"

        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
                model.train()
            for tokens in (2048, 8192, 32_768):
                row(name, checkpointing, tokens, attempt(cells, tokens))


def model_flops(model, rollout) -> float:
    """Of forward and backward pass: every prompt once, the head for the completions alone."""
    c = model.config
    head = c.vocab_size * c.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head * (1 if c.tie_word_embeddings else 2)
    completions = rollout.completion_mask.sum(1)
    tokens = rollout.prompt_mask[::G].sum() + completions.sum()
    lengths = rollout.prompt_mask.sum(1) + completions
    attention = c.num_hidden_layers * c.hidden_size * (lengths**2).sum()  # causal: 6, not 12
    return 6 * (body * tokens + head * completions.sum() + attention).item()


ANYWHERE = {"step": step, "sample": sample, "logprobs": logprobs}
ON_A_GPU = {"precision": precision, "decode": decode, "update": updates}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("benchmark.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    choices = [*ANYWHERE, *ON_A_GPU]
    parser.add_argument("parts", nargs="*", choices=[*choices, []], help="default: all that can be")
    parser.add_argument("--repeats", type=positive_int, default=5, help="turns (default: 5)")
    parser.add_argument("--dry-run", action="store_true", help="the GPU's parts, tiny, on a CPU")
    args = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    gpu.device, gpu.dry_run = "cuda" if has_gpu else "cpu", args.dry_run
    if args.dry_run:
        globals().update(B=2, G=2, P=16, T=16)
    parts = args.parts or [*ANYWHERE, *(ON_A_GPU if has_gpu or args.dry_run else [])]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    if set(parts) & set(ON_A_GPU):
        if not has_gpu and not args.dry_run:
            raise UserError("no CUDA GPU here; --dry-run tries these parts on the CPU")
        gymnasium.register("Noise-v0", Noise)
        torch.manual_seed(0)
        measure_limits()
    for name in parts:
        (ANYWHERE | ON_A_GPU)[name](args.repeats)


if __name__ == "__main__":
    with plain_errors("benchmark.py"):
        main()

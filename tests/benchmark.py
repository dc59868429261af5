"""Speed and memory, measured beside what one would use instead: `python tests/benchmark.py`.

Both sides run in turn in one process, and the ratio of their medians is printed: the machine may be
shared and slow, the ratio is what counts. Memory is the growth of the peak resident set of a
process of its own (CPU). TRL is measured where it is installed, and is no requirement.

    step      a GPG step of the default run, against TRL's GRPOTrainer; also with dead groups
    sample    sampling, against Hugging Face generate
    logprobs  log-probs with a large vocabulary, against logits as a whole
    start     from the command to --help, and to the first step
    growth    time and memory of a step against G, T and B
"""

import argparse
import json
import resource
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


def alternate(sides: dict, repeats: int) -> dict[str, float]:
    """The median seconds of each side, after one round that is not counted."""
    times = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_growth(name: str, *numbers: int) -> dict:
    """What child(name) measures, in a process of its own."""
    command = [sys.executable, __file__, "child", name, *map(str, numbers)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def peak() -> float:
    """The peak resident set of this process so far, in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident() -> float:
    """The resident set of this process now, in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def random_qwen2(**sizes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258}
    config |= {"eos_token_id": None, "pad_token_id": 257, "max_position_embeddings": 1024}
    model = Qwen2ForCausalLM(Qwen2Config(**config | sizes)).eval()
    model.generation_config.eos_token_id = None
    tokenizer = common.tiny_tokenizer()
    tokenizer.eos_token = None
    return model, tokenizer


# ---- a training step ----


def update(model, optimizer, rollout, rewards) -> None:
    """Parts 2 and 3 of gpg.train after one round. rewards [B, G]"""
    valid, alpha = gpg.is_valid(rewards), gpg.gradient_scale(rewards)
    live = rollout.rows(valid.repeat_interleave(rewards.shape[1]))
    advantages = gpg.group_advantages(rewards[valid]).flatten()
    total = rollout.completion_mask.sum().item()
    for rows in common.micro_batches(live, gpg.TINY["micro_batch_tokens"]):
        mb = live.rows(rows)
        logprobs = common.completion_logprobs(model, mb)
        gpg.gpg_loss(logprobs, advantages[rows], mb.completion_mask, alpha, total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def our_step(model, tokenizer, optimizer, task, problems, dead) -> None:
    """A step of the default run; the groups `dead` get equal rewards."""
    prompts = common.get_prompts(task, problems)
    rollout = common.sample(model, tokenizer, prompts, 8, 48)
    rewards, _ = common.get_rewards(task, problems, rollout.texts)
    rewards[list(dead)] = 0.0
    update(model, optimizer, rollout, rewards)


def trl_trainer(directory, task, dead_share: float, out: str):
    """TRL's GRPOTrainer on the same model directory, prompts, group size, lengths; fp32."""
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    problems = list(range(1024))
    prompts = common.get_prompts(task, problems)
    answers = {prompt: task.unwrapped.problem(i)[1] for i, prompt in enumerate(prompts)}
    dead = {prompt for i, prompt in enumerate(prompts) if i % 2 < 2 * dead_share}

    def reward(prompts, completions, **_):
        return [
            0.0 if p in dead else float(common.is_correct(c, answers[p]))
            for p, c in zip(prompts, completions, strict=True)
        ]

    import datasets

    config = GRPOConfig(
        output_dir=out, per_device_train_batch_size=128, num_generations=8, beta=0.0,
        max_completion_length=48, learning_rate=1e-4, max_steps=10**6, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, scale_rewards="none",
        logging_strategy="no", gradient_checkpointing=False, num_iterations=1,
    )  # fmt: skip
    times = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            times.append(time.perf_counter() - self.start)
            control.should_training_stop = len(times) % STEPS == 0

    model, tokenizer = common.load_model(directory, "cpu")
    trainer = GRPOTrainer(
        model, reward, args=config, processing_class=tokenizer, callbacks=[Watch()],
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
    )  # fmt: skip
    return trainer, times


STEPS = 8  # of each side in a turn


def step(repeats: int) -> None:
    try:
        import trl
    except ImportError:
        trl = None
    task = common.make_task("add")
    directory = common.tiny_model(task)
    for share in (0.0, 0.5):
        model, tokenizer = common.load_model(directory, "cpu")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ours, theirs = [], []
        with tempfile.TemporaryDirectory() as out:
            if trl:
                trainer, times = trl_trainer(directory, task, share, out)
            for turn in range(repeats):
                for i in range(STEPS):
                    first = (turn * STEPS + i) * 16
                    problems = [(first + j) % 1024 for j in range(16)]
                    dead = range(0, 16, 2) if share else ()
                    start = time.perf_counter()
                    our_step(model, tokenizer, optimizer, task, problems, dead)
                    ours.append(time.perf_counter() - start)
                if trl:
                    trainer.train()
                    theirs += times[-STEPS:]
        line = f"step, {share:.0%} of the groups made dead: ours {statistics.median(ours):.3f} s"
        if trl:
            ratio = statistics.median(ours) / statistics.median(theirs)
            line += f", TRL {trl.__version__} {statistics.median(theirs):.3f} s, ratio {ratio:.2f}"
        print(line, flush=True)


# ---- sampling ----


def sample(repeats: int) -> None:
    model, tokenizer = random_qwen2(hidden_size=256, intermediate_size=768, num_hidden_layers=5)
    size = sum(p.numel() for p in model.parameters())
    for B, G, P, T in ((16, 8, 8, 32), (1, 64, 512, 32)):
        prompts = ["x" * P] * B
        batch = tokenizer(prompts, return_tensors="pt")
        flags = {"max_new_tokens": T, "do_sample": True, "top_k": 0, "num_return_sequences": G}

        def generate(batch=batch, flags=flags):
            with torch.no_grad():
                model.generate(**batch, **flags, pad_token_id=257)

        def ours(prompts=prompts, G=G, T=T):
            common.sample(model, tokenizer, prompts, G, T)

        times = alternate({"ours": ours, "generate": generate}, repeats)
        rates = {name: B * G * T / seconds for name, seconds in times.items()}
        print(
            f"sample, {size / 1e6:.1f}M parameters, {B} x {G} completions of {T} tokens, prompt "
            f"{P}: ours {rates['ours']:.0f} tokens/s, generate {rates['generate']:.0f}, "
            f"ratio {rates['ours'] / rates['generate']:.2f}",
            flush=True,
        )


# ---- log-probs with a large vocabulary ----


def large_vocabulary():
    model, _ = random_qwen2(
        vocab_size=151_936, hidden_size=64, intermediate_size=128, num_hidden_layers=2
    )
    N, P, T = 32, 16, 256
    ids = torch.randint(1000, (N, P + T))
    ones = torch.ones(N, P + T, dtype=torch.bool)
    return model, common.Rollout(
        ids[:, :P], ones[:, :P], ids[:, P:], ones[:, P:], torch.zeros(N, T), [""] * N
    )


def naive_logprobs(model, rollout):
    """The log-softmax of all logits, [N, P + T, V], and a gather."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
    return logprobs[:, -rollout.completion_ids.shape[1] :]


def logprobs(repeats: int) -> None:
    sides = {name: [peak_growth(name) for _ in range(repeats)] for name in ("ours", "naive")}
    memory = {name: sides[name][0]["MiB"] for name in sides}
    seconds = {name: statistics.median(r["seconds"] for r in sides[name]) for name in sides}
    gradients = [sides[name][0]["gradient"] for name in ("ours", "naive")]
    print(
        "logprobs, 32 x 256 tokens, vocabulary 151,936, forward and backward: memory ours "
        f"{memory['ours']:.0f} MiB, naive {memory['naive']:.0f}, ratio "
        f"{memory['ours'] / memory['naive']:.2f}; time {seconds['ours']:.2f} s, "
        f"{seconds['naive']:.2f}, ratio {seconds['ours'] / seconds['naive']:.2f}; gradient norms "
        f"{gradients[0]:.7g}, {gradients[1]:.7g}",
        flush=True,
    )


def child(name: str, *numbers: int) -> None:
    """What a process of its own measures: the peak above the model, seconds, a norm."""
    if name == "growth":
        B, G, T, repeats = numbers
        model, tokenizer = common.load_model(common.tiny_model(common.make_task("add")), "cpu")
        model.generation_config.eos_token_id = tokenizer.eos_token = None  # all of length T
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
        before, times = resident(), []
        for _ in range(1 + repeats):  # the first is not counted
            start = time.perf_counter()
            rollout = common.sample(model, tokenizer, ["12+345="] * B, G, T)
            update(model, optimizer, rollout, torch.rand(B, G))
            times.append(time.perf_counter() - start)
        print(json.dumps({"MiB": peak() - before, "seconds": statistics.median(times[1:])}))
        return
    model, rollout = large_vocabulary()
    function = common.completion_logprobs if name == "ours" else naive_logprobs
    before, start = resident(), time.perf_counter()
    function(model, rollout).sum().backward()
    seconds = time.perf_counter() - start
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    print(json.dumps({"MiB": peak() - before, "seconds": seconds, "gradient": norm}))


# ---- start-up, growth ----


def start(repeats: int) -> None:
    def command(*argv):
        return lambda: subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True)

    times = alternate({"help": command("gpg.py", "--help")}, repeats)
    with tempfile.TemporaryDirectory() as out:
        flags = ["--steps", "1", "--out", out, "--overwrite", "--eval-problems", "1"]
        times |= alternate({"first step": command("gpg.py", *flags)}, repeats)
    print(
        f"start: --help {times['help']:.1f} s; to the end of a first step, and of the run, "
        f"{times['first step']:.1f} s",
        flush=True,
    )


def growth(repeats: int) -> None:
    print("| B | G | T | seconds a step | MiB above the model |\n|---|---|---|---|---|")
    shapes = [(16, G, 32) for G in (2, 8, 32, 64)]
    shapes += [(16, 8, T) for T in (16, 64, 128, 512)] + [(B, 8, 32) for B in (4, 64, 128)]
    for shape in shapes:
        r = peak_growth("growth", *shape, repeats)
        cells = [*shape, f"{r['seconds']:.2f}", f"{r['MiB']:.0f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], *map(int, sys.argv[3:]))
        sys.exit()
    parts = {f.__name__: f for f in (step, sample, logprobs, start, growth)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for name in args.parts or parts:
        parts[name](args.repeats)

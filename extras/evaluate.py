"""Accuracy on test sets: `python extras/evaluate.py --model DIR_OR_ID --task gsm8k math500 aime24`.

Each problem is answered --samples times at --temperature, and once greedily, with the prompts and
the rewards of training. The table has the accuracy with its standard error over problems, the
greedy accuracy, pass@k, the mean length in tokens and the share that was cut at --max-new-tokens.

OUT/completions.jsonl has every completion with its verdict, OUT/evaluation.json the table. With the
same OUT, an evaluation that was stopped goes on; its samples are those of one that was not.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
from shared import markdown
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import load_model, mean_and_error, sample
from run import Parser, number, plain_errors, positive_float, positive_int, write
from tasks import UserError, get_prompts, get_rewards, held_out, make_task
from tasks.episodes import get_size
from tasks.prompts import leave_out_misfits, prompt_text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("evaluate.py", description="Accuracy on test sets.")
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--model", required=True, help="a Hugging Face directory or id, such as RUN/checkpoint")
    add("--task", nargs="+", required=True, help="gsm8k, math500, file.jsonl, module:Name-v0, ...")
    add("--problems", type=positive_int, default=10**6, help="at most so many (endless task: 200)")
    add("--samples", type=positive_int, default=4, help="n of each problem (default: 4)")
    add("--temperature", type=positive_float, default=1.0, help="of the samples (default: 1)")
    add("--max-new-tokens", type=positive_int, default=512, help="longest one (default: 512)")
    add("--whole", action="store_true", help="all of a file, not only the tenth that is held out")
    add("--system", help="text of a system turn before every prompt")
    add("--no-chat-template", action="store_true", help="feed the raw prompt to the model")
    add("--rows", type=positive_int, default=64, help="completions at a time (default: 64)")
    add("--seed", type=number(int, 0, 10**6), default=0, help="of the samples (default: 0)")
    add("--device", default=device, help=f"cpu, cuda, cuda:1, ... (default: {device})")
    add("--out", default="runs/evaluation", help="directory (default: runs/evaluation)")
    return parser.parse_args(argv)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n completions, c of which are right, have a right one among them.

    Unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def read_completions(path: Path, per_problem: int) -> dict[tuple, list[dict]]:
    """{(task, problem): its completions}, without those of a problem that lacks some."""
    rows = defaultdict(list)
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            row = json.loads(line)
            rows[row["task"], row["problem"]].append(row)
        except ValueError:
            pass  # the last line, cut when it was killed
    return {key: some for key, some in rows.items() if len(some) == per_problem}


def answer(model, tokenizer, task, name: str, problems: list[int], args) -> list[dict]:
    """Sampled and greedy completions of these problems, as rows of completions.jsonl."""
    prompts, rows = get_prompts(task, problems), []
    torch.manual_seed(args.seed * 10**6 + problems[0])  # the same ones when the evaluation goes on
    for n, temperature in ((args.samples, args.temperature), (1, 0.0)):
        rollout = sample(model, tokenizer, prompts, n, args.max_new_tokens, temperature)
        rewards, solved = get_rewards(task, problems, rollout.texts)
        for i, text in enumerate(rollout.texts):
            row = {
                "task": name,
                "problem": problems[i // n],
                "greedy": temperature == 0,
                "prompt": prompt_text(prompts[i // n]),
                "completion": text,
                "reward": rewards.flatten()[i].item(),
                "solved": solved.flatten()[i].item(),
                "tokens": rollout.completion_mask[i].sum().item(),
                "truncated": rollout.truncated[i].item(),
            }
            rows.append(row)
    return sorted(rows, key=lambda row: row["problem"])


def summarise(rows: list[dict], n: int) -> dict[str, float]:
    """The metrics of one task. Lengths and truncation are those of the sampled completions."""
    sampled, right = [row for row in rows if not row["greedy"]], defaultdict(int)
    for row in sampled:
        right[row["problem"]] += row["solved"]
    counts = list(right.values())  # [problems], of n
    greedy = [row["solved"] for row in rows if row["greedy"]]
    metrics = {"problems": len(counts)}
    metrics |= mean_and_error("accuracy", torch.tensor(counts).double() / n)
    metrics |= {"greedy": sum(greedy) / len(greedy)}
    for k in (2**i for i in range(1, n.bit_length())):
        metrics[f"pass@{k}"] = sum(pass_at_k(n, c, k) for c in counts) / len(counts)
    metrics["length"] = sum(row["tokens"] for row in sampled) / len(sampled)
    metrics["truncated"] = sum(row["truncated"] for row in sampled) / len(sampled)
    return metrics


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """{task: metrics}. Raises UserError."""
    args = parse_args(argv)
    out = Path(args.out)
    settings = {x: v for x, v in vars(args).items() if x not in ("task", "out", "device")}
    table = {}
    if (out / "evaluation.json").exists():
        old = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        table = old["tasks"]
        if old["settings"] != settings:
            changed = next(x for x in settings if old["settings"].get(x) != settings[x])
            flag = f"--{changed.replace('_', '-')}"
            raise UserError(f"--out {out} was made with another {flag}: name another directory")
    tasks = {name: make_task(name, "test", args.whole) for name in args.task}
    template = not args.no_chat_template
    model, tokenizer = load_model(args.model, args.device, None, template, args.system)
    leave_out_misfits(model, tokenizer, args.max_new_tokens, *tasks.values())
    batches = {name: split(task, args) for name, task in tasks.items()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "completions.jsonl"
    rows = read_completions(path, args.samples + 1)
    for name, some in batches.items():
        for batch in some:  # a batch is whole, or is drawn again
            if not all((name, problem) in rows for problem in batch):
                rows = {key: r for key, r in rows.items() if key[0] != name or key[1] not in batch}
    write(path, "".join(map(as_line, (row for some in rows.values() for row in some))))
    write(out / "evaluation.json", json.dumps({"settings": settings, "tasks": table}, indent=2))
    with path.open("a", encoding="utf-8") as file:
        for name, task in tasks.items():
            for batch in tqdm(batches[name], desc=name, unit="batch"):
                if (name, batch[0]) in rows:
                    continue
                for row in answer(model, tokenizer, task, name, batch, args):
                    rows.setdefault((name, row["problem"]), []).append(row)
                    file.write(as_line(row))
                file.flush()
            problems = [problem for batch in batches[name] for problem in batch]
            table[name] = summarise([r for p in problems for r in rows[name, p]], args.samples)
            result = {"settings": settings, "tasks": table}
            write(out / "evaluation.json", json.dumps(result, indent=2) + "\n")
    cells = [[x, *(f"{value:.4g}" for value in metrics.values())] for x, metrics in table.items()]
    print(markdown([["task", *next(iter(table.values()))], *cells]))
    return table


def split(task, args: argparse.Namespace) -> list[list[int]]:
    """The problems of an evaluation, in batches of about --rows completions."""
    batches = held_out(task, args.problems if get_size(task) else min(args.problems, 200))
    problems = [problem for batch in batches for problem in batch]
    n = max(1, args.rows // args.samples)
    return [problems[i : i + n] for i in range(0, len(problems), n)]


def as_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    with plain_errors("evaluate.py"):
        main()

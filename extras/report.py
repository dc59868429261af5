"""What policy gradients did to the text: `python extras/report.py --rescore runs/gpg runs/grpo`.

One page for the browser, without a network: the curves of all runs and, step by step, the groups of
completions as the algorithm saw them. --rescore scores these with the model before training (the
run's --model) and with the run's checkpoint, and shows which tokens became likelier.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from shared import mean_and_error, read_metrics
from transformers import AutoConfig, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpg
import grpo
from common import Rollout, frozen_logprobs, load_model
from run import Parser, describe, number, plain_errors
from tasks import UserError, first_problem, get_prompts, make_task
from tasks.pictures import data_uri, is_vision
from tasks.prompts import check_token_ids, encode_prompts, end_of_answer, pad


def read_run(path: Path, most_steps: int) -> dict:
    """Name, config, metrics and groups of completions of a run. Raises UserError."""
    if not (path / "samples.jsonl").exists():
        raise UserError(f"{path}: no samples.jsonl: not a run of gpg.py, grpo.py or copg.py")
    where, samples, metrics = path / "config.json", [], read_metrics(path)
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
        config["script"], config["model"], config["no_chat_template"]  # there, or a KeyError
        where = path / "samples.jsonl"
        for n, line in enumerate(where.read_text(encoding="utf-8").split("\n")[:-1], 1):
            where = f"{path / 'samples.jsonl'}, line {n}"
            samples.append(read_sample(line))
    except Exception as error:  # many ways to be damaged, one line
        raise UserError(f"{where}: not of a run ({error!r:.150})") from error
    steps = sorted({sample["step"] for sample in samples})
    if not steps:
        raise UserError(f"{path}: no completions in samples.jsonl yet")
    shown = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, most_steps)}
    samples = [sample for sample in samples if sample["step"] in shown]
    # copg.py's evaluations do not number their groups: one is the completions of a prompt.
    groups = itertools.groupby(samples, lambda s: (s["step"], s.get("group", s["prompt"])))
    groups = [make_group(config, list(rows)) for _, rows in groups]
    return {"name": str(path), "config": config, "metrics": metrics, "groups": groups}


def read_sample(line: str) -> dict:
    """A line of samples.jsonl. Raises any exception if a field does not have its type."""
    text = json.dumps(json.loads(line), ensure_ascii=False)
    sample = json.loads(text.encode(errors="replace"))  # no tokenizer takes a lone surrogate
    tokens, logprobs = sample.get("tokens", []), sample.get("logprobs", [])
    whole = [sample["step"], sample.get("group", 0), *tokens]
    numbers = [sample.get(name, 0) for name in ("reward", "utility", "kl", "length")]
    right = isinstance(sample["prompt"], str) and isinstance(sample["completion"], str)
    right &= all(type(x) is int and 0 <= x < 2**31 for x in whole)
    right &= all(map(math.isfinite, [*numbers, *logprobs])) and len(tokens) == len(logprobs)
    if not right:
        raise ValueError("a field of another type")
    return sample


def make_group(config: dict, rows: list[dict]) -> dict:
    """The completions of a prompt, with the advantages that the algorithm gave them: of CoPG, where
    it samples online, the reward minus its mean (its gradient has -beta h besides)."""
    group = {name: rows[0].get(name) for name in ("step", "prompt", "group")} | {"rows": rows}
    if group["group"] is not None:  # it was trained on
        rewards = torch.tensor([[row["reward"] for row in rows]], dtype=torch.double)  # [1, G]
        group["valid"] = gpg.is_valid(rewards).item()
        advantages = gpg.group_advantages(rewards, config.get("f_norm", "1")) * group["valid"]
        if config["script"] == "grpo.py":
            advantages = grpo.group_advantages(rewards, config["scale"])
        for row, advantage in zip(rows, advantages[0].tolist(), strict=True):
            row["advantage"] = advantage
    return group


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds. A character of several tokens belongs to its last one."""
    texts, start, done = [], 0, 0
    for i in range(len(ids)):  # with the tokens before it, or a leading space would be lost
        before, text = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start : i + 1])
        if text.endswith("\ufffd") and i < len(ids) - 1:
            texts.append("")  # part of a character
        else:
            texts.append(text[len(before) :])
            start, done = done, i + 1
    return texts


def load_prompts(run: dict) -> list:
    """The prompt of each group as the model saw it. Only its text is in samples.jsonl; a picture
    comes from the task: a group's problem follows from the rounds of the steps before."""
    prompts, config = [group["prompt"] for group in run["groups"]], run["config"]
    model_config = AutoConfig.from_pretrained(f"{run['name']}/checkpoint")
    if not config.get("task") or not is_vision(model_config):
        return prompts
    task, step = make_task(config["task"]), run["metrics"]["step"]
    rounds = np.nan_to_num(run["metrics"].get("rounds", step > 0))
    for i, group in enumerate(run["groups"]):
        if group["group"] is not None:
            before = int(rounds[step < group["step"]].sum()) * config["prompts"]
            problem = first_problem(config["seed"]) + before + group["group"]
            (prompt,) = get_prompts(task, [problem])
            if isinstance(prompt, dict) and prompt["text"] == prompts[i]:
                prompts[i], group["image"] = prompt, data_uri(prompt["image"])
    return prompts


def rescore(run: dict, prompts: list) -> None:
    """Add the log-probs of the tokens `before` and `after` training. Raises UserError."""
    config, temperature = run["config"], run["config"].get("temperature", 1.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = make_task(config["task"]) if config.get("task") else None
    template = not config["no_chat_template"]
    for when, name in (("before", config["model"]), ("after", f"{run['name']}/checkpoint")):
        model, tokenizer = load_model(name, device, task, chat_template=template)
        for prompt, group in zip(prompts, run["groups"], strict=True):
            rows = group["rows"]
            for row in rows:  # copg.py's evaluations keep no tokens
                if "tokens" not in row:
                    ids = tokenizer(row["completion"], add_special_tokens=False).input_ids
                    row["tokens"] = ids or [end_of_answer(tokenizer)]
            tokens, texts = [row["tokens"] for row in rows], [row["completion"] for row in rows]
            check_token_ids(model, tokens, texts, 0)
            ids, mask = pad(tokens, "right", model.device)  # [G, T]
            *prompt_ids, images = encode_prompts(model, tokenizer, [prompt] * len(rows), 0)
            nothing = torch.zeros(ids.shape, device=ids.device), ~mask[:, 0]  # log-probs, truncated
            rollout = Rollout(*prompt_ids, ids, mask, *nothing, texts, pictures=images)
            scored = frozen_logprobs(model, rollout, 8192, temperature).tolist()
            for row, logprobs in zip(rows, scored, strict=True):
                row[when] = [round(x, 3) for x in logprobs[: len(row["tokens"])]]


def tables(run: dict) -> dict[str, list[list[str]]]:
    """Rows of run, a metric before, the same after, as in the summary of the script; and of run,
    advantage, completions, mean change of their ln pi from before to after training."""
    columns, name = run["metrics"].items(), run["name"]
    known = [i for x, v in columns if x.startswith("eval_") for i in np.isfinite(v).nonzero()[0]]
    ends = (min(known), max(known)) if known else ()
    ends = [describe({x: v[i] for x, v in columns if np.isfinite(v[i])}).split("   ") for i in ends]
    change, rows = [], [row for group in run["groups"] for row in group["rows"] if "after" in row]
    for sign, advantage in ((1, "above 0"), (0, "0 (dead)"), (-1, "below 0")):
        chosen = [row for row in rows if np.sign(row.get("advantage", math.nan)) == sign]
        changes = [sum(row["after"]) - sum(row["before"]) for row in chosen]
        if changes:
            change.append([name, advantage, str(len(changes)), mean_and_error(changes, "+")])
    return {"closing": [[name, *pair] for pair in zip(*ends, strict=True)], "change": change}


def page(runs: list[dict]) -> str:
    """The page. All of its data is one JSON text in ASCII without "<": nothing in it is markup."""
    configs, data = [run["config"] for run in runs], []
    names = dict.fromkeys(name for c in configs for name in c if name not in ("out", "resume"))
    flags = [[name, *(str(c.get(name, "-")) for c in configs)] for name in names]
    flags = [row for row in flags if len(runs) == 1 or len(set(row[1:])) > 1]
    for run in runs:
        known = {x: np.where(np.isfinite(v), v, None).tolist() for x, v in run["metrics"].items()}
        data.append({"name": run["name"], "metrics": known, "groups": run["groups"]} | tables(run))
    text = json.dumps({"runs": data, "flags": flags}, allow_nan=False, separators=(",", ":"))
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("DATA", text.replace("<", "\\u003c"))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("report.py", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="directories of runs")
    add("--out", type=Path, default=Path("report.html"), help="default: report.html")
    add("--rescore", action="store_true", help="score with the models before and after training")
    add("--steps", type=number(int, 2), default=40, help="steps shown of each run (default: 40)")
    args = parser.parse_args(argv)
    runs = [read_run(path, args.steps) for path in args.runs]
    for run in runs:
        try:
            tokenizer = AutoTokenizer.from_pretrained(f"{run['name']}/checkpoint")
            prompts = load_prompts(run)
        except (OSError, ValueError) as error:
            raise UserError(f"{run['name']}/checkpoint: not readable ({error!r:.200})") from error
        if args.rescore:
            rescore(run, prompts)
        for row in (row for group in run["groups"] for row in group["rows"] if "tokens" in row):
            row["tokens"] = token_texts(tokenizer, row["tokens"])
    args.out.write_text(page(runs), encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with plain_errors("report.py"):
        main()

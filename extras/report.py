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
from tasks import UserError, first_problem, get_prompts, make_tasks
from tasks.pictures import data_uri, is_vision, read_pictures
from tasks.prompts import check_token_ids, leave_out_misfits, pad, prompt_text


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
    run = {"name": str(path), "config": config, "metrics": metrics, "groups": groups}
    return run | {"checkpoint": str(path / "checkpoint")}


def read_sample(line: str) -> dict:
    """A line of samples.jsonl. Raises any exception if a field does not have its type."""
    text = json.dumps(json.loads(line), ensure_ascii=False)
    sample = json.loads(text.encode(errors="replace"))  # no tokenizer takes a lone surrogate
    tokens, logprobs = sample.get("tokens", []), sample.get("logprobs", [])
    whole = [sample["step"], sample.get("group", 0), *tokens, *sample.get("prompt_tokens", [])]
    numbers = [sample.get(name, 0) for name in ("reward", "utility", "kl", "length")]
    right = isinstance(sample["prompt"], str) and isinstance(sample["completion"], str)
    right &= ("tokens" in sample) == ("prompt_tokens" in sample)
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


def load(run: dict, name: str, task):
    """(model, tokenizer), with the run's flags."""
    template, system = not run["config"]["no_chat_template"], run["config"].get("system")
    return load_model(name, "cuda" if torch.cuda.is_available() else "cpu", task, template, system)


def find_pictures(run: dict, task) -> None:
    """Add each trained group's picture: the rounds of the steps before tell its problem."""
    config, step = run["config"], run["metrics"]["step"]
    leave_out_misfits(*load(run, run["checkpoint"], task), config["max_new_tokens"], task)
    rounds = np.nan_to_num(run["metrics"].get("rounds", step > 0))
    for group in run["groups"]:
        if group["group"] is not None:
            before = int(rounds[step < group["step"]].sum()) * config["prompts"]
            problem = first_problem(config["seed"]) + before + group["group"]
            (prompt,) = get_prompts(task, [problem])
            if isinstance(prompt, dict) and prompt_text(prompt) == group["prompt"]:
                group["image"] = data_uri(prompt["image"])


def rescore(run: dict, task) -> None:
    """Add the log-probs of the tokens `before` and `after` training. Raises UserError."""
    for when, name in (("before", run["config"]["model"]), ("after", run["checkpoint"])):
        model, tokenizer = load(run, name, task)
        image_id = getattr(model.config, "image_token_id", None)
        for group in run["groups"]:
            rows = [row for row in group["rows"] if "tokens" in row]
            prompt = {"image": group.get("image"), "text": ""}
            if not rows or (image_id in rows[0]["prompt_tokens"] and not prompt["image"]):
                continue
            images = read_pictures(tokenizer, [prompt if prompt["image"] else ""] * len(rows))
            fields = ("prompt_tokens", "tokens", "completion")
            prompt_tokens, tokens, texts = ([row[x] for row in rows] for x in fields)
            check_token_ids(model, prompt_tokens + tokens, texts * 2, 0)
            ids, mask = pad(tokens, "right", model.device)  # [G, T]
            nothing = torch.zeros(ids.shape, device=ids.device), ~mask[:, 0]  # log-probs, truncated
            prompt_ids = pad(prompt_tokens, "left", model.device)  # with their mask
            rollout = Rollout(*prompt_ids, ids, mask, *nothing, texts, pictures=images)
            scored = frozen_logprobs(model, rollout, 8192, run["config"].get("temperature", 1.0))
            for row, logprobs in zip(rows, scored.tolist(), strict=True):
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
            tokenizer = AutoTokenizer.from_pretrained(run["checkpoint"])
            vision = is_vision(AutoConfig.from_pretrained(run["checkpoint"]))
        except (OSError, ValueError) as error:
            raise UserError(f"{run['checkpoint']}: not readable ({error!r:.200})") from error
        task = run["config"].get("task") if vision or args.rescore else None
        task = make_tasks(task, run["config"].get("eval_task"))[0] if task else None
        if vision and task:
            find_pictures(run, task)
        if args.rescore:
            rescore(run, task)
        for row in (row for group in run["groups"] for row in group["rows"] if "tokens" in row):
            row["tokens"] = token_texts(tokenizer, row["tokens"])
    args.out.write_text(page(runs), encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with plain_errors("report.py"):
        main()

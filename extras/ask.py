"""Ask a model: `python extras/ask.py DIR_OR_ID "a prompt"` prints some of its answers.

With --task, the prompt is a test problem of the task, and each answer has its reward. Without
either, prompts are read from the terminal, one a line, until an empty one.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import load_model, sample
from run import Parser, number, plain_errors, positive_int
from tasks import UserError, get_prompts, get_rewards, make_task
from tasks.prompts import prompt_text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("ask.py", description="Ask a model.")
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("model", help="tiny, a Hugging Face directory or id, such as RUN/checkpoint")
    add("prompt", nargs="?", help="the prompt (default: read from the terminal)")
    add("--task", help="gsm8k, file.jsonl, module:Name-v0, ...: ask one of its test problems")
    add("--problem", type=number(int, 0), default=0, help="which one (default: 0)")
    add("--samples", type=positive_int, default=4, help="answers (default: 4)")
    add("--temperature", type=number(float, 0), default=1.0, help="0: greedy (default: 1)")
    add("--max-new-tokens", type=positive_int, default=512, help="longest answer (default: 512)")
    add("--system", help="text of a system turn before the prompt")
    add("--no-chat-template", action="store_true", help="feed the raw prompt to the model")
    add("--device", default=device, help=f"cpu, cuda, cuda:1, ... (default: {device})")
    args = parser.parse_args(argv)
    if args.task and args.prompt:
        raise UserError("a prompt and --task exclude each other")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    task = make_task(args.task, "test") if args.task else None
    template = not args.no_chat_template
    model, tokenizer = load_model(args.model, args.device, task, template, args.system)

    def ask(prompt, reward=lambda texts: [""] * len(texts)) -> None:
        rollout = sample(
            model, tokenizer, [prompt], args.samples, args.max_new_tokens, args.temperature
        )
        rewards, cut = reward(rollout.texts), rollout.truncated.tolist()
        for text, value, is_cut in zip(rollout.texts, rewards, cut, strict=True):
            print(f"\n---{value}{' (cut)' if is_cut else ''}\n{text}")

    def reward(texts: list[str]) -> list[str]:
        rewards, _ = get_rewards(task, [args.problem], texts)
        return [f" reward {value:g}" for value in rewards[0].tolist()]

    if task:
        (prompt,) = get_prompts(task, [args.problem])
        print(prompt_text(prompt))
        ask(prompt, reward)
        return
    for line in [args.prompt] if args.prompt else iter(lambda: input("\n> "), ""):
        ask(line)


if __name__ == "__main__":
    with plain_errors("ask.py"):
        main()

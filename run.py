"""A run: its flags, its directory, its checkpoints and its errors. No algorithm lives here."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from tasks import UserError, first_problem

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one-line errors and without abbreviated flags."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; --help shows all flags")


def number(kind: type, low: float, high: float = 1e9) -> Callable:
    """An argparse type: an int or a float from low to high."""

    def parse(text: str):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it in its own message
    return parse


positive_int, positive_float, fraction = number(int, 1), number(float, 1e-12), number(float, 0, 1)


def add_run_flags(parser: Parser, eval_samples: int = 4) -> None:
    add = parser.add_argument_group("run").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples = f"completions of each held-out problem (default: {eval_samples})"
    add("--out", help="directory of the run, new or empty (default: runs/<script>, -2, -3, ...)")
    add("--resume", metavar="DIR", help="continue the run in DIR; --steps and --device may change")
    add("--save-every", type=positive_int, default=20, help="steps per checkpoint (default: 20)")
    add("--eval-every", type=positive_int, help="steps between evaluations (default: a tenth)")
    add("--eval-problems", type=positive_int, default=200, help="held-out problems (default: 200)")
    add("--eval-first", type=number(int, 0), default=0, help="index of the first (default: 0)")
    add("--eval-samples", type=positive_int, default=eval_samples, help=samples)
    add("--log", choices=["tensorboard", "wandb"], help="metrics there, too; a package to install")
    add("--device", default=device, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--seed", type=number(int, 0, 10**6), default=0, help="of data and sampling (default: 0)")


def parse_flags(parser: Parser, argv: list[str] | None, defaults: Callable) -> argparse.Namespace:
    """The command line. defaults(args) gives the defaults that depend on other flags.

    With --resume DIR the defaults are those of DIR/config.json, and only --steps and --device may
    differ from it. Raises UserError.
    """
    args, config = parser.parse_args(argv), {}
    if "" in vars(args).values():
        raise UserError("an argument is empty; --help shows all flags")
    if args.resume:
        try:
            config = json.loads((Path(args.resume) / "config.json").read_text(encoding="utf-8"))
            if config.get("script") != parser.prog:
                raise ValueError(f"it was not begun by this {parser.prog}")
            if flags := config.keys() ^ (vars(args).keys() | {"script"}):
                raise ValueError(f"another version began it: {', '.join(sorted(flags))}")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            message = f"--resume {args.resume}: no run to continue ({error!s:.150})"
            raise UserError(message) from error
        config |= {"out": args.resume, "resume": args.resume}
        parser.set_defaults(**config)
    else:
        parser.set_defaults(script=parser.prog, **defaults(args))
    args = parser.parse_args(argv)
    stem = f"runs/{Path(parser.prog).stem}"
    names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
    args.out = args.out or next(name for name in names if not Path(name).exists())
    for name, old in config.items():
        if name not in ("out", "steps", "device") and vars(args)[name] != old:
            flag = f"--{name.replace('_', '-')} {vars(args)[name]}"
            raise UserError(f"{flag} contradicts --resume {args.resume}, where it is {old}")
    return args


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to --lr, then constant, or a cosine to 0. Steps count from 1."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    if args.schedule == "constant":
        return args.lr
    progress = (step - args.warmup) / (args.steps - args.warmup)
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * progress))


class Run:
    """A directory with config.json, metrics.csv, samples.jsonl, curves.png and checkpoint/."""

    def __init__(self, args: argparse.Namespace):
        """Lock the directory, write nothing yet. Raises UserError if it is in use or not empty."""
        self.args, self.dir, self.checkpoint = args, Path(args.out), Path(args.out) / "checkpoint"
        self.step, self.problem, self.rows = 0, first_problem(args.seed), []
        self.warned, self.stopping = set(), False
        self.dir.mkdir(parents=True, exist_ok=True)
        if fcntl:
            directory = os.open(self.dir, os.O_RDONLY)
            self.unlock = weakref.finalize(self, os.close, directory)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.dir}: another process is training there") from error
            except OSError:
                pass  # a file system without locks, such as NFS
        if not args.resume and any(self.dir.iterdir()):
            raise UserError(f"--out {self.dir} is not empty; name another, or --resume {self.dir}")
        old = self.dir / "checkpoint.old"
        if old.exists() and not self.checkpoint.exists():
            old.rename(self.checkpoint)  # killed between the two renames of `save`
        self.resumed = self.checkpoint.exists()  # if not, it was killed before its first checkpoint
        self.weights = str(self.checkpoint) if self.resumed else None
        metrics = self.dir / "metrics.csv"
        if not self.resumed and metrics.exists() and metrics.read_text().count("\n") > 2:
            raise UserError(f"{self.checkpoint} is gone; start another run with --out")

    def begin(self, model, tokenizer, optimizer) -> None:
        """Keep what `save` saves. A resumed run restores optimizer, random states and metrics."""
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.args.eval_every = self.args.eval_every or math.ceil(self.args.steps / 10)
        self.start, paths = time.perf_counter(), [self.args.task, self.args.eval_task]
        paths = [Path(x) for x in paths if str(x).endswith(".jsonl")] + [self.dir / "data.jsonl"]
        self.data = [hashlib.sha256(x.read_bytes()).hexdigest() for x in paths if x.exists()]
        self.tracker = None if self.args.log is None else open_tracker(self.args)
        if not self.resumed:
            return
        try:
            saved = torch.load(self.checkpoint / "training_state.pt", "cpu", weights_only=True)
            self.step, self.problem, self.rows = saved["step"], saved["problem"], saved["rows"]
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
            torch.cuda.set_rng_state_all(saved["cuda_rng"][: torch.cuda.device_count()])
            samples = (self.dir / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            changed = self.data != saved["data"]
            kept = [line for line in samples if json.loads(line)["step"] <= self.step]
        except Exception as error:  # many ways to be damaged, one line
            raise UserError(f"{self.dir} is damaged ({error!r:.200})") from error
        if changed:
            raise UserError(f"{self.dir}: its data have changed since it was begun")
        if self.step >= self.args.steps:
            raise UserError(f"{self.dir}: step {self.step} is done; --steps must be higher")
        write(self.dir / "samples.jsonl", "".join(f"{line}\n" for line in kept))
        self.write_config()

    def write_config(self) -> None:
        config = vars(self.args) | {"resume": None}
        write(self.dir / "config.json", json.dumps(config, indent=2) + "\n")

    def next_problems(self, n: int) -> list[int]:
        """The indices of the next n training problems."""
        self.problem += n
        return list(range(self.problem - n, self.problem))

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left, numbered from 1. Ctrl-C or SIGTERM end them after this one."""
        in_thread = threading.current_thread() is not threading.main_thread()  # has no signals
        signals = () if in_thread else (signal.SIGINT, signal.SIGTERM)
        handlers = {signum: signal.signal(signum, self.stop) for signum in signals}
        try:
            with tqdm(total=total, initial=self.step, unit="step") as self.bar:
                while self.step < total and not self.stopping:
                    self.start = time.perf_counter()
                    yield self.step + 1
                    self.bar.update()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def stop(self, signum, frame) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        print("\nfinishing this step and saving; Ctrl-C again stops at once", file=sys.stderr)

    def warn(self, message: str) -> None:
        """Print a message once."""
        if message not in self.warned:
            tqdm.write(f"step {self.step + 1}: {message} (said once)", file=sys.stderr)
        self.warned.add(message)

    def log(self, step: int, metrics: dict[str, float], samples: list[dict] = ()) -> None:
        """Add metrics to the step's row of metrics.csv, and completions to samples.jsonl."""
        if metrics.get("truncated_share", 0) > 0.1:
            self.warn("more than a tenth of the completions end at --max-new-tokens: raise it")
        if step > self.step or not self.rows:
            self.rows.append({"step": step, "seconds": time.perf_counter() - self.start})
        if step == 0:
            self.write_config()
        self.step, row = step, self.rows[-1]
        row |= metrics
        if "tokens" in metrics:
            row["tokens_per_second"] = row["tokens"] / row["seconds"]
        if self.tracker:
            self.tracker(metrics, step)
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        table = [names, *([f"{r[x]:.6g}" if x in r else "" for x in names] for r in self.rows)]
        write(self.dir / "metrics.csv", "".join(",".join(cells) + "\n" for cells in table))
        mode = "a" if step > 0 else "w"  # it may have been killed before its first checkpoint
        with (self.dir / "samples.jsonl").open(mode, encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": step} | sample, ensure_ascii=False) + "\n")
        if any(name.startswith("eval_") for name in metrics):
            tqdm.write(f"step {step}: {describe(metrics)}", file=sys.stderr)
        else:
            shown = ("reward_mean", "valid_share", "alpha", "loss", "tokens_per_second")
            self.bar.set_postfix({x: row[x] for x in shown if x in row}, refresh=False)

    def save(self) -> None:
        """checkpoint/: a Hugging Face directory, with the training state beside the weights.

        It is written under another name, then renamed: at any time `checkpoint` is whole or,
        between the two renames, `checkpoint.old`. Raises UserError if it cannot be written.
        """
        new, old = self.dir / "checkpoint.new", self.dir / "checkpoint.old"
        state = {
            "step": self.step,
            "problem": self.problem,
            "rows": self.rows,
            "data": self.data,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        try:
            shutil.rmtree(new, ignore_errors=True)
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            if hasattr(self.tokenizer, "image_processor"):
                self.tokenizer.image_processor.save_pretrained(new)
            torch.save(state, new / "training_state.pt")
            if self.checkpoint.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.checkpoint.rename(old)
            new.rename(self.checkpoint)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # a full disk: OSError, RuntimeError or SafetensorError
            raise UserError(f"{new} could not be written ({error})") from error

    def finish(self) -> None:
        """Print the summary, draw the curves, release the directory."""
        evaluations = [row for row in self.rows if any(x.startswith("eval_") for x in row)]
        peak = torch.cuda.max_memory_allocated() / 2**30  # 0 without a GPU
        memory = f", {peak:.2f} GiB of GPU memory" if peak else ""
        print(f"\n{self.args.script}: {self.step} of {self.args.steps} steps")
        print(f"  before   {describe(evaluations[0])}")
        print(f"  after    {describe(evaluations[-1])}   (step {evaluations[-1]['step']})")
        print(f"  took     {sum(row['seconds'] for row in self.rows[1:]):.0f} s{memory}")
        print(f"  look at  {self.dir}/curves.png, and read {self.dir}/samples.jsonl")
        print(f"  model    {self.checkpoint}, a Hugging Face directory")
        if self.step < self.args.steps:
            print(f"  go on    python {self.args.script} --resume {shlex.quote(self.args.out)}")
        try:
            draw_curves({self.args.out: self.rows}, self.dir / "curves.png")
        except Exception as error:  # no matplotlib, for example
            print(f"  no curves.png: {error!r:.200}")
        if fcntl:
            self.unlock()


def open_tracker(args: argparse.Namespace) -> Callable[[dict, int], None]:
    """What sends metrics to TensorBoard or wandb, under the names of metrics.csv."""
    try:
        if args.log == "wandb":
            import wandb

            return wandb.init(dir=args.out, name=args.out, config=vars(args)).log
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--log {args.log} needs a package: pip install {args.log}") from error
    writer = SummaryWriter(args.out)
    return lambda metrics, step: [writer.add_scalar(x, v, step) for x, v in metrics.items()]


def write(path: Path, text: str) -> None:
    """Write a file that is whole at any time."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def describe(metrics: dict[str, float]) -> str:
    """An evaluation as one line: every metric, with its standard error if there is one."""
    parts = []
    for name, value in metrics.items():
        if name.endswith("_stderr"):
            parts[-1] += f" ± {value:.3f}"
        elif name.startswith("eval_"):
            parts.append(f"{name.removeprefix('eval_')} {value:.3f}")
    return "   ".join(parts)


def draw_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """Every metric in the rows of each run against the step."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's backend need not exist here
    from matplotlib.figure import Figure  # slow to import

    names = dict.fromkeys(name for rows in runs.values() for row in rows for name in row)
    names = [name for name in names if name != "step" and not name.endswith("_stderr")]
    height = math.ceil(len(names) / 4)
    figure = Figure(figsize=(12, 2.2 * height + 1), layout="constrained")
    for place, name in enumerate(names, 1):
        axis = figure.add_subplot(height, 4, place)
        axis.set_title(name, fontsize=9)
        for label, rows in runs.items():
            rows = [row for row in rows if name in row]
            x, y = [row["step"] for row in rows], [row[name] for row in rows]
            axis.plot(x, y, ".-", lw=1, ms=2, label=label)
    if len(runs) > 1:
        figure.legend(handles=axis.lines, loc="outside upper center")
    figure.savefig(path, dpi=80)


@contextlib.contextmanager
def plain_errors(script: str) -> Iterator[None]:
    """Errors that the user can mend become one line on stderr and an exit status."""
    try:
        yield
        return
    except (UserError, OSError) as error:  # OSError: a full disk, a directory without permission
        message, status = error, 2
    except KeyboardInterrupt:
        message, status = "stopped; --resume goes on from the last checkpoint", 130
    except (RuntimeError, MemoryError) as error:
        if "non-finite" in str(error):  # of `sample`, or of clip_grad_norm_
            message, status = "the logits or the gradient are non-finite: a lower --lr may help", 1
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
            message, status = "out of memory: lower --micro-batch-tokens or --prompts", 2
        else:
            raise
    print(f"{script}: {message}", file=sys.stderr)
    sys.exit(status)

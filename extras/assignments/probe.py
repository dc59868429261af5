"""What a question asks of a module: calls, and what they return.

A student's module is imported as it is, so that everything Python allows works. The functions of
the other questions in it are replaced by finished ones: a mistake costs only its own question. What
the calls return is made plain, so that it can be written as JSON and compared elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib
import importlib.util
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MEMORY = 8 * 2**30  # bytes of address space
torch.set_num_threads(1)  # the tensors are small


@dataclass
class Case:
    """One call: `run(module, *args)` returns tensors, numbers, texts or dicts of them."""

    label: str  # begins with the name of the function
    run: Callable
    args: tuple = ()
    tolerance: float = 1e-4  # relative to the largest number of the expected value
    part: str = ""  # what has a share of the points; default: the function

    def __post_init__(self):
        self.function = re.split(r"[(, ]", self.label)[0]
        self.part = self.part or self.function


@dataclass
class Question:
    file: str
    names: str  # the functions and classes that the student writes
    cases: Callable  # seed -> list of cases


def shown(name: str, args, kwargs) -> str:
    texts = [brief(x) for x in args] + [f"{key}={brief(x)}" for key, x in kwargs.items()]
    return f"{name}({', '.join(texts)})"


def call(name: str, *args, **kwargs) -> Case:
    """name(*args, **kwargs), which must not change its arguments."""

    def run(module):
        mine, more = copy.deepcopy((args, kwargs))
        value = getattr(module, name)(*mine, **more)
        if plain([mine, more]) != plain([args, kwargs]):
            raise ValueError("your function changes its arguments")
        return value

    return Case(shown(name, args, kwargs), run)


def gradient(name: str, *args, wrt: int = 0, tolerance: float = 1e-4, **kwargs) -> Case:
    """The value of name(*args, **kwargs) and its gradient with respect to argument number `wrt`."""

    def run(module):
        mine, more = copy.deepcopy((args, kwargs))
        mine[wrt].requires_grad_()
        value = getattr(module, name)(*mine, **more)
        if not value.requires_grad:
            raise ValueError("what your function returns has no gradient")
        (slope,) = torch.autograd.grad(value.sum(), mine[wrt])
        return {"value": value.detach(), "gradient": slope, "dtype": str(value.dtype)}

    label = f"{shown(name, args, kwargs)}, with its gradient"
    return Case(label, run, tolerance=tolerance)


def brief(x) -> str:
    if isinstance(x, torch.Tensor):
        return brief(x.tolist()) if x.numel() <= 16 else f"a tensor {list(x.shape)}"
    if isinstance(x, dict):
        return ", ".join(f"{key} {brief(value)}" for key, value in x.items())
    if isinstance(x, list):
        return f"[{', '.join(map(brief, x))}]"
    return f"{x:.5g}" if isinstance(x, float) else repr(x)


def plain(value):
    """As JSON holds it, tensors and arrays as lists."""
    listed = json.dumps(value, default=lambda x: x.tolist() if hasattr(x, "tolist") else float(x))
    return json.loads(listed)


def same(a, b, tolerance: float) -> bool:
    """Are two plain values equal? Numbers may differ by `tolerance` of the largest of `b`."""
    if isinstance(b, dict):
        keys = isinstance(a, dict) and a.keys() == b.keys()
        return keys and all(same(a[key], b[key], tolerance) for key in b)
    try:
        x, y = np.array(a, dtype=float), np.array(b, dtype=float)
    except (TypeError, ValueError):  # texts, or rows of different lengths
        return a == b
    atol = tolerance * np.abs(y[np.isfinite(y)]).max(initial=1e-6)
    return x.shape == y.shape and np.allclose(x, y, rtol=0, atol=atol, equal_nan=True)


def agree(a: dict, b: dict, tolerance: float) -> bool:
    """Are two outcomes the same value, or the same error?"""
    if "error" in a or "error" in b:
        return a.get("error") == b.get("error")
    return same(a["value"], b["value"], tolerance)


def difference(got: dict, right: dict, tolerance: float) -> str:
    """The expected value and what came instead; of a dict only what is different."""
    mine, yours = right["value"], got.get("value")
    if isinstance(mine, dict) and isinstance(yours, dict):
        wrong = [x for x in mine if not same(yours.get(x), mine[x], tolerance)]
        mine, yours = ({x: value.get(x) for x in wrong} for value in (mine, yours))
    texts = brief(mine), got.get("error") or brief(yours)
    return "  expected: {}\n  yours:    {}".format(*(x[:300] for x in texts))


def load(folder: Path, file: str):
    """A file of a folder as a module; one of tasks/ may import its neighbours."""
    name = file.removesuffix(".py").replace("/", ".") + f"_{folder.name}"
    spec = importlib.util.spec_from_file_location(name, folder / file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(questions: dict[str, Question], key: str, folder: Path):
    """The module of a question, with finished functions for the other questions."""
    file = questions[key].file
    module, right = load(folder, file), load(folder.with_name("finished"), file)
    for other, question in questions.items():
        if other != key and question.file == file:
            for name in (name.split(".")[0] for name in question.names.split()):
                setattr(module, name, vars(right)[name])
    return module


def outcome(case: Case, module) -> dict:
    torch.manual_seed(0)
    try:
        return {"value": plain(case.run(module, *case.args))}
    except NotImplementedError as error:
        return {"error": f"not done yet ({error})"}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def outcomes(assignment: str, key: str, seed: int, folders: list[Path], out: Path) -> None:
    """Write what the cases of a question give with the module of each folder."""
    questions = importlib.import_module(assignment.lower()).QUESTIONS
    results = []
    for folder in folders:
        cases = questions[key].cases(seed)
        try:
            module = prepared(questions, key, folder)
        except (Exception, SystemExit) as error:
            problem = f"your file cannot be imported: {type(error).__name__}: {error}"
            results.append([{"error": problem[:300]}] * len(cases))
        else:
            results.append([outcome(case, module) for case in cases])
    out.write_text(json.dumps(results))


def limited(scratch: Path, seconds: float, function: Callable, *args) -> None:
    """Call a function with limits on time, memory and files, silently, as the leader of a process
    group, which ends with the process that started it."""
    if os.name == "posix":
        import resource

        os.setsid()
        os.closerange(3, 1024)  # a pipe among them would keep the server alive after the grader
        with contextlib.suppress(OSError, AttributeError):  # Linux: PR_SET_PDEATHSIG
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.alarm(math.ceil(seconds) + 5)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**27, 2**27))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.environ |= {"TMPDIR": str(scratch), "MPLBACKEND": "agg"}
    os.chdir(scratch)
    function(*args)

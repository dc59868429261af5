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
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

MEMORY = 8 * 2**30  # bytes of address space
torch.set_num_threads(1)  # the tensors are small


@dataclass
class Case:
    """One call and what it should show: `run(module)` returns tensors, numbers, texts or dicts."""

    label: str
    run: Callable
    tolerance: float = 1e-4  # relative to the largest number of the expected value
    part: str = ""  # what has a share of the points; default: the label up to "(" or a space


@dataclass
class Question:
    title: str
    points: int
    file: str
    names: str  # the functions and classes that the student writes
    cases: Callable  # seed -> list of cases


def shown(name: str, args, kwargs) -> str:
    texts = [brief(x) for x in args] + [f"{key}={brief(x)}" for key, x in kwargs.items()]
    return f"{name}({', '.join(texts)})"


def call(name: str, *args, **kwargs) -> Case:
    """name(*args, **kwargs), which must not change its arguments."""

    def run(module):
        mine, more = copy.deepcopy(args), copy.deepcopy(kwargs)
        value = getattr(module, name)(*mine, **more)
        if plain(mine) != plain(args) or plain(more) != plain(kwargs):
            raise ValueError("your function changes its arguments")
        return value

    return Case(shown(name, args, kwargs), run)


def gradient(name: str, *args, wrt: int = 0, tolerance: float = 1e-4, **kwargs) -> Case:
    """The value of name(*args, **kwargs) and its gradient with respect to argument number `wrt`."""

    def run(module):
        mine = [copy.deepcopy(x) for x in args]
        mine[wrt] = mine[wrt].detach().clone().requires_grad_()
        value = getattr(module, name)(*mine, **copy.deepcopy(kwargs))
        if not value.requires_grad:
            raise ValueError("what your function returns has no gradient")
        slope = torch.autograd.grad(value.sum(), mine[wrt])[0]
        return {"value": value.detach(), "gradient": slope, "dtype": str(value.dtype)}

    return Case(f"{shown(name, args, kwargs)}, with its gradient", run, tolerance)


def brief(x) -> str:
    if isinstance(x, torch.Tensor):
        return brief(x.tolist()) if x.numel() <= 16 else f"a tensor {list(x.shape)}"
    if isinstance(x, dict):
        return ", ".join(f"{key} {brief(value)}" for key, value in x.items())
    if isinstance(x, list):
        long = len(x) > 16 and isinstance(x[0], float)  # the weights of a model
        more = [f"... ({len(x)} numbers)"] if long else []
        return f"[{', '.join([*map(brief, x[:2] if long else x), *more])}]"
    return f"{x:.5g}" if isinstance(x, float) else repr(x)


def plain(value):
    """Tensors and arrays as lists, so that JSON can hold them."""
    if isinstance(value, dict):
        return {str(key): plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if hasattr(value, "detach"):
        return plain(value.detach().cpu().tolist())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return float(value)


def same(a, b, tolerance: float) -> bool:
    """Are two plain values equal? Numbers may differ by `tolerance` of the largest of `b`."""
    if isinstance(b, dict):
        keys = isinstance(a, dict) and a.keys() == b.keys()
        return keys and all(same(a[key], b[key], tolerance) for key in b)
    if isinstance(b, list):
        if not isinstance(a, list) or len(a) != len(b):
            return False
        if not all(isinstance(x, (int, float)) for x in [*a, *b]):
            return all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
        scale = max((abs(y) for y in b if math.isfinite(y)), default=0.0)
        return all(close(x, y, tolerance * max(scale, 1e-6)) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return close(a, b, tolerance * max(abs(b), 1e-6) if math.isfinite(b) else 0.0)
    return a == b


def close(x: float, y: float, atol: float) -> bool:
    return x == y or (math.isnan(x) and math.isnan(y)) or abs(x - y) <= atol


def difference(got: dict, right: dict, tolerance: float) -> str:
    """The expected value and what came instead; of a dict only what is different."""
    mine, yours = right["value"], got.get("value")
    if isinstance(mine, dict) and isinstance(yours, dict):
        wrong = [x for x in mine if not same(yours.get(x), mine[x], tolerance)]
        mine, yours = ({x: value.get(x) for x in wrong} for value in (mine, yours))
    texts = brief(mine), got.get("error") or brief(yours)
    return "  expected: {}\n  yours:    {}".format(*(x[:300] for x in texts))


def prepared(questions: dict[str, Question], key: str, finished: Path, folder: Path):
    """The module of a question in a folder, with finished functions for the other questions."""
    file, modules = questions[key].file, []
    for place in (folder, finished):  # a file of tasks/ may import its neighbours
        name = file.removesuffix(".py").replace("/", ".") + f"_{len(modules)}"
        spec = importlib.util.spec_from_file_location(name, place / file)
        modules.append(importlib.util.module_from_spec(spec))
        sys.modules[name] = modules[-1]
        spec.loader.exec_module(modules[-1])
    module, right = modules
    for question in questions.values():
        for name in set(question.names.split()) - set(questions[key].names.split()):
            if question.file == file and "." not in name:
                setattr(module, name, vars(right)[name])
    return module


def outcome(case: Case, module) -> dict:
    torch.manual_seed(0)
    try:
        return {"value": plain(case.run(module))}
    except NotImplementedError as error:
        return {"error": f"not done yet ({error})"}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def outcomes(assignment: str, key: str, seed: int, out: Path, finished: Path, folders: list[Path]):
    """Write what the cases of a question give with the module of each folder."""
    questions = importlib.import_module(assignment.lower()).QUESTIONS
    results = []
    for folder in folders:
        cases = questions[key].cases(seed)
        try:
            module = prepared(questions, key, finished, folder)
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

"""Running a student's functions: in a process of its own, with limits, reported through a pipe.

It guards against accidents (endless loops, exits, full memory, patched asserts), not against an
attacker who runs as the same user. For a class, use a container as well.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import gc
import json
import os
import re
import resource
import secrets
import select
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = {ROOT / part for part in ("", "tasks", "tests", "extras", "extras/assignments")}
CASE_SECONDS, QUESTION_SECONDS = 20, 60
MEMORY, FILE_SIZE, OPEN_FILES = 4 * 2**30, 64 * 2**20, 256  # beyond what is in use; each; at once
CALLS, CALLS_PER_TEST = 60, 8  # recorded of each function


class Slow(BaseException):
    """A case has run for too long. No `except Exception` of a student catches it."""


def warm_up() -> None:
    """Import once what every child needs: it is forked, and starts in milliseconds."""
    import gymnasium.utils.env_checker  # noqa: F401
    import transformers

    for family in ("Qwen2", "Llama", "GPT2", "Gemma"):
        for kind in ("Config", "ForCausalLM") if family != "GPT2" else ("Config", "LMHeadModel"):
            getattr(transformers, family + kind)
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor does CUDA; grading needs none
    gc.freeze()  # pytest collects garbage often, and need not look at what is here already


# --------------------------------------------------------------------------------------------------
# A process with limits
# --------------------------------------------------------------------------------------------------


def limited(work: Callable, files: dict[str, str | bytes], seconds: float) -> list[dict]:
    """work(send) in a child, in a folder with these files -> what it has sent until its end.

    Each message carries a secret word. A child that exits early has sent less, and no more.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True) as folder:
        write(Path(folder), files)
        read_end, write_end = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            be_the_child(work, Path(folder), write_end, word)
        os.close(write_end)
        text = listen(read_end, child, time.monotonic() + seconds)
    lines = text.split("\n")
    return [json.loads(line[len(word) :]) for line in lines if line.startswith(word)]


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def be_the_child(work: Callable, folder: Path, pipe: int, word: str) -> None:
    """Set the limits, do the work, and leave: never returns."""
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        for limit, value in (
            (resource.RLIMIT_AS, in_use() + MEMORY), (resource.RLIMIT_FSIZE, FILE_SIZE),
            (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_CORE, 0),
        ):  # fmt: skip
            with contextlib.suppress(ValueError, OSError):  # macOS does not limit the first
                resource.setrlimit(limit, (value, value))
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        sys.dont_write_bytecode = True
        for name, module in list(sys.modules.items()):  # the copies are to be imported
            file = getattr(module, "__file__", None)
            if file and name != __name__ and Path(file).resolve().parent in OURS:
                del sys.modules[name]
        others = [path for path in sys.path if path and Path(path).resolve() not in OURS]
        sys.path[:] = [str(folder), *others]

        def send(message: dict) -> None:
            os.write(pipe, f"\n{word}{json.dumps(message)}\n".encode())

        work(send)
    finally:
        os._exit(0)


def in_use() -> int:
    """The address space of this process, in bytes (Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 32 * 2**30


def listen(pipe: int, child: int, deadline: float) -> str:
    """What comes through the pipe until the child ends or the time is up. Ends its whole group."""
    parts, size, gone = [], 0, False
    while time.monotonic() < deadline and size < 2**24:
        if select.select([pipe], [], [], 0.0 if gone else 0.05)[0]:
            part = os.read(pipe, 2**16)
            if not part:
                break
            parts.append(part)
            size += len(part)
        elif gone:
            break
        else:
            gone = os.waitpid(child, os.WNOHANG) != (0, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # with what it has started
    if not gone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it may not have come to os.setsid
        os.waitpid(child, 0)
    os.close(pipe)
    return b"".join(parts).decode(errors="replace")


# --------------------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------------------


def run_tests(
    files: dict, target: str, sessions: list[tuple[int, list[str]]], seconds: float
) -> dict[tuple[int, str], dict[str, str | None]]:
    """sessions: (seed, tests as "test_gpg.py::test_a") -> {(seed, test): {case: failure or None}}.

    A case that was collected and has not been reported as passed has failed; a test of which
    nothing was collected has no cases. target: the file with the student's functions.
    """

    def work(send: Callable) -> None:
        builtins.course_plain = functools.partial(plain, target)
        before = snapshot()
        for seed, tests in sessions:
            os.environ["TEST_SEED"] = str(seed)
            run_pytest(tests, Reporter(send, seed, target, before))

    results = {(seed, test): {} for seed, tests in sessions for test in tests}
    for message in limited(work, files, seconds):
        for case in message.get("collected", [message.get("case")]):
            test = case.removeprefix("tests/")
            key = (message["seed"], test)
            if key not in results:
                key = (message["seed"], test.split("[")[0])
            if key in results:
                failure = "no result" if "collected" in message else message["failure"]
                results[key][case] = failure
    return results


def run_pytest(tests: list[str], plugin) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", "scratch", "--rootdir", os.getcwd()]
    options += ["--tb=short", "-c", os.devnull, "-p", "no:unraisableexception"]
    pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[plugin])


class Reporter:
    """A plugin of pytest: sends what is collected and how each case ends, and limits its time."""

    def __init__(self, send: Callable, seed: int, target: str, before: dict):
        self.send, self.seed, self.target, self.before = send, seed, target, before
        self.passed, self.failure = False, None
        signal.signal(signal.SIGALRM, self.ring)

    def ring(self, signum, frame):
        raise Slow

    def pytest_collection_finish(self, session):
        self.send({"seed": self.seed, "collected": [item.nodeid for item in session.items]})

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report):
        if report.when == "setup":
            self.failure = None
        if report.outcome != "passed" and self.failure is None:
            self.failure = describe(report, self.target)
        if report.when == "teardown":
            if self.failure is None and not self.before.items() <= snapshot().items():
                self.failure = "!it changes a library that the tests use"
            message = {"seed": self.seed, "case": report.nodeid, "failure": self.failure}
            self.send(message)


def describe(report, target: str) -> str:
    """How a case failed: for the student behind "!", if the student's code raised; else where in
    the test, and with which numbers (never shown)."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return report.outcome
    message = crash.message.split("\n")[0]
    if message.startswith(f"{__name__}.Slow") or message.startswith("Slow"):
        return f"!it ran for more than {CASE_SECONDS} s"
    theirs = Path(crash.path) in (Path(target).absolute(), Path(__file__))
    if theirs and not message.startswith(("assert", "AssertionError")):
        return f"!it raised {message[:200]}"
    numbers = re.sub(r"\d+\.\d+(e[+-]?\d+)?", lambda m: f"{float(m[0]):.3g}", crash.message)
    return f"{crash.lineno}: {re.sub('0x[0-9a-f]+', '', numbers)[:2000]}"


def snapshot() -> dict:
    """What the tests rely on in libraries, to see whether a student's code has changed it."""
    places = {"builtins": builtins, "torch": torch, "testing": torch.testing, "Tensor": Tensor}
    places |= {"pytest": pytest, "np": np, "np.testing": np.testing}
    kinds = types.FunctionType, types.BuiltinFunctionType, type, types.MethodDescriptorType
    kinds += (types.WrapperDescriptorType,)
    return {
        (place, name): id(value)
        for place, module in places.items()
        for name, value in vars(module).items()
        if isinstance(value, kinds) and name != "course_plain"
    }  # fmt: skip


def plain(target: str, function: Callable) -> Callable:
    """The function, refusing results that are no tensors, numbers, or other ordinary values: an
    object that equals everything would pass every test."""

    def check(value, depth: int = 0) -> None:
        kind = type(value)
        if kind in (list, tuple, dict) and depth < 5:
            for item in value.values() if kind is dict else value:
                check(item, depth + 1)
            return
        ordinary = kind in (Tensor, bool, int, float, str, type(None))
        ordinary = ordinary or kind.__module__ in ("numpy", "torch")
        home = sys.modules.get(kind.__module__)
        ours = kind.__module__ in ("common", "bandit_toy", "tasks.posts")
        if not ordinary and not (ours and getattr(home, kind.__name__, None) is kind):
            raise TypeError(f"{function.__name__} returns a {kind.__name__}")

    @functools.wraps(function)
    def checked(*args, **kwargs):
        value = function(*args, **kwargs)
        check(value)
        return value

    return checked


# --------------------------------------------------------------------------------------------------
# Naming a mistake: recorded calls, played again on other versions
# --------------------------------------------------------------------------------------------------


def replay(
    files: dict, target: str, tests: list[str], student: str, wrong: dict[str, str], seconds: float
) -> list[str]:
    """Names of the wrong versions that do what the student's functions do, where these differ from
    the reference. files holds the reference; student and wrong are sources of `target`.

    The tests run on the reference, and up to 60 calls of each function are recorded. Each version
    gets the same arguments and random numbers; values and gradients are compared.
    """

    def work(send: Callable) -> None:
        calls: dict[str, list] = {}
        builtins.course_plain = functools.partial(recorded, calls)
        run_pytest(tests, types.SimpleNamespace())
        reference = versions(target, files[target])
        theirs, named = versions(target, student), {}
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Slow()))
        for function, recordings in calls.items():
            right = [outcome(reference[function], call) for call in recordings]
            seen = [outcome(theirs[function], call) for call in recordings]
            if not same(right, seen):
                named[function] = right, seen
        for name, source in wrong.items():
            version = versions(target, source)
            for function, (right, seen) in named.items():
                twin = differs = False
                for call, a, b in zip(calls[function], right, seen, strict=True):
                    c = outcome(version[function], call)
                    differs = differs or not same(a, c)
                    if not (twin := same(b, c)):
                        break
                if twin and differs:
                    send({"name": name, "function": function})

    found = {}
    for message in limited(work, files, seconds):
        found.setdefault(message["function"], message["name"])
    return list(dict.fromkeys(found.values()))


def recorded(calls: dict[str, list], function: Callable) -> Callable:
    name, tests = function.__qualname__, {}
    calls[name] = []

    @functools.wraps(function)
    def recording(*args, **kwargs):
        test = os.environ.get("PYTEST_CURRENT_TEST")
        tests[test] = tests.get(test, 0) + 1
        if len(calls[name]) < CALLS and tests[test] <= CALLS_PER_TEST:
            calls[name].append((cloned(args), cloned(kwargs), torch.get_rng_state()))
        if tests[test] > 20 * CALLS_PER_TEST:  # a test that only goes on and on
            raise Slow
        return function(*args, **kwargs)

    return recording


def versions(target: str, source: str) -> dict[str, Callable]:
    """The marked functions of a grafted source, each version a module of its own."""
    marked = []
    builtins.course_plain = lambda function: marked.append(function.__qualname__) or function
    name = target.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    kept, sys.modules[name] = sys.modules.get(name), module  # dataclasses look themselves up
    try:
        exec(compile(source, target, "exec"), vars(module))
    finally:
        if kept is not None:
            sys.modules[name] = kept
    return {path: functools.reduce(getattr, path.split("."), module) for path in marked}


def cloned(x):
    """A copy of arguments: tensors are cloned, as leaves; models and tokenizers stay."""
    if type(x) is Tensor or isinstance(x, torch.nn.Parameter):
        return x.detach().clone().requires_grad_(x.requires_grad)
    if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
        return type(x)(map(cloned, x))
    if isinstance(x, dict):
        return {key: cloned(value) for key, value in x.items()}
    if type(x).__name__ in ("Pairs", "Rollout") and not isinstance(x, type):
        new = copy.copy(x)
        vars(new).update({key: cloned(value) for key, value in vars(x).items()})
        return new
    return x


def tensors(x) -> list[Tensor]:
    """All tensors in arguments or results, parameters of models included."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, torch.nn.Module):
        return list(x.parameters())
    if isinstance(x, (list, tuple)):
        return [t for item in x for t in tensors(item)]
    if isinstance(x, dict):
        return [t for item in x.values() for t in tensors(item)]
    return tensors(vars(x)) if type(x).__name__ in ("Pairs", "Rollout") else []


def outcome(function: Callable, call: tuple):
    """What a version does with a recorded call: its result, and gradients; or its exception."""
    args, kwargs, state = call
    args, kwargs = cloned(args), cloned(kwargs)
    torch.set_rng_state(state)
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        value = function(*args, **kwargs)
        value = args[0] if function.__name__ == "__init__" else value
        leaves = [t for t in tensors((args, kwargs)) if t.is_leaf and t.requires_grad]
        roots = [t for t in tensors(value) if t.requires_grad and not t.is_leaf]
        total = sum((t * torch.linspace(1, 2, t.numel()).view(t.shape)).sum() for t in roots)
        slopes = torch.autograd.grad(total, leaves, allow_unused=True) if roots and leaves else []
        return [result(value), [result(g) for g in slopes], [t.requires_grad for t in roots]]
    except (Exception, SystemExit, Slow) as error:
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def result(x):
    """A value as lists of numbers and texts."""
    if isinstance(x, Tensor):
        return x.detach().double().flatten().tolist() + list(x.shape)
    if isinstance(x, (list, tuple)):
        return [result(item) for item in x]
    if type(x).__name__ in ("Pairs", "Rollout"):
        x = vars(x)
    if isinstance(x, dict):
        return [[str(key), result(value)] for key, value in x.items()]
    return x if isinstance(x, (int, float, str, type(None))) else repr(type(x))


def same(a, b) -> bool:
    """Equal up to rounding."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b or abs(a - b) <= 1e-6 + 1e-4 * abs(a) or (a != a and b != b)
    return type(a) is type(b) and a == b

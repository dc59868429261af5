"""Equality of mathematics, judged by math-verify (github.com/huggingface/Math-Verify).

It parses TeX into sympy, evaluates no text as code, but may think for ever (9^{9^{9^9}}). Its own
time-outs are signals, which need the main thread and no Windows. So it runs in a process of its
own, which ends itself when a comparison takes too long, and is started when it is first needed.
"""

import faulthandler
import functools
import json
import logging
import os
import signal
import sys
import threading
from subprocess import DEVNULL, PIPE, Popen

SECONDS = 1  # the longest comparison; the median takes hundredths

LOCK, PROCESSES = threading.Lock(), {}  # by the process that uses it: a fork needs its own


@functools.lru_cache(maxsize=10_000)
def same_mathematics(found: str, gold: str) -> bool:
    """Is `found`, in TeX, equal to `gold`? False if that cannot be told in time.

    Raises UserError if math-verify is missing.
    """
    with LOCK:
        process = PROCESSES.get(os.getpid())
        if process is None or process.poll() is not None:
            process = PROCESSES[os.getpid()] = start()
        process.stdin.write(json.dumps([found, gold]) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:  # it was late
            process.communicate()  # waits for its end, and closes the pipes
        return reply == "True\n"


def start() -> Popen:
    command = [sys.executable, __file__]
    process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)
    if process.stdout.readline() != "ready\n":
        process.communicate()
        from .base import UserError  # here, for this file is also a script

        raise UserError("math-verify cannot be imported: pip install -r requirements.txt")
    return process


def serve() -> None:
    """The other process: a line [found, gold] in, a line True or False out."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # they are for the run; here, stdin ends
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    # units: it would take the m of 6m for metres
    normalization = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    options = {
        "extraction_config": [LatexExtractionConfig(normalization_config=normalization)],
        "extraction_mode": "first_match",
        "fallback_mode": "no_fallback",
        "parsing_timeout": None,
    }
    parse("$x + 1$", **options)  # builds its regular expressions
    print("ready", flush=True)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # in C: no loop can hold it up
        try:
            found, gold = (parse(f"${text}$", **options) for text in json.loads(line))
            reply = verify(gold, found, timeout_seconds=None)
        except Exception:  # parsers and sympy have many
            reply = False
        faulthandler.cancel_dump_traceback_later()
        print(reply, flush=True)


if __name__ == "__main__":
    serve()

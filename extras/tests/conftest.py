"""The fixtures of tests/conftest.py, for the tests of extras."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras"), str(ROOT / "tests")]

from tests.conftest import *  # noqa: E402, F403

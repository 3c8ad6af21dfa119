"""A sample of `sweep.py`; ALL=1 does all of it, which takes two hours."""

import os
import subprocess
import sys

from conftest import ROOT


def test_killed_and_without_power_at_some_call():
    words = [sys.executable, "-W", "ignore", str(ROOT / "tests/sweep.py"), "1000", "plain", "kill", "power"]
    result = subprocess.run(words[: 4 if os.environ.get("ALL") else None], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

"""A sample of `sweep.py`; ALL=1 does all of it, which takes an hour."""

import os
import subprocess
import sys

from conftest import ROOT


def test_killed_torn_without_power_and_with_a_fault_at_some_calls():
    words = [sys.executable, "-W", "ignore", str(ROOT / "tests/sweep.py")]
    words += [] if os.environ.get("ALL") else ["60", "plain", "kill", "torn", "again", "power", "EIO"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

"""Triton's kernels on a CPU: its interpreter is on or off for a whole process, and must be so before they are imported."""

import os
import subprocess
import sys

IS_ON = os.environ.get("TRITON_INTERPRET") == "1"


def run_tests_of(file: str) -> None:
    """Run a test file once more, in a process of its own whose interpreter is on; fail if it fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", file]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

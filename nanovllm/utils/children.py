"""Processes that run this package: ranks, and what a benchmark measures apart."""

import os
from pathlib import Path


def environment_of_a_child(**changes: str) -> dict[str, str]:
    """In which a new Python finds this very package, but not a `random.py` that lies in the current folder."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"} | changes

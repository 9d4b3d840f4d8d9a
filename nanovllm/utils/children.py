"""Processes that run this package: ranks, and what a benchmark measures apart."""

import os
from pathlib import Path


def environment_of_a_child(**changes: str) -> dict[str, str]:
    """In which a new Python finds this very package, but no modules in the current folder: a `random.py` there is not for it."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"} | changes

"""Pictures of a running engine: as characters, as a figure, and live.

from nanovllm.viz import CacheMap, Explorer, Player, RankMap, Reading, Stepper, Timeline, export_html
"""

from importlib import import_module
from typing import Any

EXPORTS = {
    "CacheMap": "cache_map",
    "Timeline": "timeline",
    "Player": "player",
    "Stepper": "stepper",
    "Explorer": "explorer",
    "Reading": "readings",
    "RankMap": "rank_map",
    "export_html": "export",
}
__all__ = list(EXPORTS)


def __getattr__(name: str) -> Any:
    if name in EXPORTS:  # imported when asked for: the frames of a trace need neither matplotlib nor torch
        return getattr(import_module(f"nanovllm.viz.{EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What is left out when a notebook is saved, by `nanovllm lab` for its readers and by `run` for the repository.

A picture of ours is saved three times: live, as a PNG and as text. The live one needs a kernel; a notebook reopened
without it would show an error in the place of the PNG. So the live one goes, and the others stay.
"""

from typing import Any

WIDGET = "application/vnd.jupyter.widget-view+json"


def drop_live_entries(model: dict[str, Any], **kwargs: Any) -> None:
    """Take live widgets out of a notebook about to be saved. For Jupyter's `ContentsManager.pre_save_hook`."""
    if model["type"] == "notebook" and model.get("content"):
        drop_from(model["content"])


def drop_from(notebook: dict[str, Any]) -> None:
    """Take out live entries where a PNG or a text says the same, and the state of widgets, which is of no use alone."""
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data or "text/plain" in data:
                data.pop(WIDGET, None)

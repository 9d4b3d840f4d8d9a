"""How clearly a chapter's greedy choices are made: another processor rounds differently, and must show the same tokens.

When a chapter is saved it is computed once more, and its smallest *margin* is written down in its metadata: by how much
the best logit led the second best. The guard reads it there.
"""

import contextlib
import io
import os
from typing import Any
from unittest import mock

import torch

from nanovllm.engine import model_runner
from nanovllm.lessons.guard import DEEPER, digest


def margins_of(notebook: Any) -> dict[str, Any]:
    """The smallest margin of a chapter's greedy choices, None if there were none; how many; and the digest of its code.

    An exercise that nobody attempted shows no tokens, and its random model has no margins; what goes deeper generates
    nothing, and Triton's interpreter wants a process of its own. So these cells are left out.
    """
    margins: list[float] = []
    sample, num_threads = model_runner.sample, torch.get_num_threads()

    def recording_sample(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        best = logits.float().topk(2).values
        is_greedy = torch.as_tensor(batch.temperature).flatten() == 0
        margins.extend((best[:, 0] - best[:, 1])[is_greedy].tolist())
        return sample(logits, batch)

    namespace: dict[str, Any] = {}
    try:
        with (
            mock.patch.object(model_runner, "sample", recording_sample),
            mock.patch.dict(os.environ, TRITON_INTERPRET="0"),  # chapter 02 sets it
            contextlib.redirect_stdout(io.StringIO()),
        ):
            for cell in notebook.cells:
                if cell.cell_type == "code" and not cell.id.startswith(("exercise-", DEEPER)):
                    exec(compile(cell.source, cell.id, "exec"), namespace)
    finally:
        torch.set_num_threads(num_threads)
    smallest = round(min(margins), 4) if margins else None
    return {"smallest_margin": smallest, "greedy_choices": len(margins), "code": digest(notebook)}

"""A step on its way: launched, and not waited for yet.

A GPU works off what it has been told in its own time. What a step gives is copied into memory of the host by the GPU
itself, behind the step and before whatever is launched next; whoever wants it waits for that copy, and for nothing
else.
"""

from collections.abc import Iterator

import numpy as np
import torch


class LaunchedStep:
    """What a step gives, once it has arrived: `tokens()` waits for it, and until then others can work."""

    def __init__(self, token_ids: torch.Tensor, likeliest: list["Likeliest"] | None = None) -> None:
        self.times: dict[str, float] = {}  # seconds for "prepare", "forward" and "sample"
        self.graph: dict[str, int] | None = None  # "bucket", "padding", "in_pieces" if a CUDA graph was replayed
        self._token_ids = on_host(token_ids)  # [num_sampled]
        self._likeliest = likeliest or []
        self._arrived: torch.cuda.Event | None = None
        if token_ids.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tokens(self) -> list[int]:
        """The sampled tokens, one for each scheduled sequence with `samples`, in the order of the batch."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._token_ids.tolist()

    @property
    def logprobs(self) -> dict[int, dict[int, float]]:
        """Place among the sampled -> token id -> log-probability, where a request asks for it. After `tokens()`."""
        return {place: best for part in self._likeliest for place, best in part.told(self._token_ids)}


class Likeliest:
    """Log-probabilities on their way: of some of a step's tokens, and of the likeliest in their place."""

    def __init__(self, places: np.ndarray, n_best: np.ndarray, logprobs: tuple[torch.Tensor, ...]) -> None:
        self.places, self.n_best = places.tolist(), n_best.tolist()
        self.chosen, self.best_ids, self.best = map(on_host, logprobs)

    def told(self, token_ids: torch.Tensor) -> Iterator[tuple[int, dict[int, float]]]:
        """For each place the likeliest tokens, best first, and the chosen one behind them if it is none of them."""
        rows = zip(self.places, self.n_best, self.chosen.tolist(), self.best_ids.tolist(), self.best.tolist())
        for place, n, chosen, best_ids, best in rows:
            told = dict(zip(best_ids[:n], best[:n]))
            told.setdefault(int(token_ids[place]), chosen)
            yield place, told


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that arrives by itself, of what the device has computed by then, not of what is launched later."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

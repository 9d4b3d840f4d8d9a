"""The sampler: logits become tokens, for the whole batch in one call.

Softmax turns logits into probabilities. All that matters for a choice is how they compare, so here the best token of a
row weighs 1 and every other one exp((logit - best logit) / temperature): no division by the sum, and no overflow. Then
truncation takes unlikely tokens away by setting their weight to zero:

    top-k    keeps the k heaviest;
    top-p    keeps the fewest of what is left that hold a fraction p of its weight, the one that crosses p included;
    min-p    keeps those that weigh at least min_p.

That is the order of transformers. vLLM has the same three, but takes min-p first, so that its top-p is measured on what
min-p has left. To choose is then to throw a dart: lay the weights end to end, in the order of the vocabulary, and take
the token on which the dart, one uniform number a row, comes down (the inverse of the cumulative distribution).

The weights are whole numbers, because whole numbers add up to the same sum in any order. Floats do not: a GPU adds them
in an order that changes with the shape of the batch, and a rounding error would make the dart fall on another token.
So a row gives the same token on its own and in a crowd, with or without neighbours that need sorting, on any device
that computes the same logits and exponentials; and since the dart always falls short of the exact sum, it never hits
a token of weight zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike

# The weight of the best token. float32 has 24 bits, so what is lost below 2**-44 is nothing it would have noticed in
# the sum; and a vocabulary of up to 2**18 such weights has a sum below 2**63.
ONE = 2**44

NO_TOKEN = -1  # the answer for a row with a NaN or an infinite maximum: nothing can be sampled from it

# A nucleus is nearly always this small. To rank the whole vocabulary takes eight times as long on a CPU.
USUAL_NUCLEUS = 1024

# So many rows are sampled at a time. All at once are no faster on a CPU, and what a vocabulary of 150,000 needs in
# between is 5.5 MB for a row with top-p.
ROWS_AT_A_TIME = {"cpu": 16, "cuda": 64}


@dataclass(slots=True)
class SamplingBatch:
    """How each row of a batch is sampled, and what the host knows of it, so that nobody has to ask the device."""

    temperature: torch.Tensor  # [n, 1] float32, 0 is greedy
    top_k: torch.Tensor  # [n, 1] int64, 0 is off
    top_p: torch.Tensor  # [n, 1] float32, 1 is off
    min_p: torch.Tensor  # [n, 1] float32, 0 is off
    uniform: torch.Tensor  # [n, 1] float32 in [0, 1)
    all_greedy: bool
    truncates: bool  # some random row uses top-k, top-p or min-p
    largest_top_k: int  # of the random rows
    open_nucleus: bool  # some random row uses top-p without top-k, so its number of tokens is anybody's guess

    @classmethod
    def from_host(
        cls,
        temperature: ArrayLike,
        top_k: ArrayLike,
        top_p: ArrayLike,
        min_p: ArrayLike,
        uniform: ArrayLike,
        to_device: Callable[[np.ndarray], torch.Tensor] = torch.from_numpy,
    ) -> "SamplingBatch":
        """Look at the settings, arrays of [n] each, and copy them to the device."""
        temperature, top_k = np.asarray(temperature, np.float32), np.asarray(top_k, np.int64)
        top_p, min_p = np.asarray(top_p, np.float32), np.asarray(min_p, np.float32)
        is_random = temperature > 0

        def column(values: np.ndarray) -> torch.Tensor:
            return to_device(values[:, None])

        return cls(
            temperature=column(temperature),
            top_k=column(top_k),
            top_p=column(top_p),
            min_p=column(min_p),
            uniform=column(np.asarray(uniform, np.float32)),
            all_greedy=not is_random.any(),
            truncates=bool((is_random & ((top_k > 0) | (top_p < 1) | (min_p > 0))).any()),
            largest_top_k=int(top_k.max(initial=0, where=is_random)),
            open_nucleus=bool((is_random & (top_k == 0) & (top_p < 1)).any()),
        )

    def rows(self, rows: slice) -> "SamplingBatch":
        """A part of the batch. What the host knows of the whole is not wrong for it, if perhaps more than it needs."""
        tensors = ("temperature", "top_k", "top_p", "min_p", "uniform")
        return replace(self, **{name: getattr(self, name)[rows] for name in tensors})


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Choose a token for each row.

    `logits` is `[n, vocab_size]`, of any float type, and stays as it is; -inf forbids a token. Returns `[n]` int64.
    A row depends on nothing but itself: one with a NaN, with +inf or with nothing but -inf gets `NO_TOKEN`, and the
    others their tokens. Of equal best logits, greedy takes the first; equal weights at the edge of top-k or top-p are
    all kept, as in transformers, so that it makes no difference how a sort puts them.
    """
    best, token_ids = logits.max(dim=-1)  # [n], [n]: NaN counts as the largest
    if not batch.all_greedy:
        num_rows = ROWS_AT_A_TIME[logits.device.type]
        parts = [slice(i, i + num_rows) for i in range(0, len(logits), num_rows)]
        drawn = torch.cat([_sample_randomly(logits[rows], best[rows], batch.rows(rows)) for rows in parts])
        is_greedy = batch.temperature.squeeze(-1) == 0
        token_ids = torch.where(is_greedy, token_ids, drawn)
    return token_ids.masked_fill(~best.isfinite(), NO_TOKEN)


def _sample_randomly(logits: torch.Tensor, best: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """A token for each row as if all were random: [n] int64. `best` are the rows' largest logits, [n]."""
    weights = _weights(logits, best, batch.temperature)
    if batch.truncates:
        weights = _truncate(weights, batch)
    return _draw(weights, batch.uniform)


def _weights(logits: torch.Tensor, best: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Each token's probability relative to its row's best one, as a whole number up to `ONE`: [n, vocab_size] int64."""
    divisor = torch.where(temperature == 0, 1.0, temperature)  # greedy rows come along, but their weights go unused
    relative = logits.float() - best.float().unsqueeze(-1)  # a new tensor, so the rest can be done in place
    return relative.div_(divisor).exp_().mul_(ONE).long()


def _truncate(weights: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Weigh down to zero what top-k, top-p and min-p take away. Each of them keeps all that weighs at least so much."""
    least = (batch.min_p.double() * ONE).ceil().long()  # [n, 1]
    if batch.largest_top_k > 0 or batch.open_nucleus:
        least = torch.maximum(least, _least_of_top_k_and_top_p(weights, batch))
    return weights.masked_fill(weights < least, 0)


def _least_of_top_k_and_top_p(weights: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The weight of the lightest token that top-k and top-p keep: [n, 1] int64, 0 in a row that uses neither."""
    vocab_size = weights.shape[-1]
    uses_top_k, uses_top_p = batch.top_k > 0, batch.top_p < 1
    num_ranked = min(max(batch.largest_top_k, USUAL_NUCLEUS if batch.open_nucleus else 0), vocab_size)
    while True:
        ranked = weights.topk(num_ranked).values  # [n, num_ranked], heaviest first
        in_top_k = ~uses_top_k | (torch.arange(num_ranked, device=weights.device) < batch.top_k)
        up_to = (ranked * in_top_k).cumsum(dim=-1)  # the weight of a token and all heavier ones
        # Top-p is a fraction of what top-k has left: of all, where it is off.
        mass = torch.where(uses_top_k, up_to[:, -1:], weights.sum(dim=-1, keepdim=True))  # [n, 1]
        enough = (batch.top_p.double() * mass).ceil().long()
        # A token belongs to the nucleus if those before it are not enough: this includes the one that crosses p.
        num_kept = (in_top_k & (up_to - ranked < enough)).sum(dim=-1, keepdim=True).clamp(min=1)
        # All that was ranked lies in the nucleus? Then it may go on, so rank everything. (On a GPU, a synchronisation.)
        is_cut = ~uses_top_k & uses_top_p & (num_kept == num_ranked)
        if num_ranked == vocab_size or not batch.open_nucleus or not is_cut.any():
            return ranked.gather(-1, num_kept - 1).masked_fill(~uses_top_k & ~uses_top_p, 0)
        num_ranked = vocab_size


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token of each row on which the dart falls: the first whose weights up to and with it exceed it. [n] int64."""
    up_to = weights.cumsum(dim=-1)  # [n, vocab_size]
    dart = (uniform.double() * up_to[:, -1:]).long()  # [n, 1], from 0 to just under the sum
    return torch.searchsorted(up_to, dart, right=True).squeeze(-1)


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, n_best: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the chosen tokens and of the `n_best` likeliest (of all, if there are not so many).

    They are the model's own, before temperature and truncation: the log-softmax of `logits`, `[n, vocab_size]`, in
    float32. Returns those of `token_ids`, `[n]`; then the likeliest tokens, best first, and theirs: `[n, n_best]` each.
    """
    logprobs = logits.float().log_softmax(dim=-1)  # [n, vocab_size]
    chosen = logprobs.gather(-1, token_ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)  # NO_TOKEN has NaN for its row's
    best_logprobs, best_ids = logprobs.topk(min(n_best, logits.shape[-1]))
    return chosen, best_ids, best_logprobs


def uniform_numbers(seeds: ArrayLike, positions: ArrayLike) -> np.ndarray:
    """One random number for each pair of a seed and a position: `[n]` float32, evenly spread over [0, 1).

    The pair alone decides (a *counter-based* generator: Salmon et al., 2011, "Parallel random numbers: as easy as
    1, 2, 3"). There is no state to keep, so a request draws the same numbers whoever else is being served, and again
    when it is computed once more after a preemption. `seeds` and `positions` are `[n]` whole numbers from 0 up.
    """
    bits = random_bits(seeds, positions)
    return (bits >> 40).astype(np.float32) * np.float32(2**-24)  # 24 bits: all that a float32 holds exactly


def random_bits(seeds: ArrayLike, positions: ArrayLike) -> np.ndarray:
    """64 random bits for each pair of a seed and a position: `[n]` uint64."""
    # Each seed starts its own SplitMix64 generator (Steele et al., 2014), far from those of its neighbours;
    # the position says which of its numbers is wanted. uint64 products wrap around, as they should.
    golden = 0x9E3779B97F4A7C15
    start = _mix(np.asarray(seeds, np.uint64) + golden)
    return _mix(start + np.asarray(positions, np.uint64) * golden)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing function: each bit of the input changes about half of the bits of the output."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)

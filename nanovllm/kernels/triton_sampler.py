"""Greedy and temperature sampling in one read of the logits, for GPUs.

The dart of `layers/sampler.py`, with the same random number, thrown in two steps: first at pieces of the vocabulary,
each as heavy as all its tokens, then at the tokens of the piece that it has hit. One kernel reads the logits, and keeps
of a piece two numbers, its best logit and its weight; a second one chooses a piece, and only that one is read again.

These weights are floats, and sums of floats depend on their order. Here the order is fixed by the size of a piece and
of nothing else, so a row gives the same token on its own and in a crowd.
"""

import torch
import triton
import triton.language as tl

PIECE = 4096  # logits a program reads
LOG2_E = tl.constexpr(1.4426950408889634)


def sample(logits: torch.Tensor, temperature: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Choose a token for each row: `[n]` int64.

    `logits` is `[n, vocab_size]`, `temperature` `[n]` float32, 0 is greedy; `bits` `[n]` int64, what `random_bits`
    gives. Of equal best logits, greedy takes the first. A row with a NaN, with +inf or with nothing but -inf gets -1.
    """
    n, vocab_size = logits.shape
    num_pieces = triton.cdiv(vocab_size, PIECE)
    best = torch.empty(n, num_pieces, dtype=torch.float32, device=logits.device)
    weights = torch.empty_like(best)
    token_ids = torch.empty(n, dtype=torch.int64, device=logits.device)
    inputs = (logits, temperature, best, weights, logits.stride(0), vocab_size)
    weigh_kernel[(n, num_pieces)](*inputs, PIECE=PIECE)
    choose_kernel[(n,)](*inputs, bits, token_ids, num_pieces, PADDED=triton.next_power_of_2(num_pieces), PIECE=PIECE)
    return token_ids


@triton.jit
def read(logits, row, piece, row_stride, vocab_size, PIECE: tl.constexpr):
    """A piece of a row, as float32; beyond the vocabulary nothing is likely."""
    token = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=token < vocab_size, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def weigh(x, best, temperature):
    """exp((x - best) / temperature). At temperature 0 only the best logit weighs anything."""
    return tl.exp2((x - best) * (LOG2_E / tl.maximum(temperature, 1e-30)))


@triton.jit
def hit(weights, dart):
    """Which of some weights, laid end to end, the dart comes down on; it is a fraction of their sum.

    Rounding may put it behind the end, or on a place without weight: it goes to the next that has some, or to the last.
    """
    i = tl.arange(0, weights.shape[0])
    up_to = tl.cumsum(weights)
    is_behind = (weights > 0) & (up_to > dart * tl.max(up_to))
    first, last = tl.min(tl.where(is_behind, i, weights.shape[0])), tl.max(tl.where(weights > 0, i, 0))
    return tl.minimum(first, last)


@triton.jit
def weigh_kernel(logits, temperature, best, weights, row_stride, vocab_size, PIECE: tl.constexpr):
    """One program a row and a piece of it: the best logit, and the weight of all relative to it."""
    row, piece = tl.program_id(0), tl.program_id(1)
    x = read(logits, row, piece, row_stride, vocab_size, PIECE)
    highest = tl.max(x)
    # Of nothing but -inf the weight is 0; one NaN, or inf - inf, makes it NaN.
    total = tl.sum(weigh(x, tl.maximum(highest, -1e30), tl.load(temperature + row)))
    at = row * tl.num_programs(1) + piece
    tl.store(best + at, highest)
    tl.store(weights + at, total)


@triton.jit
def choose_kernel(
    logits, temperature, best, weights, row_stride, vocab_size, bits, token_ids, num_pieces,
    PADDED: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One program a row: a piece, and a token of it."""
    row, i = tl.program_id(0), tl.arange(0, PADDED)
    is_piece = i < num_pieces
    highest = tl.load(best + row * num_pieces + i, mask=is_piece, other=float("-inf"))
    total = tl.load(weights + row * num_pieces + i, mask=is_piece, other=0.0)
    t = tl.load(temperature + row)
    is_broken = (tl.max((total != total).to(tl.int32)) > 0) | (tl.max(highest) == float("-inf"))

    # 24 of the bits make the dart, a number from 0 to just under 1, as in `uniform_numbers`. Greedy throws at 0, so of
    # equal tokens it hits the first.
    dart = ((tl.load(bits + row) >> 40) & 0xFFFFFF).to(tl.float32) * 2.0**-24
    dart = tl.where(t == 0, 0.0, dart)
    piece_weights = total * weigh(highest, tl.max(highest), t)
    piece = hit(piece_weights, dart)
    # What is left of it is thrown at the piece.
    before = tl.sum(tl.where(i < piece, piece_weights, 0.0))
    weight = tl.sum(tl.where(i == piece, piece_weights, 0.0))
    dart = tl.maximum(dart * tl.sum(piece_weights) - before, 0.0) / weight
    x = read(logits, row, piece, row_stride, vocab_size, PIECE)
    token = piece * PIECE + hit(weigh(x, tl.sum(tl.where(i == piece, highest, 0.0)), t), dart)
    tl.store(token_ids + row, tl.where(is_broken, -1, token.to(tl.int64)))

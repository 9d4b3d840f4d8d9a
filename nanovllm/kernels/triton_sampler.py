"""Greedy and temperature sampling in one read of the logits, for GPUs.

To sample from a softmax, nobody needs the softmax. Give each token a waiting time, exponentially distributed, with its
probability as the rate; whose time is up first is chosen with exactly that probability (the Gumbel-max trick is the
logarithm of this: Gumbel 1954, Maddison et al. 2014). So the largest of

    logit / temperature - log(a fresh exponential number)

is the sample, and a maximum can be found piece by piece, with no sum over the vocabulary. Each random number comes from
a counter (Philox: Salmon et al. 2011), keyed by the request's seed and the token's position, and counted by the
token id: a request draws the same numbers whoever else is in the batch.
"""

import torch
import triton
import triton.language as tl

PIECE = 4096  # logits a program reads
LN_2 = tl.constexpr(0.6931471805599453)


def sample(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Choose a token for each row: `[n]` int64.

    `logits` is `[n, vocab_size]`, `temperature` `[n]` float32, 0 is greedy; `keys` `[n]` int64, one for each seed and
    position. Of equal best logits, greedy takes the first. A row with a NaN, with +inf or with nothing but -inf gets -1.
    """
    n, vocab_size = logits.shape
    num_pieces = triton.cdiv(vocab_size, PIECE)
    best = torch.empty(n, num_pieces, dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(n, num_pieces, dtype=torch.int64, device=logits.device)
    sample_kernel[(n, num_pieces)](
        logits, temperature, keys, best, token_ids, logits.stride(0), vocab_size, PIECE=PIECE
    )
    winner = best.argmax(dim=-1, keepdim=True)  # NaN counts as the largest, and of equals the first wins
    return token_ids.gather(-1, winner).squeeze(-1)


@triton.jit
def sample_kernel(logits, temperature, keys, best, token_ids, row_stride, vocab_size, PIECE: tl.constexpr):
    """One program a row and a piece of the vocabulary: its best score, and whose it is."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    is_broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32)) > 0

    score = x
    t = tl.load(temperature + row)
    if t > 1e-5:  # below, the best token wins by far anyway, and the quotient could overflow
        # Philox makes four numbers at a time, and is most of the work: token i takes number i % 4 of counter i // 4. Of
        # its rounds, seven are the fewest that pass all of its authors' tests; Triton would make ten.
        a, b, c, d = tl.rand4x(tl.load(keys + row), piece * (PIECE // 4) + tl.arange(0, PIECE // 4), n_rounds=7)
        u = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [PIECE]) + 1e-10
        # An exponential number is -log(1 - u). What matters are the smallest, so u must be fine near 0: rand's is.
        waiting_time = tl.where(u < 1e-3, u * (1 + u / 2), -LN_2 * tl.log2(1 - u))
        score = x / t - LN_2 * tl.log2(waiting_time)

    highest = tl.max(score)
    winner = tl.min(tl.where(score == highest, token, vocab_size))  # the first of equals
    is_broken = is_broken | (highest == float("-inf"))
    at = row * tl.num_programs(1) + piece
    tl.store(best + at, tl.where(is_broken & (highest != float("-inf")), float("nan"), highest))
    tl.store(token_ids + at, tl.where(is_broken, -1, winner).to(tl.int64))

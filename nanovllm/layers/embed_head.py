"""The two ends of a model: tokens to vectors, and vectors to a score for each token of the vocabulary.

Several ranks share them by the vocabulary: each has the vectors of some tokens. If it does not divide, the last rank
has rows of zeros at its end, which belong to no token.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.linear import Linear
from nanovllm.utils.ranks import Ranks


class Embedding(nn.Module):
    """A vector for each token of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, ranks: Ranks) -> None:
        super().__init__()
        self.vocab_size, self.ranks = vocab_size, ranks
        num_rows = -(-vocab_size // ranks.size)
        self.tokens = range(num_rows * ranks.rank, min(num_rows * (ranks.rank + 1), vocab_size))  # this rank's
        self.weight = nn.Parameter(torch.zeros(num_rows, hidden_size))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` is `[num_tokens]`; returns `[num_tokens, hidden_size]`."""
        if self.ranks.size == 1:
            return F.embedding(input_ids, self.weight)
        rows = input_ids - self.tokens.start
        is_ours = (rows >= 0) & (rows < len(self.weight))
        # The others' tokens are zeros here, and one rank's vector plus zeros is that vector.
        return self.ranks.all_reduce(F.embedding(rows * is_ours, self.weight) * is_ours.unsqueeze(1))


class LMHead(Linear):
    """The matrix product that gives the logits.

    They stay in the type that the model computes in: the sampler makes each number float32 when it reads it, and
    150,000 logits a row are better not written twice.

    Tied to an embedding, it has that one's weight (Press and Wolf 2017, "Using the Output Embedding to Improve Language
    Models"). When it is packed the embedding keeps the original, for rows cannot be looked up in a packed weight.
    """

    def __init__(self, embedding: Embedding, tied: bool) -> None:
        num_rows, hidden_size = embedding.weight.shape
        super().__init__(hidden_size, num_rows)
        self.vocab_size, self.ranks, self.tokens = embedding.vocab_size, embedding.ranks, embedding.tokens
        if tied:
            self.weight = embedding.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` is `[num_rows, hidden_size]`; returns `[num_rows, vocab_size]`, on every rank."""
        logits = self.ranks.all_gather(super().forward(hidden_states))
        return logits[:, : self.vocab_size]

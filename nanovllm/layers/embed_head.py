"""The two ends of a model: tokens to vectors, and vectors to a score for each token of the vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.linear import Linear


class Embedding(nn.Module):
    """A vector for each token of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` is `[num_tokens]`; returns `[num_tokens, hidden_size]`."""
        return F.embedding(input_ids, self.weight)


class LMHead(Linear):
    """The matrix product that gives the logits.

    In float32 on a CPU, whatever the model computes in. On a GPU they stay as they are: the sampler makes each number
    float32 when it reads it, and 150,000 logits a row are better not written twice.

    Tied to an embedding, it has that one's weight (Press and Wolf 2017, "Using the Output Embedding to Improve Language
    Models"). When it is packed the embedding keeps the original, for rows cannot be looked up in a packed weight.
    """

    def __init__(self, embedding: Embedding, tied: bool) -> None:
        vocab_size, hidden_size = embedding.weight.shape
        super().__init__(hidden_size, vocab_size)
        if tied:
            self.weight = embedding.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` is `[num_rows, hidden_size]`; returns `[num_rows, vocab_size]`."""
        logits = super().forward(hidden_states)
        return logits if logits.is_cuda else logits.float()

"""What a step tells its attention layers.

A batch is *flat*: the new tokens of all its sequences stand one after the other in one `[num_tokens, ...]` tensor, and
everything but attention treats them alike. Attention alone must know which token belongs to whom and where each
sequence's keys and values lie. That knowledge is the `Context`; the model runner makes one for each step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Context:
    """The batch as attention sees it. Sequences with a single new token (decodes) stand first."""

    block_size: int
    num_decodes: int  # the first `num_decodes` sequences have exactly one new token each
    query_start: torch.Tensor  # [num_seqs + 1] int32: where each sequence's new tokens start, and the last one's end
    context_lens: torch.Tensor  # [num_seqs] int32: tokens each sequence can look back on, its new ones included
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32: physical block of each logical block; rest is padding
    # [num_tokens] int64: where each new token's K/V goes, block * block_size + offset. None for those who only attend.
    slot_mapping: torch.Tensor | None = None
    plan: Any = None  # what the attention backend derives from the above, once a step, for all layers


_context: ContextVar[Context] = ContextVar("context")  # each thread sees its own: two engines may run in two of them


def get_context() -> Context:
    """The context of the step that is running. LookupError outside of `use_context`."""
    return _context.get()


@contextmanager
def use_context(context: Context) -> Iterator[None]:
    """Make `context` the one that attention layers see, for the duration of a `with` block."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)

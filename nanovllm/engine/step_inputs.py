"""A step as numbers: sequences in, arrays of ids and counts out.

The model runner knows nothing of requests. It gets these arrays, in this process or, where several ranks share a model,
over a pipe in theirs. Sequences that run have a *row* each in its tables of what changes rarely, their block tables and
sampling settings. So only what is new is told: the settings of those who were admitted, and the blocks that were added.
"""

from array import array
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.scheduler import Batch
from nanovllm.sampling_params import SamplingParams

IN_FLIGHT = -1  # in the place of a token id


@dataclass(slots=True)
class StepInputs:
    """The tokens of a step, sequence after sequence, and what has changed in the tables since the last one."""

    admitted: list[tuple[int, SamplingParams]]  # new rows
    new_blocks: np.ndarray  # [3, n]: rows, places in their block tables, physical blocks
    rows: np.ndarray  # [num_seqs]: where each sequence's block table and settings stand
    num_new: np.ndarray  # [num_seqs]: tokens of each
    samples: np.ndarray  # [num_seqs] bool: its last token is among them, so the step tells the next one
    ends: np.ndarray  # [num_seqs]: where each one's tokens end in the batch
    context_lens: np.ndarray  # [num_seqs]: tokens each can look back on, the new ones included
    owner: np.ndarray  # [num_tokens]: whose each token is
    positions: np.ndarray  # [num_tokens]: where in its sequence it stands
    input_ids: np.ndarray  # [num_tokens]; `IN_FLIGHT` for one that a step in flight samples

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Of each sequence with several new tokens: how many they are, and how long its context is with them."""
        is_chunk = self.num_new > 1
        return list(zip(self.num_new[is_chunk].tolist(), self.context_lens[is_chunk].tolist()))


class InputCollector:
    """Makes a step's inputs, and remembers for each row how much of its block table has been told."""

    def __init__(self, num_rows: int) -> None:
        self.num_told_blocks = [0] * num_rows

    def collect(self, batch: Batch) -> StepInputs:
        """Attention wants sequences with a single new token first, so the batch is put in that order."""
        scheduled = batch.scheduled
        scheduled.sort(key=lambda s: s.num_new_tokens > 1)
        for seq in batch.admitted:
            self.num_told_blocks[seq.row] = 0
        rows: list[int] = []  # of blocks that are new: whose, where in its block table, and which
        places: list[int] = []
        blocks: list[int] = []
        token_ids = array("q")
        for s in scheduled:
            row, block_table = s.seq.row, s.seq.block_table
            told = self.num_told_blocks[row]
            if told < len(block_table):
                rows += [row] * (len(block_table) - told)
                places += range(told, len(block_table))
                blocks += block_table[told:]
                self.num_told_blocks[row] = len(block_table)
            end = s.num_computed_tokens + s.num_new_tokens
            token_ids += s.seq.token_ids[s.num_computed_tokens : end]
            if end > len(s.seq.token_ids):
                token_ids.append(IN_FLIGHT)

        starts = np.array([s.num_computed_tokens for s in scheduled])
        num_new = np.array([s.num_new_tokens for s in scheduled])
        owner = np.repeat(np.arange(len(scheduled)), num_new)  # from here on one entry a token
        ends = np.cumsum(num_new)
        return StepInputs(
            admitted=[(seq.row, seq.params) for seq in batch.admitted],
            new_blocks=np.array([rows, places, blocks], np.int64),
            rows=np.array([s.seq.row for s in scheduled]),
            num_new=num_new,
            samples=np.array([s.samples for s in scheduled]),
            ends=ends,
            context_lens=starts + num_new,
            owner=owner,
            positions=np.arange(len(owner)) - (ends - num_new)[owner] + starts[owner],
            input_ids=np.frombuffer(token_ids, np.int64),
        )

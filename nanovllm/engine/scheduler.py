"""The scheduler: who runs in the next step, and with how many tokens.

There is no prefill phase and no decode phase. A step has one budget of tokens; a sequence that generates needs one of
them, a sequence that is new needs as many as its prompt is long, or takes what is left of the budget and goes on in the
next step (chunked prefill, Sarathi-Serve, Agrawal et al. 2024). A sequence joins as soon as there is room and leaves as
soon as it is done (continuous batching, Orca, Yu et al. 2022).
"""

from collections import deque
from dataclasses import dataclass, field

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, Status


@dataclass(slots=True)
class ScheduledSequence:
    """A sequence's share of one step: `num_new_tokens` tokens, beginning with token `num_computed_tokens`."""

    seq: Sequence
    num_computed_tokens: int
    num_new_tokens: int
    samples: bool  # the last of its tokens is among them, so the step tells the next one


@dataclass(slots=True)
class Batch:
    """One step: what to compute, and what was decided on the way there."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_new_tokens for s in self.scheduled)


class Scheduler:
    """Plans steps over a `BlockManager`; first come, first served.

    To try another policy, subclass it and give the class to `LLM(scheduler=...)`. `waiting` is in the order in which
    sequences will be admitted, `running` in the order in which they were; a sequence preempted is the last of
    `running`.

    Planning and learning the result are two calls, `schedule` and `update`, so that a GPU can run one step while the
    next is planned: `schedule` advances counts, and needs a token's value only to hash a full block. A finished
    sequence keeps its blocks until no launched step uses them.
    """

    def __init__(self, config: Config, block_manager: BlockManager) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.block_manager = block_manager
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_rows = list(range(self.max_num_seqs))[::-1]

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. ValueError if it could not run even with all blocks to itself."""
        blocks = self.block_manager
        num_needed = blocks.num_blocks_for(seq.max_num_tokens - 1)  # the last token is never fed back
        if num_needed > blocks.num_blocks:
            raise ValueError(
                f"the request may grow to {seq.max_num_tokens} tokens and so needs {num_needed} KV cache blocks of "
                f"{blocks.block_size} tokens, but there are only {blocks.num_blocks}; shorten the prompt, lower "
                "max_tokens, or raise num_kv_blocks or kv_cache_memory"
            )
        self.waiting.append(seq)

    # -- Planning a step -----------------------------------------------------------------------------------------------

    def schedule(self) -> Batch:
        """Plan the next step, and count it as done. The batch is empty if there is nothing to do."""
        batch = Batch()
        budget = self.max_num_batched_tokens

        # Those who run already come first, so that new prompts never make them wait.
        out_of_blocks = False
        i = 0
        while i < len(self.running) and budget > 0 and not out_of_blocks:
            seq = self.running[i]
            i += 1
            if seq.num_tokens == seq.max_num_tokens:
                continue  # its last token is in flight
            num_new_tokens = min(seq.num_tokens - seq.num_computed_tokens, budget)
            while not self.block_manager.allocate(seq, seq.num_computed_tokens + num_new_tokens):
                out_of_blocks = self.running[-1].num_in_flight > 0
                if out_of_blocks:
                    break  # a launched step still writes to the victim's blocks: whoever is left sits this step out
                batch.preempted.append(self._preempt())
                if seq.status is Status.WAITING:
                    break  # it was the last itself
            else:
                self._add_to(batch, seq, num_new_tokens)
                budget -= num_new_tokens

        # A step that took blocks away admits nobody: the newcomer would take them next, and so on in turns.
        while self.waiting and budget > 0 and self.free_rows and not (batch.preempted or out_of_blocks):
            seq = self.waiting[0]
            if not self._admit(seq):
                break
            self.waiting.popleft()
            self.running.append(seq)
            batch.admitted.append(seq)
            num_new_tokens = min(seq.num_tokens - seq.num_computed_tokens, budget)
            self.block_manager.allocate(seq, seq.num_computed_tokens + num_new_tokens)
            self._add_to(batch, seq, num_new_tokens)
            budget -= num_new_tokens
        return batch

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence its cached prefix and a row, if the rest of its tokens would find room as well."""
        hits = self.block_manager.find(seq)
        num_missing = self.block_manager.num_blocks_for(seq.num_tokens) - len(hits)
        if num_missing > self.block_manager.num_free_without(hits):
            return False
        self.block_manager.share(seq, hits)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens
        seq.row = self.free_rows.pop()
        seq.status = Status.RUNNING
        return True

    def _add_to(self, batch: Batch, seq: Sequence, num_new_tokens: int) -> None:
        start = seq.num_computed_tokens
        self.block_manager.fill(seq, num_new_tokens)
        samples = seq.num_computed_tokens == seq.num_tokens
        if samples:
            seq.num_tokens += 1
        seq.num_in_flight += 1
        batch.scheduled.append(ScheduledSequence(seq, start, num_new_tokens, samples))

    def _preempt(self) -> Sequence:
        """Send the last running sequence back to wait. Its tokens stay; keys and values are computed again later."""
        seq = self.running.pop()
        self.waiting.appendleft(seq)
        self._release(seq, Status.WAITING)
        return seq

    # -- Learning what it gave -----------------------------------------------------------------------------------------

    def update(self, batch: Batch, token_ids: list[int]) -> list[Sequence]:
        """Take in a step's tokens, one for each sequence that sampled, in order. Returns the sequences they finished.

        Tokens for a sequence that has finished meanwhile are dropped.
        """
        finished = []
        tokens = iter(token_ids)
        for scheduled in batch.scheduled:
            seq = scheduled.seq
            seq.num_in_flight -= 1
            token_id = next(tokens) if scheduled.samples else None
            if seq.status is Status.FINISHED:
                if seq.num_in_flight == 0:
                    self._release(seq, Status.FINISHED)
            elif token_id is not None and token_id < 0:
                finished.append(seq)
                seq.finish_reason = "abort"  # NaN for logits: there was nothing to choose from
                self.block_manager.forget(seq)  # its keys and values may be NaN as well, and nobody shall find them
            elif token_id is not None:
                seq.token_ids.append(token_id)
                if token_id in seq.stop_token_ids:
                    finished.append(seq)
                    seq.finish_reason = "stop"
                elif len(seq.token_ids) == seq.max_num_tokens:
                    finished.append(seq)
                    seq.finish_reason = "length"
        for seq in finished:
            assert seq.finish_reason is not None
            self.finish(seq, seq.finish_reason)
        return finished

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence for the given `finish_reason`; its blocks come free once no launched step uses them."""
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        seq.finish_reason = reason
        seq.status = Status.FINISHED
        if seq.num_in_flight == 0:
            self._release(seq, Status.FINISHED)

    def fail(self, *launched: Batch) -> None:
        """All launched steps failed, or `schedule` raised half way: what they should have computed is not there.

        All who run wait to be computed again.
        """
        for batch in launched:
            for seq in (scheduled.seq for scheduled in batch.scheduled if scheduled.seq.status is Status.FINISHED):
                seq.num_in_flight = 0
                self.block_manager.forget(seq)
                self._release(seq, Status.FINISHED)
        while self.running:
            self.block_manager.forget(self.running[-1])
            self._preempt()
        for seq in self.waiting:
            seq.num_in_flight, seq.num_tokens = 0, len(seq.token_ids)
            self._release(seq, Status.WAITING)  # of one that was being admitted when `schedule` raised

    def _release(self, seq: Sequence, status: Status) -> None:
        seq.status = status
        self.block_manager.release(seq)
        if seq.row >= 0:
            self.free_rows.append(seq.row)
            seq.row = -1

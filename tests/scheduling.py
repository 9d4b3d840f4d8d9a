"""What the tests of the block manager and the scheduler share: short ways to make things, and a machine to run steps.

No torch: the machine's KV cache holds, in each slot, *which token prefix* it was computed for. So a test can see that
every sequence reads what belongs to it and nothing else, and the tokens it gets depend on every slot that it reads.
"""

from collections.abc import Iterable

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

VOCAB_SIZE = 5
GARBAGE = -1


def tokens(text: str) -> list[int]:
    """A prompt to read at a glance: a token for each letter. Spaces, which may mark off the blocks, do not count."""
    return [ord(letter) for letter in text if letter != " "]


def make_sequence(
    prompt: str | list[int], max_tokens: int = 8, id: int = 0, salt: str | None = None, stop: Iterable[int] = ()
) -> Sequence:
    prompt = tokens(prompt) if isinstance(prompt, str) else prompt
    params = SamplingParams(max_tokens=max_tokens, cache_salt=salt)
    return Sequence(id, prompt, params, len(prompt) + max_tokens, frozenset(stop))


def make_scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 100,
    caching: bool = True,
    policy: type[Scheduler] = Scheduler,
) -> Scheduler:
    config = Config(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    return policy(config, BlockManager(num_blocks, block_size, caching))


def shares(batch: Batch) -> list[tuple[int, int, int]]:
    """A batch to compare: (id, first token, number of tokens) of each sequence in it."""
    return [(s.seq.id, s.num_computed_tokens, s.num_new_tokens) for s in batch.scheduled]


def ids(seqs: Iterable[Sequence]) -> list[int]:
    return [seq.id for seq in seqs]


def step(scheduler: Scheduler, token: int = 0) -> Batch:
    """One step in which every sequence that samples gets `token`."""
    batch = scheduler.schedule()
    scheduler.update(batch, [token] * sum(s.samples for s in batch.scheduled))
    return batch


class Machine:
    """Stands in for the model and its KV cache.

    A token prefix is known by a number, the same for equal prefixes with equal salts and no others. What a slot gets
    follows, as in a model, from what is *read*: the slot before and the token. The next token follows from all slots.
    """

    def __init__(self, num_blocks: int, block_size: int, num_rows: int) -> None:
        self.block_size = block_size
        self.memory = [[GARBAGE] * block_size for _ in range(num_blocks)]
        self.writers: list[tuple[Sequence | None, int]] = [(None, 0)] * num_blocks  # who fills a block, how far
        self.last_tokens = [GARBAGE] * num_rows
        self.numbers: dict[tuple[int | str | None, int], int] = {}
        self.origins: list[tuple[int | str | None, int]] = []

    def prefix(self, before: int | str | None, token: int) -> int:
        """The number of the prefix `before` (the salt, if that is empty) with `token` after it."""
        number = self.numbers.setdefault((before, token), len(self.origins))
        if number == len(self.origins):
            self.origins.append((before, token))
        return number

    def next_token(self, context: list[int]) -> int:
        return hash(tuple(context)) % VOCAB_SIZE

    def alone(self, seq: Sequence) -> tuple[list[int], list[int]]:
        """The tokens and prefixes of `seq` as they must come out, had it a machine to itself and no stop token."""
        token_ids = seq.prompt_token_ids
        context: list[int] = []
        while len(context) < seq.max_num_tokens:
            if len(context) == len(token_ids):
                token_ids.append(self.next_token(context))
            context.append(self.prefix(context[-1] if context else seq.params.cache_salt, token_ids[len(context)]))
        return token_ids, context

    def read(self, seq: Sequence, num_tokens: int) -> list[int]:
        slots = [slot for block_id in seq.block_table for slot in self.memory[block_id]]
        assert num_tokens <= len(slots), "the block table is too short"
        return slots[:num_tokens]

    def run(self, batch: Batch) -> list[tuple[Sequence, list[int]]]:
        """Run a step: write every new slot, then read. Returns what each sequence read, in the order of the batch."""
        for scheduled in batch.scheduled:
            seq, end = scheduled.seq, scheduled.num_computed_tokens + scheduled.num_new_tokens
            for position in range(scheduled.num_computed_tokens, end):
                is_known = position < len(seq.token_ids)
                token_id = seq.token_ids[position] if is_known else self.last_tokens[seq.row]
                self._write(seq, position, self.prefix(self._before(seq, position), token_id))
        contexts = [(s.seq, self.read(s.seq, s.num_computed_tokens + s.num_new_tokens)) for s in batch.scheduled]
        for scheduled, (seq, context) in zip(batch.scheduled, contexts):
            if scheduled.samples:
                self.last_tokens[seq.row] = self.next_token(context)
        return contexts

    def run_badly(self, batch: Batch) -> None:
        """Run a step that goes wrong: what it writes is rubbish."""
        for scheduled in batch.scheduled:
            for i in range(scheduled.num_new_tokens):
                self._write(scheduled.seq, scheduled.num_computed_tokens + i, GARBAGE)
            self.last_tokens[scheduled.seq.row] = GARBAGE

    def _before(self, seq: Sequence, position: int) -> int | str | None:
        if position == 0:
            return seq.params.cache_salt
        return self.memory[seq.block_table[(position - 1) // self.block_size]][(position - 1) % self.block_size]

    def _write(self, seq: Sequence, position: int, value: int) -> None:
        """Write a slot. Whoever begins a block fills it, slot by slot, and then nobody writes it any more."""
        block_id, offset = seq.block_table[position // self.block_size], position % self.block_size
        assert offset == 0 or self.writers[block_id] == (seq, offset), f"{seq} writes to another's block {block_id}"
        self.writers[block_id] = (seq, offset + 1)
        self.memory[block_id][offset] = value


class Slips(Scheduler):
    """Somebody's own policy, with a mistake in it: the second request that it admits makes it raise half way."""

    num_admitted = 0

    def _admit(self, seq):
        is_admitted = super()._admit(seq)
        self.num_admitted += 1
        if self.num_admitted == 2:
            raise IndexError("a slip")
        return is_admitted

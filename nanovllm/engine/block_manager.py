"""The block manager: which physical block of the KV cache belongs to whom.

The KV cache is cut into blocks of `block_size` tokens, and a sequence holds a *block table*: for each of its logical
blocks the id of a physical one, anywhere in the cache. So a sequence grows block by block and wastes less than one
block, whatever its length turns out to be (PagedAttention, Kwon et al. 2023).

Full blocks never change again, so sequences that begin alike can share them: the *prefix cache*. A full block is found
by a hash of its tokens chained with the hash of the block before it, because keys and values depend on everything that
came before. A freed block keeps its content, and can be found, until its place is needed: least recently freed first.
"""

from collections import OrderedDict
from dataclasses import dataclass

from xxhash import xxh64_intdigest

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.trace import EventRow


@dataclass(slots=True)
class Block:
    """A physical block: how many sequences hold it and, if it is in the prefix cache, what it contains.

    A hash may collide, so it is only where to look. What a block contains is told by its tokens and its `parent`, the
    serial number of the content before it (for a sequence's first block, the request's cache salt). Serial numbers
    are never reused, unlike block ids, which name the place and not what lies there.

    Tokens are kept as bytes, 64 bits each, for Python's garbage collector looks through every young list, number by
    number, and a cache that fills makes thousands. (With lists 64 prompts of 1,024 tokens took 17 ms to plan, not 13,
    and now and then 200.)
    """

    ref_count: int = 0
    hash: int | None = None  # None: not in the prefix cache
    serial: int = -1
    parent: int | str = ""
    tokens: bytes | None = None


def hash_block(parent_hash: int | str, tokens: bytes) -> int:
    """The chained hash of a full block: `parent_hash` is the hash of the block before it, or the cache salt."""
    return xxh64_intdigest(f"{parent_hash}:".encode() + tokens)


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens, takes them back, and remembers what they hold.

    Every operation takes constant time for each block that it touches.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block() for _ in range(num_blocks)]
        self.cached: dict[int, int] = {}  # hash -> block
        self.num_contents = 0  # serial numbers given out
        # The queue of free blocks, next to be taken first: those that hold nothing, then the cached, oldest first.
        # An ordered dict, because a block that is hit leaves from the middle.
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.events: list[EventRow] | None = None  # where every change is told while a trace is open: see trace.py

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- Growing and giving back ---------------------------------------------------------------------------------------

    def allocate(self, seq: Sequence, num_tokens: int) -> bool:
        """Grow the block table of `seq` to hold `num_tokens`. False, and nothing done, if too few blocks are free."""
        num_missing = self.num_blocks_for(num_tokens) - len(seq.block_table)
        if num_missing > len(self.free):
            return False
        for _ in range(num_missing):
            block_id, _ = self.free.popitem(last=False)
            if self.blocks[block_id].hash is not None:
                self._forget(block_id)  # evicted
            self.blocks[block_id].ref_count = 1
            seq.block_table.append(block_id)
            self._tell("allocate", block_id, seq.id)
        return True

    def fill(self, seq: Sequence, num_new_tokens: int) -> None:
        """Count the next tokens of `seq` as computed: the step being scheduled puts them into its blocks."""
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_new_tokens
        seq.num_computed_tokens = end
        if self.events is not None:  # written out, for it comes for every sequence of every step
            for i in range(start // self.block_size, self.num_blocks_for(end)):
                filled = min(end - i * self.block_size, self.block_size)
                self.events.append(("fill", seq.block_table[i], seq.id, filled))
        if self.enable_prefix_caching:
            self._enter(seq)

    def release(self, seq: Sequence) -> None:
        """Give back all blocks of `seq`.

        A cached block goes to the end of the queue, the tail of the sequence before its head: a prefix is worth more
        than what follows it, which cannot be found without it. A block that holds nothing goes to the front.
        """
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            self._tell("free", block_id, seq.id)
            if block.ref_count == 0:
                self.free[block_id] = None
                if block.hash is None:
                    self.free.move_to_end(block_id, last=False)
        seq.block_table = []
        seq.num_computed_tokens = 0
        seq.num_entered_blocks = 0
        seq.parent = seq.params.cache_salt or ""

    def forget(self, seq: Sequence) -> None:
        """Take what the blocks of `seq` hold out of the prefix cache: its step has failed, or gave NaN."""
        for block_id in seq.block_table:
            if self.blocks[block_id].hash is not None:
                self._forget(block_id)

    def clear(self) -> None:
        """Make all blocks as new, the prefix cache empty. Nobody may hold any."""
        assert len(self.free) == self.num_blocks
        self.blocks = [Block() for _ in range(self.num_blocks)]
        self.cached = {}
        self.free = OrderedDict.fromkeys(range(self.num_blocks))
        self._tell("clear", 0)

    # -- The prefix cache ----------------------------------------------------------------------------------------------

    def find(self, seq: Sequence) -> list[int]:
        """The cached blocks that `seq` begins with; never its last token's, for one token at least must be computed."""
        hits: list[int] = []
        if not self.enable_prefix_caching:
            return hits
        parent: int | str = seq.params.cache_salt or ""
        for i in range((len(seq.token_ids) - 1) // self.block_size):
            hash, tokens = self._hash(seq, i)
            block_id = self.cached.get(hash)
            if block_id is None or not self._holds(block_id, parent, tokens):
                break
            hits.append(block_id)
            parent = self.blocks[block_id].serial
        return hits

    def num_free_without(self, hits: list[int]) -> int:
        """How many blocks would be free if `hits` were taken."""
        return len(self.free) - sum(self.blocks[block_id].ref_count == 0 for block_id in hits)

    def share(self, seq: Sequence, hits: list[int]) -> None:
        """Begin the block table of `seq` with `hits`, as `find` gave them: tokens that need not be computed."""
        for block_id in hits:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                del self.free[block_id]
            block.ref_count += 1
            seq.block_table.append(block_id)
            seq.parent = block.serial
            self._tell("share", block_id, seq.id)
        seq.num_entered_blocks = len(hits)
        seq.num_computed_tokens = len(hits) * self.block_size

    def _enter(self, seq: Sequence) -> None:
        """Enter into the cache the blocks of `seq` that are full, counting what the step being scheduled will compute.

        This is early, but safe: whoever finds such a block runs in this step or later, and every layer stores the
        keys and values of a step before it attends. Content that is cached already is not entered a second time.
        """
        num_known_tokens = min(seq.num_computed_tokens, len(seq.token_ids))
        for i in range(seq.num_entered_blocks, num_known_tokens // self.block_size):
            hash, tokens = self._hash(seq, i)
            block_id = self.cached.get(hash)
            if block_id is None or not self._holds(block_id, seq.parent, tokens):
                if block_id is not None:
                    self._forget(block_id)  # other content with the same hash: the newer one stays
                block_id = seq.block_table[i]
                block = self.blocks[block_id]
                block.hash, block.serial, block.parent, block.tokens = hash, self.num_contents, seq.parent, tokens
                self.cached[hash] = block_id
                self.num_contents += 1
                self._tell("cache", block_id, seq.id, hash)
            seq.parent = self.blocks[block_id].serial
            seq.num_entered_blocks += 1

    def _hash(self, seq: Sequence, i: int) -> tuple[int, bytes]:
        tokens = seq.token_ids[i * self.block_size : (i + 1) * self.block_size].tobytes()
        if i == len(seq.block_hashes):
            parent_hash = seq.block_hashes[-1] if seq.block_hashes else seq.params.cache_salt or ""
            seq.block_hashes.append(hash_block(parent_hash, tokens))
        return seq.block_hashes[i], tokens

    def _holds(self, block_id: int, parent: int | str, tokens: bytes) -> bool:
        block = self.blocks[block_id]
        return block.parent == parent and block.tokens == tokens

    def _forget(self, block_id: int) -> None:
        block = self.blocks[block_id]
        assert block.hash is not None
        del self.cached[block.hash]
        block.hash, block.tokens = None, None
        self._tell("evict", block_id)
        if block_id in self.free:
            self.free.move_to_end(block_id, last=False)

    # -- What is told --------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, block_id: int, seq_id: int | None = None, value: int | None = None) -> None:
        if self.events is not None:
            self.events.append((kind, block_id, seq_id, value))

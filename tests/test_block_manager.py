"""The block manager: hand-worked scenes with exact block ids, and random runs beside a plain model of the same rules.

In the scenes a block has four tokens, and a prompt is written with a letter for each token: "aaaa bbbb c".
"""

import gc
import time
from array import array
from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest

from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import BlockManager, hash_block
from nanovllm.engine.sequence import Sequence

from .scheduling import make_sequence, tokens


def compute(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> list[int]:
    """What the scheduler does for a step that computes the tokens of `seq` up to `num_tokens`. Returns its blocks."""
    num_tokens = len(seq.token_ids) if num_tokens is None else num_tokens
    assert blocks.allocate(seq, num_tokens)
    blocks.fill(seq, num_tokens - seq.num_computed_tokens)
    return seq.block_table


def admit(blocks: BlockManager, seq: Sequence) -> list[int]:
    """What the scheduler does for a sequence that comes in: cached blocks first, then the rest. Returns the hits."""
    hits = blocks.find(seq)
    blocks.share(seq, hits)
    compute(blocks, seq)
    return hits


def hits(blocks: BlockManager, prompt: str, salt: str | None = None) -> list[int]:
    return blocks.find(make_sequence(prompt, salt=salt))


def packed(text: str) -> bytes:
    """Tokens as a block keeps them."""
    return array("q", tokens(text)).tobytes()


def ref_counts(blocks: BlockManager) -> list[int]:
    return [block.ref_count for block in blocks.blocks]


# -- Growing and giving back -------------------------------------------------------------------------------------------


def test_a_sequence_grows_block_by_block():
    blocks = BlockManager(6, 4)
    a, b = make_sequence("aaaa b"), make_sequence("cccc")
    assert blocks.allocate(a, 3) and a.block_table == [0]
    assert blocks.allocate(a, 4) and a.block_table == [0]
    assert blocks.allocate(b, 1) and b.block_table == [1]
    assert blocks.allocate(a, 5) and a.block_table == [0, 2]
    assert blocks.allocate(a, 16) and a.block_table == [0, 2, 3, 4]
    assert list(blocks.free) == [5]
    assert ref_counts(blocks) == [1, 1, 1, 1, 1, 0]


def test_too_few_free_blocks_change_nothing():
    blocks = BlockManager(3, 4)
    a, b = make_sequence("aaaa"), make_sequence("bbbb bbbb bbbb")
    compute(blocks, a)
    assert not blocks.allocate(b, 12)
    assert b.block_table == [] and list(blocks.free) == [1, 2] and ref_counts(blocks) == [1, 0, 0]
    assert blocks.allocate(b, 8) and b.block_table == [1, 2]


@pytest.mark.parametrize("block_size, num_tokens, num_blocks", [(1, 5, 5), (4, 0, 0), (4, 1, 1), (4, 4, 1), (4, 5, 2)])
def test_number_of_blocks_for_tokens(block_size, num_tokens, num_blocks):
    assert BlockManager(9, block_size).num_blocks_for(num_tokens) == num_blocks


def test_blocks_that_hold_nothing_are_taken_again_first():
    blocks = BlockManager(6, 4, enable_prefix_caching=False)
    a = make_sequence("aaaa bbbb cccc")
    compute(blocks, a)
    blocks.release(a)
    assert list(blocks.free) == [0, 1, 2, 3, 4, 5]
    assert ref_counts(blocks) == [0] * 6


def test_cached_blocks_go_to_the_end_of_the_queue_tail_before_head_and_the_others_to_its_front():
    blocks = BlockManager(7, 4)
    a = make_sequence("aaaa bbbb cccc d")
    assert compute(blocks, a) == [0, 1, 2, 3]
    blocks.release(a)
    assert (a.block_table, a.num_computed_tokens, a.num_entered_blocks) == ([], 0, 0)
    assert list(blocks.free) == [3, 4, 5, 6, 2, 1, 0]


def test_least_recently_freed_is_evicted_first():
    blocks = BlockManager(5, 4)
    a, b, c = make_sequence("aaaa AAAA"), make_sequence("bbbb BBBB"), make_sequence("cccc")
    for seq in (a, b, c):
        compute(blocks, seq)
    for seq in (b, c, a):
        blocks.release(seq)
    assert list(blocks.free) == [3, 2, 4, 1, 0]

    new = make_sequence("xxxx yyyy zzzz")
    still_cached = []
    for num_blocks in range(4):
        compute(blocks, new, 4 * num_blocks)
        still_cached.append([hits(blocks, "bbbb BBBB +"), hits(blocks, "cccc +"), hits(blocks, "aaaa AAAA +")])
    assert new.block_table == [3, 2, 4]
    assert still_cached == [
        [[2, 3], [4], [0, 1]],
        [[2], [4], [0, 1]],
        [[], [4], [0, 1]],
        [[], [], [0, 1]],
    ]


def test_a_block_in_use_is_never_evicted():
    blocks = BlockManager(3, 4)
    a, b, c = make_sequence("aaaa +"), make_sequence("aaaa +"), make_sequence("cccc")
    admit(blocks, a)
    blocks.release(a)
    admit(blocks, b)
    assert b.block_table == [0, 1] and list(blocks.free) == [2]
    assert not blocks.allocate(c, 8)
    assert blocks.allocate(c, 4) and c.block_table == [2]


# -- The prefix cache --------------------------------------------------------------------------------------------------


def test_a_freed_block_is_found_until_it_is_evicted():
    blocks = BlockManager(6, 4)
    a, b = make_sequence("aaaa bbbb cccc d"), make_sequence("aaaa bbbb cccc e")
    compute(blocks, a)
    blocks.release(a)
    assert list(blocks.free) == [3, 4, 5, 2, 1, 0]
    assert admit(blocks, b) == [0, 1, 2]
    assert b.block_table == [0, 1, 2, 3] and b.num_computed_tokens == 13
    assert list(blocks.free) == [4, 5] and ref_counts(blocks) == [1, 1, 1, 1, 0, 0]


def test_a_hit_leaves_from_the_middle_of_the_queue():
    blocks = BlockManager(5, 4)
    a, b, c = make_sequence("aaaa"), make_sequence("bbbb"), make_sequence("cccc")
    for seq in (a, b, c):
        compute(blocks, seq)
    for seq in (a, b, c):
        blocks.release(seq)
    assert list(blocks.free) == [3, 4, 0, 1, 2]
    again = make_sequence("bbbb +")
    assert admit(blocks, again) == [1]
    assert again.block_table == [1, 3] and list(blocks.free) == [4, 0, 2]
    blocks.release(again)
    assert list(blocks.free) == [3, 4, 0, 2, 1], "it was used last, so it is evicted last"


def test_a_shared_block_is_free_when_its_last_holder_gives_it_back():
    blocks = BlockManager(6, 4)
    a, b, c = make_sequence("aaaa bbbb 1"), make_sequence("aaaa bbbb 2"), make_sequence("aaaa cccc 3")
    for seq in (a, b, c):
        admit(blocks, seq)
    assert [seq.block_table for seq in (a, b, c)] == [[0, 1, 2], [0, 1, 3], [0, 4, 5]]
    assert ref_counts(blocks) == [3, 2, 1, 1, 1, 1]
    blocks.release(a)
    assert ref_counts(blocks) == [2, 1, 0, 1, 1, 1] and list(blocks.free) == [2]
    blocks.release(b)
    assert ref_counts(blocks) == [1, 0, 0, 0, 1, 1] and list(blocks.free) == [3, 2, 1]
    blocks.release(c)
    assert ref_counts(blocks) == [0] * 6 and list(blocks.free) == [5, 3, 2, 1, 4, 0]


def test_only_full_blocks_that_are_computed_are_entered():
    blocks = BlockManager(4, 4)
    a = make_sequence("aaaa bbbb cc")
    compute(blocks, a, 7)
    assert hits(blocks, "aaaa bbbb cccc") == [0]
    compute(blocks, a, 8)
    assert hits(blocks, "aaaa bbbb cccc") == [0, 1]
    compute(blocks, a, 10)
    a.token_ids.extend(tokens("c"))
    blocks.fill(a, 2)  # the twelfth token is in flight: nobody knows yet what this block holds
    assert hits(blocks, "aaaa bbbb cccc d") == [0, 1]
    a.token_ids.extend(tokens("c"))
    blocks.fill(a, 0)
    assert hits(blocks, "aaaa bbbb cccc d") == [0, 1, 2], "generated tokens are found as those of a prompt are"


def test_a_prefix_is_found_only_up_to_the_first_difference():
    blocks = BlockManager(8, 4)
    compute(blocks, make_sequence("aaaa bbbb cccc dddd"))
    assert hits(blocks, "aaaa bbbb cccc dddd e") == [0, 1, 2, 3]
    assert hits(blocks, "aaaa bXbb cccc dddd e") == [0]
    assert hits(blocks, "Xaaa bbbb cccc dddd e") == []
    assert hits(blocks, "bbbb cccc dddd e") == [], "keys and values depend on all that came before"


def test_what_a_sequence_computes_after_a_hit_is_found_as_well():
    blocks = BlockManager(8, 4)
    a, b = make_sequence("aaaa bbbb"), make_sequence("aaaa bbbb cccc d")
    compute(blocks, a)
    assert admit(blocks, b) == [0, 1] and b.block_table == [0, 1, 2, 3]
    assert hits(blocks, "aaaa bbbb cccc e") == [0, 1, 2]


def test_the_last_token_is_never_found_for_one_must_be_computed():
    blocks = BlockManager(8, 4)
    compute(blocks, make_sequence("aaaa bbbb cccc"))
    assert hits(blocks, "aaaa bbbb cccc d") == [0, 1, 2]
    assert hits(blocks, "aaaa bbbb cccc") == [0, 1]
    assert hits(blocks, "aaaa") == []
    assert hits(blocks, "a") == []


def test_a_salt_keeps_caches_apart():
    blocks = BlockManager(8, 4)
    compute(blocks, make_sequence("aaaa bbbb"))
    compute(blocks, make_sequence("aaaa bbbb", salt="tenant"))
    assert hits(blocks, "aaaa bbbb +") == [0, 1]
    assert hits(blocks, "aaaa bbbb +", salt="tenant") == [2, 3]
    assert hits(blocks, "aaaa bbbb +", salt="another") == []


def test_salts_keep_tenants_apart_although_every_hash_collides(monkeypatch):
    monkeypatch.setattr(block_manager, "hash_block", lambda parent_hash, tokens: 7)
    blocks = BlockManager(8, 4)
    salts = ["red", "blue", None, "red"]
    for block, salt in enumerate(salts):
        compute(blocks, make_sequence("aaaa", salt=salt))
        found = [hits(blocks, "aaaa +", salt=other) for other in salts]
        assert found == [[block] if other == salt else [] for other in salts]


def test_a_salt_that_looks_like_a_hash_or_a_serial_number_finds_nothing():
    blocks = BlockManager(8, 4)
    compute(blocks, make_sequence("aaaa bbbb"))
    assert hits(blocks, "bbbb +", salt=str(hash_block("", packed("aaaa")))) == []
    assert hits(blocks, "bbbb +", salt="0") == []


def test_without_prefix_caching_nothing_is_found():
    blocks = BlockManager(8, 4, enable_prefix_caching=False)
    compute(blocks, make_sequence("aaaa bbbb"))
    assert hits(blocks, "aaaa bbbb +") == []


def test_content_computed_twice_is_entered_once_and_children_chain_on_from_the_first():
    blocks = BlockManager(9, 4)
    a, b = make_sequence("aaaa bbbb"), make_sequence("aaaa bbbb cccc")
    blocks.allocate(a, 8), blocks.allocate(b, 12)  # both came before anything was cached
    compute(blocks, a), compute(blocks, b)
    assert a.block_table == [0, 1] and b.block_table == [2, 3, 4]
    assert hits(blocks, "aaaa bbbb cccc d") == [0, 1, 4]
    blocks.release(b)
    assert list(blocks.free) == [2, 3, 5, 6, 7, 8, 4], "the copies hold nothing that could be found"
    blocks.release(a)
    assert hits(blocks, "aaaa bbbb cccc d") == [0, 1, 4]


def test_num_free_without_counts_only_hits_that_are_free():
    blocks = BlockManager(5, 4)
    a, b = make_sequence("aaaa bbbb"), make_sequence("aaaa +")
    compute(blocks, a)
    assert blocks.num_free_without([0, 1]) == 3
    admit(blocks, b)
    blocks.release(a)
    assert list(blocks.free) == [3, 4, 1]
    assert blocks.num_free_without([0, 1]) == 2


def test_what_a_failed_step_should_have_computed_leaves_the_cache():
    blocks = BlockManager(6, 4)
    a, b = make_sequence("aaaa bbbb 1"), make_sequence("aaaa bbbb 2")
    admit(blocks, a)
    admit(blocks, b)
    blocks.forget(b)
    blocks.release(b)
    assert hits(blocks, "aaaa bbbb +") == [] and ref_counts(blocks) == [1, 1, 1, 0, 0, 0]
    blocks.forget(a)
    blocks.release(a)
    assert list(blocks.free) == [0, 1, 2, 3, 4, 5] and not blocks.cached


def test_a_forgotten_block_that_is_free_is_taken_next(monkeypatch):
    monkeypatch.setattr(block_manager, "hash_block", lambda parent_hash, tokens: tokens[0])
    blocks = BlockManager(5, 4)
    a, b, c = make_sequence("aaaa"), make_sequence("bbbb"), make_sequence("abcd")
    for seq in (b, a):
        compute(blocks, seq)
    for seq in (b, a):
        blocks.release(seq)
    assert list(blocks.free) == [2, 3, 4, 0, 1]
    compute(blocks, c)  # has the hash of `a`, and takes its place in the cache
    assert c.block_table == [2]
    assert list(blocks.free) == [1, 3, 4, 0] and hits(blocks, "aaaa +") == [] and hits(blocks, "abcd +") == [2]


# -- Traps: each was seen in an engine ---------------------------------------------------------------------------------


def test_trap_64_bit_hash_trusted_without_checking_the_chain(monkeypatch):
    monkeypatch.setattr(block_manager, "hash_block", lambda parent_hash, tokens: 7)
    blocks = BlockManager(9, 4)
    a, b = make_sequence("aaaa bbbb"), make_sequence("cccc")
    compute(blocks, a, 4)
    assert hits(blocks, "aaaa +") == [0]
    assert hits(blocks, "bbbb +") == [] and hits(blocks, "aaaa +", salt="tenant") == []
    compute(blocks, a, 8)
    assert hits(blocks, "aaaa bbbb +") == [] and hits(blocks, "bbbb +") == [], "the parent is not cached any more"
    compute(blocks, b)
    assert hits(blocks, "cccc +") == [2] and hits(blocks, "aaaa +") == []
    assert blocks.cached == {7: 2}


def test_trap_block_id_taken_for_a_contents_identity(monkeypatch):
    """Block 0 holds first "aaaa", then "cccc". The "bbbb" in block 1 goes on from "aaaa", not from block 0."""
    monkeypatch.setattr(block_manager, "hash_block", lambda parent_hash, tokens: tokens[0])
    blocks = BlockManager(2, 4)
    a, child, c = make_sequence("aaaa"), make_sequence("aaaa bbbb"), make_sequence("cccc")
    compute(blocks, a)
    admit(blocks, child)
    blocks.release(child)
    blocks.release(a)
    assert list(blocks.free) == [1, 0]
    blocks.free.move_to_end(1)  # as if the child had been used later: the parent is evicted first
    assert compute(blocks, c) == [0]
    assert hits(blocks, "cccc bbbb +") == [0]
    assert hits(blocks, "aaaa bbbb +") == []


def test_a_child_is_not_found_after_its_parent_was_evicted_and_computed_again():
    """It could be, but its parent's serial number is gone: the newcomer computes it again, and takes over its hash."""
    blocks = BlockManager(5, 4)
    a, b, c = make_sequence("aaaa"), make_sequence("aaaa bbbb"), make_sequence("cccc cccc cccc")
    blocks.allocate(a, 4), blocks.allocate(b, 8)
    compute(blocks, a), compute(blocks, b)  # "bbbb" goes on from the block of `a`; `b` has its own copy of "aaaa"
    blocks.release(a)
    assert b.block_table == [1, 2] and compute(blocks, c) == [3, 4, 0]  # evicts the block of `a`
    assert hits(blocks, "aaaa bbbb +") == []
    blocks.release(c)
    again = make_sequence("aaaa bbbb +")
    assert admit(blocks, again) == [] and again.block_table == [0, 4, 3]
    assert hits(blocks, "aaaa bbbb +") == [0, 4]
    blocks.release(b)
    assert list(blocks.free) == [1, 2], "what it holds is not cached any more"


def test_an_evicted_block_is_found_under_what_it_holds_now():
    blocks = BlockManager(1, 4)
    for text in ("aaaa", "bbbb", "aaaa", "cccc"):
        seq = make_sequence(text)
        assert compute(blocks, seq) == [0]
        blocks.release(seq)
        assert [hits(blocks, f"{other} +") for other in ("aaaa", "bbbb", "cccc")] == [
            [0] if other == text else [] for other in ("aaaa", "bbbb", "cccc")
        ]
    assert len(blocks.cached) == 1


def test_each_block_of_a_sequence_is_hashed_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(
        block_manager, "hash_block", lambda parent, tokens: hashed.append(tokens) or hash_block("", tokens)
    )
    blocks = BlockManager(9, 4)
    a = make_sequence("aaaa bbbb cccc d")
    for _ in range(5):
        blocks.find(a)
    admit(blocks, a)
    blocks.release(a)
    admit(blocks, a)
    assert hashed == [packed(block) for block in ("aaaa", "bbbb", "cccc")]


def test_a_cache_that_fills_is_none_of_the_garbage_collectors_business():
    """It looks through what it keeps track of, number by number: 200 ms in the middle of a step, now and then."""
    blocks = BlockManager(1000, 4)
    seq = make_sequence("abcd" * 1000)
    gc.collect()
    before = len(gc.get_objects())
    compute(blocks, seq)
    assert len(blocks.cached) == 1000 and len(gc.get_objects()) < before + 10


def test_trap_removal_from_the_free_list_takes_longer_in_a_larger_cache():
    def seconds(num_blocks: int) -> float:
        """The least time, of some, to take a cached block from the middle of the queue, another one, and give back."""
        blocks = BlockManager(num_blocks, 1)
        before, after = make_sequence([1] * (num_blocks // 3)), make_sequence([2] * (num_blocks // 3))
        seqs = [make_sequence([10 + i, 1]) for i in range(100)]
        for seq in [before, *seqs, after]:
            compute(blocks, seq)
        for seq in [before, *seqs, after]:
            blocks.release(seq)
        times = []
        for seq in seqs:
            start = time.perf_counter()
            found = admit(blocks, seq)
            blocks.release(seq)
            times.append(time.perf_counter() - start)
            assert len(found) == 1
        return min(times)

    assert seconds(100_000) < 5 * seconds(1_000)


# -- Random runs -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Content:
    block: int
    key: object
    parent: "Content | str"
    token_ids: list[int]


class PlainBlocks:
    """The rules of the block manager in the plainest words: lists that are searched, nothing counted or remembered.

    A block is looked up by all that leads to it; or, to make collisions, by one of `num_hashes` hashes of its tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, caching: bool, num_hashes: int | None) -> None:
        self.block_size, self.caching, self.num_hashes = block_size, caching, num_hashes
        self.free = list(range(num_blocks))
        self.contents: list[Content] = []
        self.tables: dict[Sequence, list[int]] = {}
        self.entered: dict[Sequence, list[Content]] = {}
        self.events = Counter[str]()

    def is_cached(self, block: int) -> bool:
        return any(content.block == block for content in self.contents)

    def forget(self, block: int) -> None:
        self.contents = [content for content in self.contents if content.block != block]
        if block in self.free:
            self.free.remove(block)
            self.free.insert(0, block)

    def look_up(self, seq: Sequence, before: list[Content]) -> tuple[Content, Content | None]:
        """The block of `seq` after those `before`: what it should hold, and what is cached under its key."""
        salt = seq.params.cache_salt or ""
        cuts = [self.block_size * i for i in range(len(before) + 2)]
        parts = [seq.token_ids[start:end].tolist() for start, end in zip(cuts, cuts[1:])]
        key = sum(parts[-1]) % self.num_hashes if self.num_hashes else (salt, *parts)
        wanted = Content(-1, key, before[-1] if before else salt, parts[-1])
        return wanted, next((content for content in self.contents if content.key == wanted.key), None)

    def find(self, seq: Sequence) -> list[Content]:
        hits: list[Content] = []
        while self.caching and self.block_size * (len(hits) + 1) < len(seq.token_ids):
            wanted, there = self.look_up(seq, hits)
            if there is None or (there.parent, there.token_ids) != (wanted.parent, wanted.token_ids):
                self.events["collision"] += there is not None
                break
            hits.append(there)
        return hits

    def share(self, seq: Sequence, hits: list[Content]) -> None:
        self.tables[seq], self.entered[seq] = [hit.block for hit in hits], hits
        self.events["share"] += len(hits)
        for hit in hits:
            if hit.block in self.free:
                self.events["hit in the middle of the queue"] += hit.block not in (self.free[0], self.free[-1])
                self.free.remove(hit.block)

    def allocate(self, seq: Sequence, num_tokens: int) -> bool:
        needed = range(len(self.tables[seq]) * self.block_size, num_tokens, self.block_size)
        if len(needed) > len(self.free):
            self.events["no room"] += 1
            return False
        for _ in needed:
            self.tables[seq].append(self.free.pop(0))
            self.events["evict"] += self.is_cached(self.tables[seq][-1])
            self.forget(self.tables[seq][-1])
        return True

    def enter(self, seq: Sequence, num_tokens: int) -> None:
        entered = self.entered[seq]
        while self.caching and self.block_size * (len(entered) + 1) <= num_tokens:
            wanted, there = self.look_up(seq, entered)
            if there is not None and (there.parent, there.token_ids) == (wanted.parent, wanted.token_ids):
                self.events["computed twice"] += 1
            else:
                if there is not None:
                    self.events["collision"] += 1
                    self.forget(there.block)
                there, wanted.block = wanted, self.tables[seq][len(entered)]
                self.contents.append(there)
            entered.append(there)

    def release(self, seq: Sequence, forget: bool) -> None:
        table = self.tables.pop(seq)
        del self.entered[seq]
        for block in reversed(table):
            if forget:
                self.events["forget"] += self.is_cached(block)
                self.forget(block)
            if not any(block in other for other in self.tables.values()):
                self.free.insert(len(self.free) if self.is_cached(block) else 0, block)


def random_prompt(random: Random) -> list[int]:
    starts = [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1], []]
    return random.choice(starts) + [random.randrange(2) for _ in range(random.randint(1, 2))]


def run_beside_plain_blocks(seed: int, num_operations: int, monkeypatch) -> Counter[str]:
    random = Random(seed)
    num_blocks, block_size = random.randint(2, 16), random.randint(1, 3)
    caching, collisions = random.random() < 0.9, random.random() < 0.3
    few = random.randint(1, 4)
    if collisions:
        monkeypatch.setattr(block_manager, "hash_block", lambda parent, tokens: sum(tokens) % few)
    blocks = BlockManager(num_blocks, block_size, caching)
    plain = PlainBlocks(num_blocks, block_size, caching, few if collisions else None)
    waiting: list[Sequence] = []

    for _ in range(num_operations):
        running = list(plain.tables)
        kind = random.choice(
            ["admit", "admit", "compute", "compute", "compute", "generate", "release", "release", "forget"]
        )
        if kind == "admit" and len(running) < 6:
            if len(waiting) < 6:
                waiting.append(make_sequence(random_prompt(random), salt=random.choice([None, None, None, "salt"])))
            seq = waiting.pop(random.randrange(len(waiting)))
            hits, expected = blocks.find(seq), plain.find(seq)
            assert hits == [hit.block for hit in expected]
            num_free = blocks.num_free_without(hits)
            blocks.share(seq, hits)
            plain.share(seq, expected)
            assert num_free == len(plain.free)
            assert seq.num_computed_tokens == len(hits) * block_size
        elif kind == "compute" and running:
            seq = random.choice(running)
            num_tokens = random.randint(seq.num_computed_tokens, len(seq.token_ids))
            is_done = blocks.allocate(seq, num_tokens)
            assert is_done == plain.allocate(seq, num_tokens)
            if is_done:
                blocks.fill(seq, num_tokens - seq.num_computed_tokens)
                plain.enter(seq, num_tokens)
        elif kind == "generate" and running:
            random.choice(running).token_ids.append(random.randrange(2))
        elif running and (kind == "release" or random.random() < 0.5):
            seq = random.choice(running)
            if kind == "forget":
                blocks.forget(seq)
            blocks.release(seq)
            plain.release(seq, forget=kind == "forget")
            waiting.append(seq)

        assert list(blocks.free) == plain.free
        assert all(seq.block_table == plain.tables.get(seq, []) for seq in [*running, *waiting, *plain.tables])
        held = Counter(block for table in plain.tables.values() for block in table)
        assert ref_counts(blocks) == [held[block] for block in range(num_blocks)]
        assert sorted(blocks.cached.values()) == sorted(content.block for content in plain.contents)
    return plain.events


def test_60_000_random_operations_give_what_a_plain_model_gives(monkeypatch):
    events = Counter[str]()
    for seed in range(300):
        with monkeypatch.context() as patch:
            events += run_beside_plain_blocks(seed, 200, patch)
    kinds = ["share", "evict", "collision", "forget", "hit in the middle of the queue", "no room"]
    assert min(events[kind] for kind in kinds) >= 1000 and events["computed twice"] >= 300, events

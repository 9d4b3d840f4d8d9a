"""What chapter 06 shares: chapter 01's decoder, its pictures, exercise checks; the reader's ring; figures."""

import re
import threading
from queue import Queue

import pytest
import torch

from nanovllm.lessons import chapter_06
from nanovllm.lessons.chapter_06 import (
    Matrix,
    NoMessage,
    attention,
    contributors,
    draw_layer,
    draw_messages,
    draw_products,
    norm,
    on_peers,
    owner,
    rotate,
)
from nanovllm.lessons.series import NOTEBOOKS
from tests.describing import describe
from tests.test_notebooks import check_numbers_are_seen, check_told, read, verdict
from tests.test_rank_map import SMOLLM2

CHAPTER = NOTEBOOKS / "06_tensor_parallelism.ipynb"


def code_of(path, id: str, upto: str) -> str:
    """The code of a cell, as far as the line that begins with `upto`."""
    (source,) = (cell.source for cell in read(path).cells if cell.id == id)
    code, found, _ = source.partition(f"\n\n\n{upto}")
    assert found
    return code


# -- Chapter 01's decoder ----------------------------------------------------------------------------------------------


def test_the_parts_of_the_decoder_are_those_of_chapter_01():
    chapter_01 = NOTEBOOKS / "01_kv_cache.ipynb"
    namespace: dict = {"torch": torch, "HEAD_DIM": 64, "matmul": lambda kind, a, b: a @ b}
    for id, upto in (("parts", "query, key ="), ("attention", "torch.manual_seed")):
        exec(code_of(chapter_01, id, upto), namespace)
    x, weights = torch.randn(5, 576), {"n.weight": torch.randn(576)}
    assert norm(weights, "n", x).equal(namespace["norm"](weights, "n", x))
    heads, positions = torch.randn(5, 9, 64), torch.arange(5)
    assert rotate(heads, positions).equal(namespace["rotate"](heads, positions))
    for num_heads, num_kv_heads in ((9, 3), (3, 1), (1, 1)):
        query, (key, value) = torch.randn(2, num_heads, 64), torch.randn(2, 5, num_kv_heads, 64)
        assert attention(query, key, value).equal(namespace["attention"](query, key, value))


# -- The reader's ranks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chapter() -> dict:
    """The chapter's `run` and `all_reduce`, without what they are tried on."""
    namespace: dict = {"torch": torch, "Queue": Queue}
    exec("from concurrent.futures import ThreadPoolExecutor", namespace)
    for id, upto in (("ranks", "print("), ("all-reduce", "ranks, sums")):
        exec(code_of(CHAPTER, id, upto), namespace)
    return namespace


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 2), (4, 576)])
def test_the_readers_ring(chapter, size, shape):
    """Also where the tensor cannot be cut evenly, and where there are more ranks than numbers."""
    inputs = torch.randn(size, *shape, generator=torch.Generator().manual_seed(size))
    before = inputs.clone()
    ranks, sums = chapter["run"](size, lambda rank: chapter["all_reduce"](rank, inputs[rank.number]))
    assert inputs.equal(before)
    assert all(total.equal(sums[0]) for total in sums)
    torch.testing.assert_close(sums[0], inputs.sum(dim=0))
    assert all(len(rank.sent) == 2 * (size - 1) for rank in ranks)


# -- Pictures ----------------------------------------------------------------------------------------------------------


def test_whose_a_number_is():
    values = torch.zeros(4, 6)
    assert [owner(Matrix("A", values, "columns"), 3, column, 3) for column in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [owner(Matrix("B", values.T, "rows"), row, 1, 3) for row in range(6)] == [0, 0, 1, 1, 2, 2]
    assert owner(Matrix("z", values, 2), 0, 0, 3) == 2 and owner(Matrix("x", values), 0, 0, 3) is None


def texts(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_products_are_drawn_with_their_numbers():
    figure = draw_products([[Matrix("A", torch.tensor([[1, -2], [3, 40]]), "rows"), "="]], size=2)
    assert texts(figure) == ["1", "-2", "3", "40", "A", "="]
    (ax,) = figure.axes
    assert len({patch.get_facecolor() for patch in ax.patches}) == 2


def test_messages_show_whose_numbers_they_hold():
    assert contributors(5, 3) == [0, 2] and contributors(7, 3) == [0, 1, 2] and contributors(0, 3) == []
    figure = draw_messages([[torch.tensor([1]), torch.tensor([3])], [torch.tensor([2]), torch.tensor([3])]])
    shown = [text for text in texts(figure) if text.isdigit()]
    assert shown == ["0", "0", "1", "1", "0", "1"]


def test_the_opening_picture(monkeypatch):
    monkeypatch.setattr(chapter_06, "record_ranks", lambda: describe(3, **SMOLLM2))
    figure = draw_layer()
    assert [text for text in texts(figure) if text.endswith("_proj")] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip
    assert texts(figure).count("all-\nreduce") == 2


# -- Figures in the text -----------------------------------------------------------------------------------------------

DERIVED = {
    "60": "minutes",
    "49152": "rows of the embedding, chapter 01",
    "141": "70.55 billion parameters, chapter 01, 2 bytes each",
    "80": "GB of an H100, chapter 01",
    "900": "NVIDIA's data sheet of the H100 SXM: NVLink, both directions",
    "128": "the same: PCIe Gen5; and 512 / 4",
    "400": "Gb/s",
    "16384": "49,152 / 3",
    "10717": "27,101 - 16,384",
    "14": "2 · 7 messages",
    "1.33": "2 · 2 / 3",
    "65536": "16,384 · 4",
    "17": "2,048 · 4,096 · 2 bytes are 16.8 MB",
    "44.9": "44,861,760",
    "134.5": "134,515,008",
    "140544": "61 · 576 · 4",
    "2560": "10 · 64 · 4",
    "1536": "the MLP, chapter 01",
    "989": "chapter 01",
    "3.35": "chapter 01",
}


def test_the_numbers_of_the_prose_are_seen():
    besides = re.compile(r"[Cc]hapters?\s\d\d(?: and \d\d)?|\b20[012]\d\b|!\[.*?\]|# 06|Llama-3|Qwen2")
    check_numbers_are_seen(CHAPTER, besides, DERIVED)


def test_what_the_prose_says_of_when_it_pays():
    namespace: dict = {}
    exec(code_of(CHAPTER, "pays", "for case in"), namespace)

    def times_as_fast(*case, size=8, way="ring"):
        seconds = [sum(namespace["step_seconds"](*case, n, way)) for n in (1, size)]
        return seconds[0] / seconds[1]

    assert round(times_as_fast("Llama-3-8B", "NVLink", 1), 1) == 2.9
    assert round(times_as_fast("Llama-3-8B", "NVLink", 1, way="pairs"), 1) == 4.0
    for tokens in (1, 16, 64, 256, 2048):
        for way in ("ring", "pairs"):
            assert 3.7 < times_as_fast("Llama-3-70B", "NVLink", tokens, way=way) < 6.5  # four to six times
            for link in namespace["LINKS"]:
                for size in (2, 4, 8):
                    assert times_as_fast("SmolLM2-135M", link, tokens, size=size, way=way) < 1
    for link, pays in {"NVLink": True, "PCIe Gen5": False, "Ethernet 100": False}.items():
        assert all((times_as_fast("Llama-3-8B", link, 2048, size=n) > 1) == pays for n in (2, 4, 8))
        assert all(times_as_fast("Llama-3-8B", link, 1, size=n) > 1 for n in (2, 4, 8))
    assert times_as_fast("Llama-3-8B", "NVLink", 2048) > times_as_fast("Llama-3-8B", "NVLink", 2048, way="pairs")


# -- Exercises ---------------------------------------------------------------------------------------------------------

WRONG = [
    (1, "def row_parallel(rank, x, weight, bias, all_reduce):\n"
        "    return all_reduce(x @ weight.T + bias)", "has the bias 2 times in its result"),
    (1, "def row_parallel(rank, x, weight, bias, all_reduce):\n"
        "    return all_reduce(x @ weight.T)", "has no bias in its result"),
    (1, "def row_parallel(rank, x, weight, bias, all_reduce):\n"
        "    return x @ weight.T + bias", "never calls all_reduce"),
    (1, "def row_parallel(rank, x, weight, bias, all_reduce):\n"
        "    y = all_reduce(x @ weight.T)\n"
        "    return y + bias if rank == 0 else y", "rank 1 has no bias"),
    (1, "def row_parallel(rank, x, weight, bias, all_reduce):\n"
        "    return all_reduce(x @ weight.T) + bias if rank == 0 else x @ weight.T", "others do not"),
    (1, "def row_parallel(rank, x, weight, bias, all_reduce):\n"
        "    return all_reduce(x @ weight.T) + all_reduce(bias)", "calls all_reduce 2 times"),
    (1, "def row_parallel(rank, x, weight, bias, all_reduce):\n"
        "    return all_reduce(x @ weight) + bias", "Your code raised RuntimeError"),
    (2, "def all_reduce_fast(rank, x):\n"
        "    pieces = x\n"
        "    for _ in range(rank.size - 1):\n"
        "        rank.send((rank.number + 1) % rank.size, pieces)\n"
        "        pieces = rank.receive((rank.number - 1) % rank.size)\n"
        "        x = x + pieces\n"
        "    return x", "a rank sends 3 messages. 2 are enough"),
    (2, "def all_reduce_fast(rank, x):\n"
        "    if rank.size > 1:\n"
        "        rank.send(rank.number ^ 1, x)\n"
        "        x = x + rank.receive(rank.number ^ 1)\n"
        "    return x", "what ranks 0 and 1 gave, and nothing else"),
    (2, "def all_reduce_fast(rank, x):\n"
        "    return x", "what rank 0 gave, and nothing else"),
    (2, "def all_reduce_fast(rank, x):\n"
        "    distance = 1\n"
        "    while distance < rank.size:\n"
        "        rank.send((rank.number + distance) % rank.size, x)\n"
        "        x = x + rank.receive(rank.number ^ distance)\n"
        "        distance *= 2\n"
        "    return x", "everybody is stuck"),
    (2, "def all_reduce_fast(rank, x):\n"
        "    return 7", "not a tensor"),
    (2, "def all_reduce_fast(rank, x):  # up a tree to rank 0, and back down\n"
        "    bits = [2**i for i in range(rank.size.bit_length() - 1)]\n"
        "    mine = next((i for i, bit in enumerate(bits) if rank.number & bit), len(bits))\n"
        "    for bit in bits[:mine]:\n"
        "        x = x + rank.receive(rank.number + bit)\n"
        "    if rank.number:\n"
        "        rank.send(rank.number - bits[mine], x)\n"
        "        x = rank.receive(rank.number - bits[mine])\n"
        "    for bit in bits[:mine]:\n"
        "        rank.send(rank.number + bit, x)\n"
        "    return x", "2 messages come one after the other. 1 would do"),
    (2, "def all_reduce_fast(rank, x):  # not in pairs: everybody sends ahead\n"
        "    distance = 1\n"
        "    while distance < rank.size:\n"
        "        rank.send((rank.number + distance) % rank.size, x)\n"
        "        x = x + rank.receive((rank.number - distance) % rank.size)\n"
        "        distance *= 2\n"
        "    return x", "differ in their last bits"),
    (3, "def kv_heads_of(rank, size, num_heads, num_kv_heads):\n"
        "    each = num_kv_heads // size\n"
        "    return list(range(rank * each, (rank + 1) * each))", "when there are too few, they are copied"),
    (3, "def kv_heads_of(rank, size, num_heads, num_kv_heads):\n"
        "    return list(range(num_kv_heads))", "that nobody reads there"),
    (3, "def kv_heads_of(rank, size, num_heads, num_kv_heads):\n"
        "    return [rank % num_kv_heads]", "and you return"),
    (3, "def kv_heads_of(rank, size, num_heads, num_kv_heads):\n"
        "    each = max(1, num_kv_heads // size)\n"
        "    first = rank * each % num_kv_heads\n"
        "    return list(range(first, first + each))", "Rank 1 has query heads 1 alone"),
    (4, "def top_k(ranks, k):\n"
        "    found = [pair for rank in ranks for pair in zip(*rank.topk(k))]\n"
        "    return [token for _, token in sorted(found, reverse=True)[:k]]", "is no token id"),
    (4, "def top_k(ranks, k):\n"
        "    found = [(v, rank.start + p) for rank in ranks for v, p in zip(*rank.topk(2))]\n"
        "    return [token for _, token in sorted(found, reverse=True)[:k]]", "may stand on one rank"),
    (4, "def top_k(ranks, k):\n"
        "    found = [(v, rank.start + p) for rank in ranks for v, p in zip(*rank.topk(len(rank)))]\n"
        "    return [token for _, token in sorted(found, reverse=True)[:k]]", "Nobody needs more than"),
    (4, "def top_k(ranks, k):\n"
        "    found = [(v, rank.start + p) for rank in ranks for v, p in zip(*rank.topk(k))]\n"
        "    return [token for _, token in sorted(found)[-k:]]", "not with the highest logit first"),
    (4, "def top_k(ranks, k):\n"
        "    return [rank.start + rank.topk(1)[1][0] for rank in ranks]", "tokens."),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(number, answer, words, monkeypatch):
    monkeypatch.setattr(chapter_06, "PATIENCE", 0.3)
    check_told(CHAPTER, number, answer, words)


def test_other_right_answers():
    """There is more than one way."""
    right = {
        1: "def row_parallel(rank, x, weight, bias, all_reduce):\n"
        "    return all_reduce(x @ weight.T + (bias if rank == 0 else 0))",
        3: "from nanovllm.utils.ranks import Ranks\n"
        "def kv_heads_of(rank, size, num_heads, num_kv_heads):\n"
        "    return Ranks(rank, size).share(num_kv_heads)",
        4: "def top_k(ranks, k):\n"
        "    logits = [logit for rank in ranks for logit in rank.topk(k)[0]]\n"
        "    tokens = [rank.start + place for rank in ranks for place in rank.topk(k)[1]]  # asked twice\n"
        "    return [token for _, token in sorted(zip(logits, tokens), reverse=True)[:k]]",
    }
    for number, answer in right.items():
        for seed in range(5):
            assert verdict(CHAPTER, number, answer, seed).right


def test_a_rank_that_waits_in_vain_says_for_whom(monkeypatch):
    monkeypatch.setattr(chapter_06, "PATIENCE", 0.1)
    with pytest.raises(NoMessage, match="rank 0 waits for a message from rank 1, and none comes"):
        on_peers(2, lambda peer: peer.receive(1 - peer.number) if peer.number == 0 else None)
    assert threading.active_count() < 20


def test_peers_send_copies():
    def program(peer):
        x = torch.zeros(2)
        peer.send(1 - peer.number, x)
        x += 1
        return peer.receive(1 - peer.number)

    assert all(result.equal(torch.zeros(2)) for result in on_peers(2, program)[1])
    with pytest.raises(ValueError, match="rank 0 of 2 sends to rank 0"):
        on_peers(2, lambda peer: peer.send(peer.number, torch.zeros(1)))

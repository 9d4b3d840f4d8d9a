"""Every attention backend against plain attention in float64, on every device that it runs on.

Triton's kernels run on a CPU in Triton's interpreter, if the environment says so when they are imported. So this file
runs itself once more, in a process of its own, for that backend alone. FlashAttention's do not run on a CPU at all:
there `tests/flash_stand_in.py` takes their place. What is tested then is not them, but what the backend tells them.
"""

import importlib.util
import itertools
import math
import random
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from nanovllm.kernels import TRITON_FROM, get_backend, torch_attention, triton_version
from nanovllm.kernels.check import check, choose_backend
from nanovllm.kernels.torch_attention import MAX_PADDING, group_by_length
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import use_context
from tests import flash_stand_in, interpreter
from tests.conftest import TOLERANCE
from tests.paged import make_context, slots_of

if interpreter.IS_ON:
    WHERE = [("triton", "cpu")]
else:
    WHERE = [("torch", "cpu"), ("flash_attn", "cpu")]
    if torch.cuda.is_available():
        WHERE += [("torch", "cuda"), ("triton", "cuda")]
        if importlib.util.find_spec("flash_attn") and torch.cuda.get_device_capability() >= (8, 0):
            WHERE += [("flash_attn", "cuda")]
on_every_backend = pytest.mark.parametrize("backend, device", WHERE)
pytestmark = pytest.mark.usefixtures("seeded")


def module_of(backend: str, device: str) -> ModuleType:
    if (backend, device) == ("flash_attn", "cpu"):
        return flash_stand_in.backend()
    return get_backend(backend, device)


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact causal attention of the last tokens of a sequence, in float64.

    `query` is [query_len, num_heads, head_dim], `key` and `value` are [context_len, num_kv_heads, head_dim].
    """
    group = query.size(1) // key.size(1)
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * scale
    query_len, context_len = scores.shape[1:]
    is_later = torch.ones(query_len, context_len, device=query.device).triu(context_len - query_len + 1).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(is_later, float("-inf")).softmax(-1), value)


def check_attention(
    query_lens: list[int],
    context_lens: list[int],
    dtype: torch.dtype | None = None,
    block_size: int = 16,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    num_shared: int = 0,
    backend: str = "torch",
    device: str = "cpu",
) -> None:
    """Run a step through the attention layer and compare each sequence with dense attention.

    The dtype is float32 unless it is given, for FlashAttention float16, and its blocks are rounded up to what it takes.
    Blocks are scattered at random. All slots that hold no token are NaN, those of block 0 always. Sequences begin with
    `num_shared` blocks that are the same; if nobody has computed them yet, the longest prefill does, in this very step.
    """
    if backend == "flash_attn":
        if dtype == torch.float32 or head_dim % 8:
            pytest.skip("FlashAttention refuses it")
        block_size = -(-block_size // 256) * 256
    dtype = dtype or (torch.float16 if backend == "flash_attn" else torch.float32)
    tables, keys, values = [], [], []
    num_blocks = sum(-(-n // block_size) for n in context_lens) + 5
    free = (1 + torch.randperm(num_blocks - 1)).tolist()
    shared = [free.pop() for _ in range(num_shared)]
    shared_kv = torch.randn(2, num_shared * block_size, num_kv_heads, head_dim, dtype=dtype, device=device)
    for context_len in context_lens:
        tables.append(shared + [free.pop() for _ in range(-(-context_len // block_size) - num_shared)])
        own = torch.randn(2, context_len - shared_kv.size(1), num_kv_heads, head_dim, dtype=dtype, device=device)
        key, value = torch.cat((shared_kv, own), dim=1)
        keys.append(key)
        values.append(value)
    query = torch.randn(sum(query_lens), num_heads, head_dim, dtype=dtype, device=device)

    module = module_of(backend, device)
    kv_cache = module.allocate(2, num_blocks, block_size, num_kv_heads, head_dim, dtype, device)
    assert kv_cache.shape == (2, 2, num_blocks + 1, block_size, num_kv_heads, head_dim)
    kv_cache.fill_(float("nan"))
    layer = Attention(num_heads, head_dim, head_dim**-0.5, num_kv_heads)
    layer.bind(module, kv_cache[0, 1], kv_cache[1, 1])
    computed_now = {
        slot for t, n, c in zip(tables, query_lens, context_lens) for slot in slots_of(t, range(c - n, c), block_size)
    }
    for table, key, value, query_len, context_len in zip(tables, keys, values, query_lens, context_lens):
        slots = slots_of(table, range(context_len - query_len), block_size)
        before = [i for i, slot in enumerate(slots) if slot not in computed_now]
        where = torch.tensor([slots[i] for i in before], dtype=torch.int64, device=device)
        module.store(key[before], value[before], layer.k_cache, layer.v_cache, where)

    new_keys = torch.cat([key[len(key) - n :] for key, n in zip(keys, query_lens)])
    new_values = torch.cat([value[len(value) - n :] for value, n in zip(values, query_lens)])
    with use_context(make_context(block_size, tables, query_lens, context_lens, device)):
        output = layer(query, new_keys, new_values).view_as(query)

    assert kv_cache[:, 0].isnan().all()  # the other layer's part of the cache
    for rows, key, value in zip(torch.arange(len(query)).split(query_lens), keys, values):
        expected = dense_attention(query[rows], key, value, layer.scale)
        torch.testing.assert_close(output[rows].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


HEADS = [(4, 4, 32), (4, 2, 64), (9, 3, 64), (8, 1, 16), (3, 3, 24), (6, 2, 17), (20, 1, 64)]


@on_every_backend
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, block_size", [*zip(HEADS, itertools.cycle([1, 16, 80]))])
def test_a_mixed_batch(heads, block_size, dtype, backend, device):
    num_heads, num_kv_heads, head_dim = heads
    query_lens = [1, 1, 1, 1, 7, 33, 40, 2]
    context_lens = [1, 64, 37, 100, 7, 33, 90, 17]
    shapes = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    check_attention(query_lens, context_lens, dtype, block_size, **shapes, backend=backend, device=device)


@on_every_backend
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_large_heads(head_dim, dtype, backend, device):
    context_lens = [1, 50, 700, 40]  # 700: split, where a backend splits
    check_attention([1, 1, 1, 20], context_lens, dtype, 256, 4, 2, head_dim, backend=backend, device=device)


@on_every_backend
@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed, backend, device):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    block_size = rng.choice([1, 2, 5, 16, 32])
    num_decodes, num_prefills = rng.randint(0, 12), rng.randint(0, 3)
    query_lens = [1] * num_decodes + [rng.randint(2, 50) for _ in range(num_prefills)] or [1]
    context_lens = [n + rng.choice([0, rng.randint(0, 200), 16]) for n in query_lens]
    check_attention(query_lens, context_lens, block_size=block_size, backend=backend, device=device)


@on_every_backend
def test_lengths_around_the_ends_of_blocks_tiles_and_splits(backend, device):
    check_attention(
        [1] * 9, [15, 16, 17, 63, 64, 65, 511, 512, 513], num_heads=2, num_kv_heads=1, backend=backend, device=device
    )


@on_every_backend
def test_a_context_of_more_pieces_than_there_may_be(backend, device, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr(module_of(backend, device), "SPLIT_SIZE", 64)  # 16 pieces hold 1,024 tokens
    check_attention([1] * 4, [1024, 1025, 1500, 70], num_heads=2, num_kv_heads=1, backend=backend, device=device)


@on_every_backend
def test_a_long_decode_beside_a_short_one(backend, device):
    """The long context is split in eight, the short one is not."""
    check_attention([1, 1], [4096, 3], num_heads=2, num_kv_heads=1, backend=backend, device=device)


@pytest.mark.skipif(not interpreter.IS_ON, reason="what is compiled for this Triton has one way")
@pytest.mark.parametrize("masks_all", [True, False])
def test_keys_are_hidden_as_for_old_and_new_tritons(masks_all, monkeypatch):
    monkeypatch.setattr(module_of("triton", "cpu"), "MASKS_ALL", masks_all)
    check_attention([1, 1, 1, 70, 33], [1, 65, 600, 70, 200], num_heads=4, num_kv_heads=2, backend="triton")


@pytest.mark.skipif(interpreter.IS_ON, reason="too slow in an interpreter")
@on_every_backend
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [16, 256])
def test_long_contexts(block_size, dtype, backend, device):
    query_lens = [1] * 13 + [300, 5, 700]
    context_lens = [1, 15, 16, 17, 511, 512, 513, 1024, 1025, 2047, 3000, 4095, 4096, 300, 1000, 4096]
    check_attention(query_lens, context_lens, dtype, block_size, 4, 2, 128, backend=backend, device=device)


@on_every_backend
def test_blocks_that_are_shared_with_a_sequence_of_the_same_step(backend, device):
    """Two decodes and a prefill begin with the two blocks that the last sequence computes only now."""
    size = 256 if backend == "flash_attn" else 16
    query_lens, context_lens = [1, 1, 5, 2 * size + 8], [2 * size + n for n in (1, 18, 9, 8)]
    check_attention(query_lens, context_lens, block_size=size, num_shared=2, backend=backend, device=device)


@pytest.mark.skipif(interpreter.IS_ON, reason="too slow in an interpreter")
@on_every_backend
def test_chunks_and_decodes_around_the_ends_of_large_blocks(backend, device):
    query_lens, context_lens = [1, 1, 1, 1, 2, 7, 300, 600], [255, 256, 257, 1025, 257, 512, 513, 600]
    check_attention(query_lens, context_lens, block_size=256, backend=backend, device=device)


@on_every_backend
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 5, 30], [5, 30]])
def test_the_output_is_written_where_it_is_wanted(query_lens, backend, device):
    module, dtype = module_of(backend, device), torch.float16 if backend == "flash_attn" else torch.float32
    tables = [[i] for i in range(len(query_lens))]
    k_cache, v_cache = torch.randn(2, len(tables) + 1, 256, 2, 32, dtype=dtype, device=device)
    query = torch.randn(sum(query_lens), 4, 32, dtype=dtype, device=device)
    context = make_context(256, tables, query_lens, [40 + n for n in query_lens], device)
    context.plan = module.plan(context, k_cache)
    output = torch.full_like(query, torch.nan)
    module.attend(query, k_cache, v_cache, context, 0.2, output)
    assert torch.equal(output, module.attend(query, k_cache, v_cache, context, 0.2))


@on_every_backend
def test_a_sequence_gets_the_same_numbers_alone_and_in_a_crowd(backend, device):
    """Its sums are made in the same order, whoever else is in the batch: equal to the last bit."""
    if backend == "torch":
        pytest.skip("padded to the longest of its group")
    if backend == "flash_attn":
        pytest.skip("it splits contexts as the batch leaves the GPU room")
    module, lens, size = module_of(backend, device), [700, 20, 1300, 2600], 16
    blocks = torch.randperm(300).tolist()
    tables = [[blocks.pop() for _ in range(-(-n // size))] for n in lens]
    k_cache, v_cache = torch.randn(2, 301, size, 2, 64, device=device)
    query = torch.randn(len(lens), 4, 64, device=device)

    def attend(seqs: list[int], width: int = 0) -> torch.Tensor:
        padded = [tables[i] + [1_000_000] * (width - len(tables[i])) for i in seqs]
        context = make_context(size, padded, [1] * len(seqs), [lens[i] for i in seqs], device)
        context.plan = module.plan(context, k_cache)
        return module.attend(query[seqs], k_cache, v_cache, context, 0.125)

    crowd = attend([0, 1, 2, 3])
    for i in range(len(lens)):
        # Its block table is as wide as it is long, as the longest neighbour is, or in a CUDA graph as any can be.
        assert torch.equal(attend([i])[0], crowd[i])
        assert torch.equal(attend([i], width=600)[0], crowd[i])


@on_every_backend
def test_a_cache_of_more_numbers_than_32_bits_can_count(backend, device, tmp_path):
    """A large GPU has room for one. Its last blocks give to the last bit what its first ones do."""
    module, size, head_dim = module_of(backend, device), 256 if backend == "flash_attn" else 16, 128
    query_lens, context_lens = [1, 1, 20], [600, 5, 40]
    num_blocks = [-(-n // size) for n in context_lens]
    far = 2**31 // (size * head_dim)  # the first block that 32 bits do not reach
    # An offset that wraps leads 2**31 numbers before the cache. There must be something, or the process dies.
    shape = (3, far + sum(num_blocks), size, 1, head_dim)
    if device == "cpu":  # neither an empty file nor what is never touched of it takes any room
        file = torch.from_file(str(tmp_path / "empty"), shared=True, size=math.prod(shape), dtype=torch.float16)
        _, k_cache, v_cache = file.view(shape)
    else:
        _, k_cache, v_cache = torch.zeros(shape, dtype=torch.float16, device=device)
    query = torch.randn(sum(query_lens), 2, head_dim, device=device).half()
    key, value = torch.randn(2, sum(context_lens), 1, head_dim, device=device).half()

    def attend(first: int) -> torch.Tensor:
        tables = [blocks.tolist() for blocks in torch.arange(first, first + sum(num_blocks)).split(num_blocks)]
        slots = sum((slots_of(table, range(n), size) for table, n in zip(tables, context_lens)), [])
        module.store(key, value, k_cache, v_cache, torch.tensor(slots, device=device))
        assert torch.equal(k_cache.flatten(0, 1)[slots], key) and torch.equal(v_cache.flatten(0, 1)[slots], value)
        context = make_context(size, tables, query_lens, context_lens, device)
        context.plan = module.plan(context, k_cache)
        return module.attend(query, k_cache, v_cache, context, head_dim**-0.5)

    assert torch.equal(attend(far), attend(0))


@on_every_backend
def test_the_check_at_start_up_passes(backend, device):
    block_size, dtype = (256, torch.float16) if backend == "flash_attn" else (16, torch.float32)
    check(module_of(backend, device), 4, 2, 32, block_size, dtype, device)


# -- The torch backend alone -------------------------------------------------------------------------------------------


def test_one_long_and_many_short_sequences():
    check_attention([1] * 31, [1500] + [20 + i for i in range(30)])


def test_decodes_are_grouped_by_length():
    assert group_by_length([], max_slots=9) == []
    assert group_by_length([5], max_slots=4) == [[0]]
    assert group_by_length([64] * 32, max_slots=2048) == [list(range(32))]
    assert group_by_length([64] * 32, max_slots=2047) == [list(range(31)), [31]]
    assert group_by_length([60, 1500, 64, 58], max_slots=2048) == [[1], [2, 0, 3]]
    rng = random.Random(0)
    context_lens = [rng.randint(1, 3000) for _ in range(200)]
    groups = group_by_length(context_lens, max_slots=1 << 16)
    assert sorted(sum(groups, [])) == list(range(200))
    for group in groups:
        lengths = [context_lens[i] for i in group]
        assert max(lengths) * len(lengths) - sum(lengths) <= MAX_PADDING


# -- Choosing a backend ------------------------------------------------------------------------------------------------


def test_unknown_backend_is_named():
    with pytest.raises(
        ValueError, match="attention_backend must be one of 'torch', 'triton', 'flash_attn', not 'flsh'"
    ):
        get_backend("flsh")


@pytest.mark.skipif(interpreter.IS_ON, reason="the interpreter is on")
def test_triton_on_a_cpu_is_refused():
    with pytest.raises(
        ValueError, match="'triton' needs an NVIDIA GPU; on a CPU use 'torch', or .* TRITON_INTERPRET=1"
    ):
        get_backend("triton", "cpu")


@pytest.mark.parametrize(
    "version, capability, is_refused",
    [
        ("3.2.0", (7, 0), True),
        ("3.2.0", (7, 5), False),
        ("3.3.1", (7, 5), True),
        ("3.3.1", (8, 0), False),
        ("3.4.0", (7, 0), False),
    ],
)
def test_triton_is_refused_where_it_would_not_compile(version, capability, is_refused, monkeypatch):
    triton = pytest.importorskip("triton")
    module = import_module("nanovllm.kernels.triton_attention")  # for the Triton that is here
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    if is_refused:
        with pytest.raises(ValueError, match=r"for Tesla V100 by Triton 3\.[23]; .* install another, or use 'torch'"):
            get_backend("triton", "cuda")
    else:
        assert get_backend("triton", "cuda") is module


FITS = dict(device="cuda", dtype=torch.bfloat16, block_size=512, head_dim=128)


@pytest.mark.parametrize(
    "differently, message",
    [
        ({"device": "cpu"}, "needs an NVIDIA GPU; on a CPU use 'torch'"),
        ({"capability": (7, 5)}, r"compute capability 8.0 \(Ampere\) or more, and this one has 7.5; use 'triton'"),
        ({"dtype": torch.float32}, "needs 16-bit numbers, not float32; say dtype='bfloat16', or use 'triton'"),
        ({"block_size": 16}, "needs blocks of 256 tokens, not 16; say block_size=256, or use 'triton'"),
        ({"block_size": 384}, "needs blocks of 256 tokens, not 384"),
        ({"head_dim": 264}, "at most 256 numbers, in multiples of 8; this model's have 264; use 'triton'"),
        ({"head_dim": 44}, "in multiples of 8; this model's have 44"),
        ({}, r"cannot be imported here: .*flash_attn.*; install flash-attn 2 as docs/api.md says, .*, or use 'triton'"),
    ],
)
def test_what_flash_attention_cannot_do_is_refused(differently, message, monkeypatch):
    settings = FITS | differently
    capability = settings.pop("capability", (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not to be imported, whether or not it is installed
    monkeypatch.delitem(sys.modules, "nanovllm.kernels.flash_attention", raising=False)
    with pytest.raises(ValueError, match=f"attention_backend='flash_attn' .*{message}"):
        get_backend("flash_attn", **settings)


def test_flash_attention_is_taken_where_it_fits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    with patch.dict(sys.modules, flash_attn=flash_stand_in):
        sys.modules.pop("nanovllm.kernels.flash_attention", None)
        module = choose_backend("flash_attn", 16, 8, 128, 256, torch.float16, torch.device("cuda"))
    assert module.flash_attn_varlen_func is flash_stand_in.flash_attn_varlen_func


def test_auto_is_torch_on_a_cpu():
    assert choose_backend("auto", 4, 2, 32, 16, torch.float32, torch.device("cpu")) is get_backend("torch")


@pytest.mark.parametrize("where", ["everywhere", "in decodes alone", "in one token"])
def test_the_check_at_start_up_notices_wrong_numbers(where):
    def attend(query: torch.Tensor, *args) -> torch.Tensor:
        context, output = args[2], torch_attention.attend(query, *args)
        if where == "in one token":  # the decode with the long context, whose numbers are small
            output[0] *= 1.1
        elif where == "everywhere" or len(context.context_lens) == context.num_decodes:
            output *= 1.1
        return output

    parts = {name: getattr(torch_attention, name) for name in ("allocate", "plan", "store")}
    wrong = SimpleNamespace(**parts, attend=attend, __name__="wrong")
    with pytest.raises(RuntimeError, match="wrong differs from the reference by 10.0%"):
        check(wrong, 4, 2, 32, 16, torch.float32, "cpu")


def test_auto_falls_back_where_the_kernels_fail(monkeypatch, caplog):
    def broken(*args: object) -> None:
        raise RuntimeError("PTX of another world")

    monkeypatch.setattr("nanovllm.kernels.check.check", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend("auto", 4, 2, 32, 16, torch.float32, torch.device("cuda")) is get_backend("torch")
    assert "attention falls back to torch, which is slower: PTX of another world" in caplog.text


# Bytes a program may have: V100, T4, A100, RTX 4090, H100.
SHARED_MEMORY = {70: 98_304, 75: 65_536, 80: 166_912, 89: 101_376, 90: 232_448}


@pytest.mark.skipif(interpreter.IS_ON, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    "capability, head_dim, is_chunk, is_float32",
    [
        *(
            (capability, *shape, False)
            for capability in SHARED_MEMORY
            for shape in ((128, False), (128, True), (256, True))
        ),
        *((89, 256, False, False), (90, 256, False, False), (75, 128, False, True), (89, 128, False, True)),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(capability, head_dim, is_chunk, is_float32):
    """Triton compiles for any GPU on any computer; what it makes must fit into the multiprocessor's memory."""
    version = pytest.importorskip("triton").__version__
    if divmod(capability, 10) < TRITON_FROM.get(triton_version(), (0, 0)):
        pytest.skip("refused with this Triton")
    from nanovllm.kernels import triton_attention as kernels

    dtype, name = (torch.bfloat16, "*bf16") if capability >= 80 else (torch.float16, "*fp16")
    if is_float32:
        dtype, name = torch.float32, "*fp32"
    assert bool(kernels.MASKS_ALL) == version.startswith(("3.0.", "3.1.", "3.2."))
    rows, tile, warps = kernels.program_size(head_dim, dtype, divmod(capability, 10), is_chunk)
    types = dict.fromkeys(("query", "key", "value", "k_cache", "v_cache", "output"), name)
    types |= dict.fromkeys(("pieces", "weights"), "*fp32") | {"slot_mapping": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("query_start", "context_lens", "block_tables"), "*i32")
    aligned = (*(types.keys() - {"scale"}), "token_stride", "head_stride", "slot_stride", "key_stride", "value_stride")
    sizes = dict(SPLIT_SIZE=kernels.SPLIT_SIZE, MAX_SPLITS=kernels.MAX_SPLITS, HEAD_DIM=head_dim, PADDED_DIM=head_dim)
    attend = sizes | dict(GROUP=2, BLOCK_SIZE=16, ROWS=rows, TILE=tile)
    for kernel, constants, options in (
        (kernels.attend_kernel, attend, dict(num_warps=warps, num_stages=kernels.NUM_STAGES)),
        (kernels.combine_kernel, sizes | dict(PADDED_SPLITS=kernels.MAX_SPLITS), dict(num_warps=1)),
        (kernels.store_kernel, dict(SIZE=8 * head_dim, PADDED=8 * head_dim), {}),
    ):
        shared = interpreter.shared_memory_of(kernel, types, constants, capability, aligned, **options)
        assert shared <= SHARED_MEMORY[capability]


@pytest.mark.skipif(interpreter.IS_ON, reason="this is the process of its own")
def test_triton_in_the_interpreter():
    """All of the above for Triton's kernels, on a CPU."""
    interpreter.run_tests_of(__file__)

"""What ranks would say of themselves, without starting them."""

from typing import Any

from nanovllm.utils.ranks import Ranks


def describe(
    size: int,
    num_layers: int = 2,
    hidden: int = 64,
    width: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 512,
) -> list[dict[str, Any]]:
    """As `describe` of an engine with a Llama of these sizes on so many ranks; by default, the lessons' tiny one."""
    return [
        one_rank(Ranks(rank, size), num_layers, hidden, width, num_heads, num_kv_heads, head_dim, vocab)
        for rank in range(size)
    ]


def one_rank(
    ranks: Ranks, num_layers: int, hidden: int, width: int, num_heads: int, num_kv_heads: int, head_dim: int, vocab: int
) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []

    def add(name: str, *shape: int, cut: int | None = None, heads: int = 0) -> None:
        part = [[0, n] for n in shape]
        if cut is not None:
            each = shape[cut] // heads
            share = ranks.share(heads)
            part[cut] = [share.start * each, share.stop * each]
        tensors.append({"name": f"model.{name}.weight", "shape": list(shape), "part": part})

    add("embed_tokens", vocab, hidden, cut=0, heads=vocab)
    for i in range(num_layers):
        layer = f"layers.{i}"
        add(f"{layer}.input_layernorm", hidden)
        for part, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
            add(f"{layer}.self_attn.{part}_proj", heads * head_dim, hidden, cut=0, heads=heads)
        add(f"{layer}.self_attn.o_proj", hidden, num_heads * head_dim, cut=1, heads=num_heads)
        add(f"{layer}.post_attention_layernorm", hidden)
        for part in ("gate", "up"):
            add(f"{layer}.mlp.{part}_proj", width, hidden, cut=0, heads=width)
        add(f"{layer}.mlp.down_proj", hidden, width, cut=1, heads=width)
    add("norm", hidden)
    kv_cache = [2, num_layers, 9, 16, len(ranks.share(num_kv_heads)), head_dim]
    nothing = {"calls": 0, "bytes": 0}
    traffic = {"all_reduce": dict(nothing), "all_gather": dict(nothing)}
    return {"rank": ranks.rank, "device": "cpu", "tensors": tensors, "kv_cache": kv_cache, "traffic": traffic}

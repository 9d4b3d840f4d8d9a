"""From a GGUF file to an ordinary Hugging Face folder.

GGUF, llama.cpp's format, holds in one file what Hugging Face spreads over a folder: the weights, quantised to a few
bits each; the model's dimensions; the tokenizer. This module unpacks a Llama-architecture file with a byte-level BPE
tokenizer, so that the engine, and transformers beside it, can load the result like any other checkpoint.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# What llama.cpp calls a part of the model -> what Hugging Face calls it.
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write the model and tokenizer of the file `gguf_path` to `folder`, in Hugging Face's layout and float32."""
    reader = GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    weights = {hf_name(tensor.name): to_float32(tensor, metadata) for tensor in reader.tensors}

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", model_config(metadata)),
        ("generation_config.json", special_token_ids(metadata)),
        ("tokenizer_config.json", tokenizer_config(metadata)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else readable by its owner alone


# Weights


def hf_name(gguf_name: str) -> str:
    """'blk.7.attn_q.weight' -> 'model.layers.7.self_attn.q_proj.weight'."""
    *block, part, kind = gguf_name.split(".")
    layer = ["layers", block[1]] if block else []
    return ".".join(["model", *layer, NAMES[part], kind])


def to_float32(tensor: Any, metadata: dict[str, Any]) -> np.ndarray:
    """A tensor as the model multiplies with it.

    A Q4_1 weight is `scale * q + minimum`: q has 4 bits; scale and minimum are float16 and shared by 32 weights. The
    result often has more significant bits than 16-bit formats hold (of the default model's weights, float16 would round
    42 % and bfloat16 79 %), so only float32 is the same model.
    """
    weight = dequantize(tensor.data, tensor.tensor_type)
    if ".attn_q." in tensor.name:
        return unpermute(weight, metadata["llama.attention.head_count"])
    if ".attn_k." in tensor.name:
        return unpermute(weight, metadata["llama.attention.head_count_kv"])
    return weight


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of a query or key projection.

    RoPE turns pairs of a head's channels. llama.cpp pairs neighbours (0, 1), (2, 3), ...; Hugging Face pairs channel i
    with channel i + head_dim / 2. llama.cpp therefore interleaves the two halves of each head; here they are taken
    apart again.
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])  # [num_heads, head_dim / 2, 2, hidden_size]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


# Tokenizer


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer whose vocabulary and merges lie in the metadata."""
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise NotImplementedError(f"pre-tokenizer {metadata['tokenizer.ggml.pre']!r}: only 'smollm' is known here")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # "smollm" means: every digit is a token of its own, the rest is cut into words as GPT-2 does.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`: the special tokens' roles, and the chat template."""
    ids = special_token_ids(metadata) | {"unk_token_id": metadata["tokenizer.ggml.unknown_token_id"]}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role.removesuffix("_id"): metadata["tokenizer.ggml.tokens"][i] for role, i in ids.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def special_token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids that generation must know; also all that `generation_config.json` holds."""
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


# Dimensions


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """`config.json`: the model's dimensions."""
    hidden_size, num_heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, stored as float32
        "rope_theta": metadata["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # GGUF leaves "output.weight" out when the head is the embedding
        "torch_dtype": "bfloat16",  # what the model was trained in and runs in on a GPU; the file itself is float32
        **special_token_ids(metadata),
    }

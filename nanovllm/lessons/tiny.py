"""A two-layer model with random weights, for chapters where only the schedule matters: it depends on counts alone."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanovllm.llm import LLM

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny_llm(**settings: Any) -> LLM:
    """A real engine that takes milliseconds a step. Its prompts are token ids below 512; it has no tokenizer."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY))
        return LLM(folder, load_format="dummy", dtype="float32", **settings)

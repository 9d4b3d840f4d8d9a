"""What a model's folder says besides its weights: dimensions, end-of-sequence tokens, tokenizer."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file. ValueError if it is broken."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object, but a {type(content).__name__}; download the model again")
    return content


def load_hf_config(path: Path) -> PretrainedConfig:
    """The model's dimensions, from its config.json. ValueError if the file is broken or of an unknown kind of model."""
    settings = read_json(path / "config.json")
    if not isinstance(settings.get("architectures", []), list):
        raise ValueError(f"{path / 'config.json'}: architectures must be a list of names")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises several kinds
        raise ValueError(
            f"{path / 'config.json'} describes a model that transformers cannot read "
            f"(architectures {settings.get('architectures')}, model_type {settings.get('model_type')!r}): "
            f"{' '.join(str(error).split())}"
        ) from error


def head_dim_of(hf_config: PretrainedConfig) -> int:
    """How many numbers an attention head has; many config.json leave it out if the heads share out the hidden size."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def load_eos_token_ids(path: Path, hf_config: PretrainedConfig) -> frozenset[int]:
    """The tokens that end an answer: those of generation_config.json, which is the later word, or of config.json."""
    eos = read_json(path / "generation_config.json").get("eos_token_id", hf_config.eos_token_id)
    if eos is None:
        return frozenset()
    token_ids = eos if isinstance(eos, list) else [eos]
    if not all(type(token_id) is int for token_id in token_ids):
        raise ValueError(f"{path}: eos_token_id must be a token id, or a list of them, not {eos!r}")
    return frozenset(token_ids)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, None if the folder has none: then prompts are token ids, and answers have no text."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and tokenizers raise several kinds
        raise ValueError(
            f"the tokenizer in {path} cannot be read ({type(error).__name__}: {error}); download the model again, "
            "or install what it asks for"
        ) from error

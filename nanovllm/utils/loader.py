"""From a checkpoint to a model that is ready to run.

Weights are read from safetensors files alone. A pickle (`pytorch_model.bin`) runs code that its author chose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig

from nanovllm.layers.linear import Linear, MergedLinear
from nanovllm.models import get_model_class
from nanovllm.utils.checkpoint import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DUMMY_STD = 0.02

# Constants that old versions of transformers saved along with the weights.
HARMLESS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")


def build_model(
    hf_config: PretrainedConfig,
    path: Path | None,
    dtype: torch.dtype,
    device: torch.device | str,
    load_format: str = "auto",
) -> nn.Module:
    """The model that `hf_config` describes, on `device` in `dtype`, with its weights and ready to run.

    `load_format` is "auto" for the weights in the folder `path`, or "dummy" for random ones. Raises ValueError if the
    model is not supported or its weights are not right.
    """
    model_class = get_model_class(hf_config)
    with torch.device(device), default_dtype(dtype):
        model = model_class(hf_config).eval().requires_grad_(False)
    if load_format == "dummy":
        init_dummy(model)
    else:
        assert path is not None
        load_model(model, path)
    if torch.device(device).type == "cpu":
        for module in model.modules():
            if isinstance(module, Linear):
                module.prepack()
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in `dtype`, for the duration of a `with` block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@torch.no_grad()
def init_dummy(model: nn.Module) -> None:
    """Random matrices, the same every time, of a size that keeps the logits finite. For benchmarks."""
    for parameter in model.parameters():
        if parameter.dim() > 1:  # the others, norms and biases, are made as ones and zeros
            generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
            parameter.uniform_(-DUMMY_STD * 3**0.5, DUMMY_STD * 3**0.5, generator=generator)


@torch.no_grad()
def load_model(model: nn.Module, path: Path) -> None:
    """Fill the model's parameters from the safetensors files in the folder `path`.

    Every parameter must be there, with its own shape, and nothing else may be: a model with a forgotten weight still
    talks, but nonsense. ValueError says all that is wrong.
    """
    destinations = dict(checkpoint_tensors(model))
    missing = dict(destinations)
    problems: list[str] = []
    for file in weight_files(path):
        for name in tensor_names(file):
            destination = destinations.get(name)
            if destination is None:
                if not name.endswith(HARMLESS):
                    problems.append(f"{name} is in {file.name} but not in the model")
                continue
            tensor = read_tensor(file, name)
            if tensor.shape != destination.shape:
                problems.append(f"{name} has the shape {list(tensor.shape)} instead of {list(destination.shape)}")
            else:
                destination.copy_(tensor)
            missing.pop(name, None)


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The names that a checkpoint has for the model's parameters, and where each goes: if merged, to a slice of rows."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, MergedLinear):
                parent = path.rpartition(".")[0]
                for part, rows in zip(module.parts, parameter.split(list(module.parts.values()))):
                    yield f"{parent}.{part}.{name}", rows
            else:
                yield f"{path}.{name}", parameter

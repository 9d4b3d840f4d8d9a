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
HARMLESS = ("rotary_emb.inv_freq",)  # a constant that old versions of transformers saved along with the weights
DUMMY_SIZE = 0.03


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
    """Random matrices, the same ones every time, small enough for finite logits. For benchmarks, and where only counts
    matter."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # norms and biases are ones and zeros already
            parameter.uniform_(-DUMMY_SIZE, DUMMY_SIZE, generator=generator)


@torch.no_grad()
def load_model(model: nn.Module, path: Path) -> None:
    """Fill the model's parameters from the safetensors files in the folder `path`.

    Every parameter must be there in its own shape, and nothing else: a model that lacks a weight still talks, but
    nonsense. Raises ValueError with all that is wrong, before anything is read.
    """
    destinations = dict(checkpoint_tensors(model))
    found = {name: (file, shape) for file in weight_files(path) for name, shape in tensor_shapes(file)}
    check_complete(destinations, {name: shape for name, (_, shape) in found.items()}, path)
    for name, destination in destinations.items():
        if name in found:  # else it is tied to one that is
            file, _ = found[name]
            # A file is mapped into memory, and what has been read of it counts as ours until it is closed. To open it
            # anew for each tensor costs a millisecond, and saves as much memory as the model takes.
            with safe_open(file, framework="pt") as tensors:
                destination.copy_(tensors.get_tensor(name))


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor that the model needs: its name in a checkpoint, and where it goes. If merged, to some rows."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, MergedLinear):
                parent = path.rpartition(".")[0]
                for part, rows in zip(module.parts, parameter.split(list(module.parts.values()))):
                    yield f"{parent}.{part}.{name}", rows
            else:
                yield f"{path}.{name}", parameter


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or as many as its index names."""
    shards = set(read_json(path / INDEX).get("weight_map", {}).values())
    files = [path / name for name in sorted(shards) or [SINGLE]]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(
            f"{path} lacks {', '.join(absent)}. Weights are read from safetensors files only; "
            "a pickle (*.bin, *.pt) is never loaded, because it can run any code."
        )
    return files


def tensor_shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of each tensor in a file, from its header alone."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_slice(name).get_shape()
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not complete ({error}); download it again") from error


def check_complete(destinations: dict[str, torch.Tensor], found: dict[str, list[int]], path: Path) -> None:
    """Raise ValueError unless the tensors that were found are the ones that the model needs."""
    filled = {destinations[name].data_ptr() for name in found.keys() & destinations.keys()}
    missing = [name for name, tensor in destinations.items() if tensor.data_ptr() not in filled]
    left_over = [name for name in found if name not in destinations and not name.endswith(HARMLESS)]
    misshapen = [
        f"{name} is {shape} instead of {list(destinations[name].shape)}"
        for name, shape in found.items()
        if name in destinations and shape != list(destinations[name].shape)
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("left over", left_over), ("of the wrong shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"the weights in {path} do not fit the model of its config.json; {'; '.join(problems)}")

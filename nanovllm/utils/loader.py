"""From a checkpoint to a model that is ready to run.

Weights are read from safetensors files alone. A pickle (`pytorch_model.bin`) runs code that its author chose. Where
several ranks share the model, each reads its own part of every tensor, and no more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig

from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear
from nanovllm.models import get_model_class
from nanovllm.utils.checkpoint import read_json
from nanovllm.utils.ranks import Ranks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
HARMLESS = ("rotary_emb.inv_freq",)  # a constant that old versions of transformers saved along with the weights
DUMMY_SIZE = 0.03


def build_model(
    hf_config: PretrainedConfig,
    path: Path | None,
    dtype: torch.dtype,
    device: torch.device | str,
    load_format: str = "auto",
    ranks: Ranks | None = None,
) -> nn.Module:
    """The model that `hf_config` describes, on `device` in `dtype`, with its weights and ready to run.

    `load_format` is "auto" for the weights in the folder `path`, or "dummy" for random ones. With `ranks`, it is the
    part of one of them. Raises ValueError if the model is not supported or its weights are not right.
    """
    model_class = get_model_class(hf_config)
    with torch.device(device), default_dtype(dtype):
        model = model_class(hf_config, ranks or Ranks()).eval().requires_grad_(False)
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


@dataclass(slots=True)
class Piece:
    """What a model needs of a tensor in a checkpoint: all of it, or where ranks share it, a part."""

    name: str  # in the checkpoint
    shape: list[int]  # of the whole
    destination: torch.Tensor  # a parameter, or some rows of one
    dim: int = 0  # the dimension that is shared out,
    start: int = 0  # and where on it the part begins

    @property
    def part(self) -> tuple[slice, ...]:
        """The part of the whole, a slice a dimension."""
        part = [slice(0, size) for size in self.shape]
        part[self.dim] = slice(self.start, self.start + self.destination.shape[self.dim])
        return tuple(part)

    def copy_from(self, whole: Any) -> None:
        """Fill it from a tensor, or from a file's tensor that has not been read yet (`get_slice` of safetensors)."""
        self.destination.copy_(whole[self.part])

    def equals(self, whole: Any) -> bool:
        """Whether that would change nothing."""
        return torch.equal(self.destination, whole[self.part].to(self.destination))


@torch.no_grad()
def init_dummy(model: nn.Module) -> None:
    """Random matrices, the same ones every time, small enough for finite logits. For benchmarks, and where only counts
    matter."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    pieces = {piece.destination.data_ptr(): piece for piece in checkpoint_pieces(model)}  # tied ones once
    for piece in pieces.values():
        if len(piece.shape) > 1:  # norms and biases are ones and zeros already
            whole = piece.destination.new_empty(piece.shape)
            piece.copy_from(whole.uniform_(-DUMMY_SIZE, DUMMY_SIZE, generator=generator))


@torch.no_grad()
def load_model(model: nn.Module, path: Path) -> None:
    """Fill the model's parameters from the safetensors files in the folder `path`.

    Every parameter must be there in its own shape, and nothing else: a model that lacks a weight still talks, but
    nonsense. Raises ValueError with all that is wrong, before anything is read; but that tensors differ of which
    config.json says that they are one is found only where they are read.
    """
    pieces = {piece.name: piece for piece in checkpoint_pieces(model)}
    found = {name: (file, shape, dtype) for file in weight_files(path) for name, shape, dtype in tensors_in(file)}
    check_complete(pieces, {name: (shape, dtype) for name, (_, shape, dtype) in found.items()}, path)
    filled: dict[int, str] = {}  # address -> the tensor that was copied to it
    for name, piece in tqdm(pieces.items(), desc="Loading weights", unit=" tensors", delay=5):  # silent if it is quick
        if name in found:  # else it is tied to one that is
            # A file is mapped into memory, and what has been read of it counts as ours until it is closed. To open it
            # anew for each tensor costs a millisecond, and saves as much memory as the model takes.
            with safe_open(found[name][0], framework="pt") as tensors:
                tied_to = filled.setdefault(piece.destination.data_ptr(), name)
                if tied_to == name:
                    piece.copy_from(tensors.get_slice(name))
                elif not piece.equals(tensors.get_slice(name)):
                    raise ValueError(
                        f"in {path} {name} and {tied_to} differ, but config.json says that they are one tensor "
                        "(tie_word_embeddings); set that to false if the model has both"
                    )


def checkpoint_pieces(model: nn.Module) -> Iterator[Piece]:
    """All that the model needs of a checkpoint. Merged products are several tensors there, and split ones are whole."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name, rest = f"{path}.{name}", list(parameter.shape[1:])
            if isinstance(module, ColumnParallelLinear):
                parent, width = path.rpartition(".")[0], module.head_dim
                shares = [module.ranks.share(num_heads) for num_heads in module.parts.values()]
                rows = parameter.split([len(share) * width for share in shares])
                for (part, num_heads), share, destination in zip(module.parts.items(), shares, rows):
                    shape = [num_heads * width, *rest]
                    yield Piece(f"{parent}.{part}.{name}", shape, destination, start=share.start * width)
            elif isinstance(module, RowParallelLinear) and name == "weight":
                shape = [len(parameter), module.in_features]
                yield Piece(full_name, shape, parameter, dim=1, start=module.inputs.start)
            elif isinstance(module, (Embedding, LMHead)):
                shape, tokens = [module.vocab_size, *rest], module.tokens
                yield Piece(full_name, shape, parameter[: len(tokens)], start=tokens.start)
            else:
                yield Piece(full_name, list(parameter.shape), parameter)


def pieces_of(hf_config: PretrainedConfig, ranks: Ranks) -> list[Piece]:
    """The same of a model that is not there: a tied tensor once, and no memory for any."""
    with torch.device("meta"):
        model = get_model_class(hf_config)(hf_config, ranks)
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return [piece for piece in checkpoint_pieces(model) if piece.name not in tied]


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


def tensors_in(file: Path) -> Iterator[tuple[str, list[int], str]]:
    """Name, shape and dtype of each tensor in a file, from its header alone."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_slice(name)
                yield name, tensor.get_shape(), tensor.get_dtype()
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not complete ({error}); download it again") from error


def check_complete(pieces: dict[str, Piece], found: dict[str, tuple[list[int], str]], path: Path) -> None:
    """Raise ValueError unless the tensors that were found, a shape and a dtype each, are those that the model needs."""
    filled = {pieces[name].destination.data_ptr() for name in found.keys() & pieces.keys()}
    missing = [name for name, piece in pieces.items() if piece.destination.data_ptr() not in filled]
    left_over = [name for name in found if name not in pieces and not name.endswith(HARMLESS)]
    misshapen = [
        f"{name} is {shape} instead of {pieces[name].shape}"
        for name, (shape, _) in found.items()
        if name in pieces and shape != pieces[name].shape
    ]
    quantized = [f"{name} is {dtype}" for name, (_, dtype) in found.items() if name in pieces and dtype not in FLOATS]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (
            ("missing", missing),
            ("left over", left_over),
            ("of the wrong shape", misshapen),
            ("quantized, which is not supported", quantized),
        )
        if names
    ]
    if problems:
        raise ValueError(f"the weights in {path} do not fit the model of its config.json; {'; '.join(problems)}")

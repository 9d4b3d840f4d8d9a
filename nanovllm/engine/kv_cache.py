"""How large the KV cache is: bytes for one block, blocks for the memory there is."""

from dataclasses import asdict, dataclass

import psutil
import torch

from nanovllm.config import Config

DEFAULT_CPU_MEMORY = 1 << 30  # bytes


@dataclass(slots=True)
class MemoryUse:
    """What an engine's memory on a GPU is taken for, in bytes."""

    weights: int = 0
    step: int = 0  # at most, in between, for a step of the whole token budget
    graphs: int = 0  # CUDA graphs
    reserved: int = 0  # for these two, when the KV cache was sized
    kv_cache: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {size / 1e6:,.0f} MB" for name, size in asdict(self).items())


def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of KV cache that one block takes: a key and a value for each token, in every layer and KV head."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that the engine may still take on `device`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an engine before us gave back, torch may still hold
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def size_kv_cache(config: Config, bytes_per_block: int, device: torch.device, reserved: int = 0) -> int:
    """The number of blocks: what `num_kv_blocks` says, or as many as the allowed memory holds.

    `reserved` bytes of the free memory are for something else. Raises ValueError if the blocks do not fit beside them,
    or are too few for `max_model_len`.
    """
    free = max(0, free_memory(device) - reserved)
    if device.type == "cpu":
        free //= config.tensor_parallel_size  # its ranks have one memory
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // bytes_per_block
    elif device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        num_blocks = max(0, int(free - (1 - config.gpu_memory_utilization) * total) // bytes_per_block - 1)
    else:
        num_blocks = DEFAULT_CPU_MEMORY // bytes_per_block

    num_blocks_needed = -(-(config.max_model_len or 2) // config.block_size)
    if num_blocks < num_blocks_needed:
        raise ValueError(
            f"the KV cache has {num_blocks} blocks of {config.block_size} tokens, but one sequence of "
            f"{config.max_model_len or 2} tokens needs {num_blocks_needed} "
            f"({num_blocks_needed * bytes_per_block:,} bytes); {device} has {free / 1e9:.2f} GB free"
            f"{reserve_of(reserved)}; raise kv_cache_memory, num_kv_blocks or gpu_memory_utilization, or lower "
            "max_model_len, max_num_batched_tokens or max_num_seqs"
        )
    needed = (num_blocks + 1) * bytes_per_block  # one more for padding
    if needed > free:
        raise ValueError(
            f"a KV cache of {num_blocks} blocks needs {needed / 1e9:.2f} GB ({bytes_per_block:,} bytes a block), but "
            f"{device} has {free / 1e9:.2f} GB free{reserve_of(reserved)}; lower num_kv_blocks or kv_cache_memory, or "
            "use dtype='bfloat16'"
        )
    return num_blocks


def reserve_of(reserved: int) -> str:
    return f" beside {reserved / 1e9:.2f} GB for a step and its CUDA graphs" if reserved else ""

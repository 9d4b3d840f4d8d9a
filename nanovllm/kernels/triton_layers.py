"""The small operations of a layer as Triton kernels, for GPUs.

Between two matrix products a decoder does little: it normalises, rotates, and applies a nonlinearity. In plain PyTorch
each of these is several operations, and on a GPU each of those reads and writes its tensor anew and takes some
microseconds whatever its size. A kernel reads once, does all in registers, and writes once. Numbers are float32 inside,
and rounded where the plain layers round.
"""

import torch
import triton
import triton.language as tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What `RMSNorm` computes. `x` is `[num_tokens, size]`, or `[num_tokens, num_heads, size]`, its heads side by side."""
    num_heads, size = x[0].numel() // x.size(-1), x.size(-1)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (len(x) * num_heads,)
    rms_norm_kernel[grid](
        x, weight, output, eps, x.stride(0), NUM_HEADS=num_heads, SIZE=size, PADDED=triton.next_power_of_2(size)
    )
    return output


@triton.jit
def rms_norm_kernel(
    x, weight, output, eps, token_stride, NUM_HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    numbers = tl.load(x + row // NUM_HEADS * token_stride + row % NUM_HEADS * SIZE + i, mask=i < SIZE, other=0.0)
    numbers = numbers.to(tl.float32)
    normed = numbers / tl.sqrt(tl.sum(numbers * numbers) / SIZE + eps)
    normed = normed.to(output.dtype.element_ty).to(tl.float32)  # rounded, as in the plain layer
    normed *= tl.load(weight + i, mask=i < SIZE, other=0.0).to(tl.float32)
    tl.store(output + row * SIZE + i, normed.to(output.dtype.element_ty), mask=i < SIZE)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What `rotary_embedding.rotate` computes. `x` is `[num_tokens, num_heads, head_dim]`, its heads side by side."""
    num_tokens, num_heads, head_dim = x.shape
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate_kernel[(num_tokens,)](
        *(x, cos, sin, output, x.stride(0)),
        NUM_HEADS=num_heads,
        PADDED_HEADS=triton.next_power_of_2(num_heads),
        HALF=head_dim // 2,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2),
    )
    return output


@triton.jit
def rotate_kernel(
    x, cos, sin, output, token_stride,
    NUM_HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr,
):  # fmt: skip
    """One program a token: all its heads turn by the same angles."""
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, PADDED_HEADS)[:, None], tl.arange(0, PADDED_HALF)[None, :]
    is_pair = (head < NUM_HEADS) & (i < HALF)
    c = tl.load(cos + token * 2 * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * 2 * HALF + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)  # its first half is -sin
    pair = x + token * token_stride + head * 2 * HALF + i
    a = tl.load(pair, mask=is_pair, other=0.0).to(tl.float32)
    b = tl.load(pair + HALF, mask=is_pair, other=0.0).to(tl.float32)
    pair = output + (token * NUM_HEADS + head) * 2 * HALF + i
    tl.store(pair, (a * c - b * s).to(output.dtype.element_ty), mask=is_pair)
    tl.store(pair + HALF, (b * c + a * s).to(output.dtype.element_ty), mask=is_pair)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """What `activation.silu_and_mul` computes. `gate_up` is `[num_tokens, 2 * size]`."""
    num_tokens, size = len(gate_up), gate_up.size(1) // 2
    output = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    silu_and_mul_kernel[(num_tokens, triton.cdiv(size, 1024))](gate_up, output, SIZE=size)
    return output


@triton.jit
def silu_and_mul_kernel(gate_up, output, SIZE: tl.constexpr):
    """One program for 1,024 numbers of a token."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    gate = tl.load(gate_up + token * 2 * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * SIZE + SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + token * SIZE + i, (gate * up).to(output.dtype.element_ty), mask=i < SIZE)

"""The FlashAttention backend in an engine, with CUDA graphs and without; tests/test_attention.py has its kernels."""

import pytest
import torch

from nanovllm import LLM, SamplingParams


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_most_greedy_answers_are_those_of_triton(tiny_qwen3_path, enforce_eager, dtype):
    """Rounding may decide near ties. Prompts around the ends of blocks, chunks beside decodes."""
    pytest.importorskip("flash_attn")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    prompts = [[(i + 7 * n) % 250 for i in range(n)] for n in (1, 3, 40, 255, 256, 257, 511, 512, 513, 700, 900, 1000)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    settings = dict(dtype=dtype, device="cuda", block_size=256, num_kv_blocks=60, max_num_batched_tokens=600)
    answers = []
    for backend in ("flash_attn", "triton"):
        llm = LLM(tiny_qwen3_path, attention_backend=backend, enforce_eager=enforce_eager, **settings)
        assert (llm.engine.model_runner.graphs is None) == enforce_eager
        answers.append([a["token_ids"] for a in llm.generate(prompts, params, use_tqdm=False)])
        llm.close()
    assert sum(a == b for a, b in zip(*answers)) >= 0.75 * len(prompts)

"""nanovllm: a small, complete LLM inference engine, and the notebooks that take it apart.

>>> from nanovllm import LLM, SamplingParams
>>> llm = LLM()
>>> llm.generate(["Hello"], SamplingParams(temperature=0.0, max_tokens=10))[0]["text"]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.llm import LLM
    from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use (PEP 562), so that the scheduler can be studied without loading torch."""
    if name == "LLM":
        from nanovllm.llm import LLM

        return LLM
    if name == "SamplingParams":
        from nanovllm.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")

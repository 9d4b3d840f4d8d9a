"""What the chapters share and a reader need not see: the running example, pictures, `source()`, exercise checks.

`python -m nanovllm.lessons run` executes and saves the notebooks; nothing else writes their outputs.
"""

from nanovllm.lessons.display import show, source
from nanovllm.lessons.example import OPENING, PROMPTS

__all__ = ["OPENING", "PROMPTS", "show", "source"]

"""What the chapters share and a reader need not see: the running example, pictures, `source()`, exercise checks.

`python -m nanovllm.lessons run` executes and saves the notebooks; nothing else writes their outputs.
"""

import matplotlib

from nanovllm.lessons.display import show, source
from nanovllm.lessons.example import OPENING, PROMPTS
from nanovllm.viz.theme import STYLE

__all__ = ["OPENING", "PROMPTS", "show", "source"]

matplotlib.rcParams.update(STYLE)  # every figure of a chapter looks like the others, the reader's own included

"""The player: cache map and timeline on one slider."""

from base64 import b64encode
from io import BytesIO

from matplotlib.figure import Figure
from PIL import Image

from nanovllm.viz.figures import cache_map_figure, timeline_figure
from nanovllm.viz.live import LiveView
from nanovllm.viz.text import cache_map_text, timeline_text


class Player(LiveView):
    """`Player(trace)`: where the blocks are, and how the run came to it."""

    def text(self) -> str:
        return f"{cache_map_text(self.frames, self.index)}\n\n{timeline_text(self.frames, self.index)}"

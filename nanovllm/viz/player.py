"""The player: cache map and timeline on one slider."""

from io import BytesIO

from matplotlib.figure import Figure
from matplotlib.image import imread

from nanovllm.viz.figures import cache_map_alt, cache_map_figure, timeline_alt, timeline_figure
from nanovllm.viz.live import LiveView
from nanovllm.viz.text import cache_map_text, timeline_text
from nanovllm.viz.theme import STYLE, new_figure, png


class Player(LiveView):
    """`Player(trace)`: where the blocks are, and how the run came to it."""

    def text(self) -> str:
        return f"{cache_map_text(self.frames, self.index)}\n\n{timeline_text(self.frames, self.index)}"

    def figure(self) -> Figure:
        figures = cache_map_figure(self.frames, self.index), timeline_figure(self.frames, self.index)
        images = [imread(BytesIO(png(figure))) for figure in figures]
        width, height = max(image.shape[1] for image in images), sum(image.shape[0] for image in images)
        both = new_figure(width / STYLE["figure.dpi"], height / STYLE["figure.dpi"])
        for image in images:
            height -= image.shape[0]
            both.figimage(image, 0, height, origin="upper")
        return both

    def alt(self) -> str:
        return f"{cache_map_alt(self.frames, self.index)} {timeline_alt(self.frames, self.index)}"

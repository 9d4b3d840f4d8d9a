"""The timeline: who ran in which step with how many tokens, and how much of the token budget that filled."""

from matplotlib.figure import Figure

from nanovllm.viz.figures import timeline_alt, timeline_figure
from nanovllm.viz.live import LiveView
from nanovllm.viz.text import timeline_text


class Timeline(LiveView):
    """`Timeline(trace)`: requests as rows, steps as columns, and each step's token budget below."""

    def text(self) -> str:
        return timeline_text(self.frames, self.index)

    def figure(self) -> Figure:
        return timeline_figure(self.frames, self.index)

    def alt(self) -> str:
        return timeline_alt(self.frames, self.index)

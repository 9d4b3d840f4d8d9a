"""The cache map: every physical block of the KV cache, who holds it, how full it is; each request's way to its own."""

from matplotlib.figure import Figure

from nanovllm.viz.figures import cache_map_alt, cache_map_figure
from nanovllm.viz.live import LiveView
from nanovllm.viz.text import cache_map_text


class CacheMap(LiveView):
    """`CacheMap(trace)`: the blocks of the KV cache and the requests that hold them, step by step."""

    def text(self) -> str:
        return cache_map_text(self.frames, self.index)

    def figure(self) -> Figure:
        return cache_map_figure(self.frames, self.index)

    def alt(self) -> str:
        return cache_map_alt(self.frames, self.index)

"""A picture as one page, to put on a site or to send to a friend: no kernel, no network."""

import base64
from html import escape
from pathlib import Path

from nanovllm.engine.trace import Trace
from nanovllm.viz.explorer import Explorer
from nanovllm.viz.frames import Frames
from nanovllm.viz.live import STATIC
from nanovllm.viz.pack import pack
from nanovllm.viz.rank_map import TITLE, RankMap

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ margin: 24px auto; max-width: 1400px; padding: 0 16px; font: 15px/1.5 system-ui, sans-serif }}
{css}
</style>
</head>
<body>
<main id="player"></main>
{about}
<script type="module">
{javascript}
const data = Uint8Array.from(atob("{data}"), (character) => character.charCodeAt(0));
mount(document.getElementById("player"), {{ view: "{view}", index: {index}, data }});
</script>
</body>
</html>
"""


def export_html(
    shown: Trace | Frames | Explorer | RankMap, path: str | Path, step: int | None = None, view: str = "Player"
) -> None:
    """Write one HTML file that opens anywhere: an explorer, a rank map, or a run as `Player`, `CacheMap` or `Timeline`.

    `step` is the step of the run to begin with; by default the one with most blocks in use.
    """
    if isinstance(shown, Explorer):
        view, index, data, title, about = "Explorer", shown.index, shown.data, shown.readings.title, ""
    elif isinstance(shown, RankMap):
        view, index, data, title, about = "RankMap", shown.index, shown.data, TITLE, ""
    else:
        frames = shown if isinstance(shown, Frames) else Frames(shown)
        index, data, title = frames.index_of(step), pack(frames), repr(frames.trace)
        words = ", ".join(f"{name}: {value}" for name, value in frames.trace.environment.items())
        about = f"<p><small>{escape(f'{title}. {words}')}</small></p>"
    page = PAGE.format(
        title=escape(title),
        css=(STATIC / "widget.css").read_text(encoding="utf-8"),
        javascript=(STATIC / "widget.js").read_text(encoding="utf-8"),
        about=about,
        view=view,
        index=index,
        data=base64.b64encode(data).decode(),
    )
    Path(path).write_text(page, encoding="utf-8")

"""What the live pictures send to the browser, and what they show without one. The browser's half is in browser/."""

import base64
import json
import random
import zlib

import pytest

from nanovllm import viz
from nanovllm.viz.frames import Frames
from nanovllm.viz.live import STATIC
from nanovllm.viz.pack import changes, ends, pack

from .scheduling import make_sequence
from .test_trace import Run, random_run

WIDGET = "application/vnd.jupyter.widget-view+json"


def long_run(num_steps: int = 500, num_seqs: int = 64, num_blocks: int = 512) -> Run:
    """Requests come and go, some begin alike, and the pool is too small: hits, evictions, preemptions."""
    run = Run(num_blocks, block_size=16, budget=512, max_num_seqs=num_seqs)
    rng, num_added = random.Random(0), 0
    for _ in range(num_steps):
        while len(run.scheduler.running) + len(run.scheduler.waiting) < num_seqs:
            prompt = [7] * rng.choice([0, 32, 48]) + [rng.randrange(49152) for _ in range(rng.randint(20, 120))]
            run.add(make_sequence(prompt, rng.randint(20, 240), num_added))
            num_added += 1
        run.step(rng.randrange(49152))
    run.trace.close()
    return run


def plain(frames: Frames, index: int) -> dict:
    """A frame as the browser must have it: the same as `Recording.snapshot` in widget.js."""
    frame, trace = frames[index], frames.trace
    free = {block.free_index: i for i, block in enumerate(frame.blocks) if block.free_index is not None}
    requests = []
    for r in frame.requests:
        token_ids = trace.requests[r.id].prompt_token_ids + trace.requests[r.id].output_token_ids
        requests.append(
            {
                "id": r.id,
                "name": r.name,
                "status": r.status,
                "did": r.did,
                "prompt": r.num_prompt_tokens,
                "tokens": r.num_tokens,
                "computed": r.num_computed_tokens,
                "new": r.num_new_tokens,
                "hit": r.num_hit_tokens,
                "table": list(r.block_table),
                "texts": [trace.text_of(token_id) for token_id in token_ids[: r.num_tokens]],
            }
        )
    blocks = [
        {"owners": list(b.owners), "filled": b.filled, "hash": None if b.hash is None else f"{b.hash:016x}"}
        for b in frame.blocks
    ]
    return {
        "title": frame.title,
        "sentence": frame.sentence,
        "tokens": frame.num_tokens,
        "changed": sorted(frame.changed),
        "free": [free[i] for i in range(len(free))],
        "blocks": blocks,
        "requests": requests,
    }


@pytest.fixture
def small() -> Run:
    run = Run(num_blocks=8)
    run.add(make_sequence("aaaa bbbb c", max_tokens=6, id=0))
    run.add(make_sequence("aaaa d", max_tokens=9, id=1))
    while run.scheduler.has_work():
        run.step(token=7)
    return run


def test_only_what_changes_is_sent(small):
    frames = Frames(small.trace)
    first = changes(frames, 1)
    assert first["requests"]["name"] == ("A", "B") and first["requests"]["table"] == ((0, 1, 2), (0, 3))
    assert first["blocks"]["block"] == (0, 1, 2, 3) and first["blocks"]["owners"] == ((0, 1), (0,), (0,), (1,))
    assert first["free"] == ([], []), "the rest of the queue stays as it was"
    second = changes(frames, 2)
    assert second["blocks"] == {"block": (2, 3), "owners": ((0,), (1,)), "filled": (2, 2), "hash": (None, None)}
    assert second["requests"]["table"] == (None, None), "no new block is needed"
    assert second["requests"]["texts"] == (["7"], ["7"]) and "free" not in second


def test_the_ends_of_a_queue():
    assert ends([], [0, 1, 2]) == ([], [0, 1, 2])
    assert ends([0, 1, 2, 3], [2, 3]) == ([], [])
    assert ends([0, 1, 2, 3], [9, 1, 2, 3, 8, 0]) == ([9], [8, 0])
    assert ends([0, 1, 2, 3], [3, 9]) == ([], [9])
    rng = random.Random(0)
    for _ in range(1000):
        old, new = rng.sample(range(12), rng.randint(0, 12)), rng.sample(range(12), rng.randint(0, 12))
        front, back = ends(old, new)
        middle = [block for block in old if block in new and block not in front and block not in back]
        assert [*front, *middle, *back] == new


def test_a_long_run_is_half_a_megabyte():
    frames = Frames(long_run().trace)
    assert len(frames) == 501 and max(len([r for r in frame.requests if not r.is_over]) for frame in frames) == 64
    data = pack(frames)
    assert len(data) < 500_000, f"{len(data)} bytes"
    assert len(json.loads(zlib.decompress(data))["frames"]) == 501


@pytest.mark.parametrize("name", ["CacheMap", "Timeline", "Player"])
def test_three_forms_of_one_picture(small, name):
    view = getattr(viz, name)(small.trace, step=2)
    data, metadata = view._repr_mimebundle_()
    assert set(data) == {WIDGET, "image/png", "text/plain"}
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == repr(view) and "digest" in repr(view) and " at 0x" not in repr(view)
    assert metadata["image/png"]["widget"] == name and "step 2" in metadata["image/png"]["alt"].lower()


def test_which_step_is_shown(small):
    assert viz.CacheMap(small.trace).index == Frames(small.trace).index_of(None)
    assert viz.CacheMap(small.trace, step=0).index == 1
    assert viz.CacheMap(small.trace, step=-1).index == len(small.trace.steps)
    with pytest.raises(IndexError):
        viz.CacheMap(small.trace, step=len(small.trace.steps))


def test_a_growing_trace_sends_its_new_steps(monkeypatch):
    run = Run(num_blocks=8)
    view = viz.Player(run.trace)
    sent = []
    monkeypatch.setattr(view, "send", lambda message: sent.append(message))
    run.add(make_sequence("aaaa bbbb c", id=0))
    view.update()
    assert sent[-1]["at"] == 0 and sent[-1]["frames"][0]["requests"]["status"] == ("waiting",)
    run.step(), run.step()
    view.update()
    assert sent[-1]["at"] == 0 and len(sent[-1]["frames"]) == 3 and view.index == 2
    run.step()
    view.update()
    assert sent[-1]["at"] == 2 and len(sent[-1]["frames"]) == 2
    assert (
        json.loads(json.dumps(sent[-1]["frames"]))
        == json.loads(zlib.decompress(view.get_state()["data"]))["frames"][2:]
    )


def test_an_exported_page_needs_no_network(tmp_path, small):
    viz.export_html(small.trace, tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert "http" not in page and "import " not in page.split("<script")[1] and "src=" not in page
    assert (STATIC / "widget.js").read_text() in page and (STATIC / "widget.css").read_text() in page


def test_names_are_imported_when_asked_for():
    names = {"CacheMap", "Timeline", "Player", "Stepper", "Explorer", "Reading", "RankMap", "export_html"}
    assert callable(viz.Stepper) and callable(viz.Reading) and set(viz.__all__) == names
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        viz.Nothing

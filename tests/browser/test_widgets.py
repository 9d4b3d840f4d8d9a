"""The live pictures in a browser, on an exported page: no kernel, no server."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.engine.trace import Trace
from nanovllm.viz import export_html
from nanovllm.viz.frames import Frames
from nanovllm.viz.pack import changes

from ..scheduling import make_sequence
from ..test_trace import Run, random_run
from ..test_widgets import long_run, plain
from .chromium import ARGUMENTS, CHROMIUM, sync_api

PLAYER = "document.querySelector('.nanovllm').nanovllm"
# As the widget does when a message comes.
APPEND = f"message => {{ const player = {PLAYER}; player.recording.append(message); "
APPEND += "player.show(player.recording, player.recording.frames.length - 1); }"
PIXELS = "canvas => canvas.toDataURL()"

# Sets the slider, as a drag does, in every frame of the screen; counts those after which the picture is another.
DRAG = """async (seconds) => {
    const root = document.querySelector(".nanovllm");
    const [slider, canvases] = [root.querySelector("input"), [...root.querySelectorAll("canvas")]];
    const small = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
    const context = small.getContext("2d", { willReadFrequently: true });
    const seen = new Set();
    const screen = () => new Promise(requestAnimationFrame);
    const start = performance.now();
    let moves = 0;
    while (performance.now() - start < 1000 * seconds) {
        slider.value = String(moves++ % (Number(slider.max) + 1));
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        await screen();  // the picture is drawn in the same frame, before this goes on
        let hash = 0;
        for (const canvas of canvases) {
            context.clearRect(0, 0, 64, 64);
            context.drawImage(canvas, 0, 0, 64, 64);
            for (const value of context.getImageData(0, 0, 64, 64).data) hash = (hash * 31 + value) | 0;
        }
        seen.add(hash);
    }
    return { distinct: seen.size, moves, seconds: (performance.now() - start) / 1000 };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """show(trace): the page that `export_html` makes of it. At the end: nothing has gone wrong in it."""
    errors: list[str] = []
    pages = []

    def show(trace: Trace, width: int = 900, scheme: str = "light", **options) -> "sync_api.Page":
        path: Path = tmp_path / f"{len(pages)}.html"
        export_html(trace, path, **options)
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or errors.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector(".nanovllm[data-index]")
        return page

    yield show
    for page in pages:
        page.close()
    assert not errors


@pytest.fixture(scope="module")
def scene() -> Trace:
    """Eight blocks, two requests that begin alike, a third that preempts."""
    run = Run(num_blocks=8, budget=16)
    run.add(make_sequence("aaaa bbbb c", max_tokens=12, id=0))
    run.add(make_sequence("aaaa d", max_tokens=14, id=1))
    run.add(make_sequence("eeee ffff gg", max_tokens=9, id=2))
    while run.scheduler.has_work():
        run.step(token=7)
    run.trace.close()
    assert any(step.preempted for step in run.trace.steps)
    return run.trace


def index(page: "sync_api.Page") -> int:
    """The frame that is drawn, once the screen has been drawn anew."""
    page.evaluate("() => new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))")
    return int(page.locator(".nanovllm").get_attribute("data-index"))


def pictures(page: "sync_api.Page") -> list[str]:
    return [canvas.evaluate(PIXELS) for canvas in page.locator("canvas").all()]


def snapshots(page: "sync_api.Page") -> list[dict]:
    return page.evaluate(f"{PLAYER}.recording.frames.map((_, i) => {PLAYER}.recording.snapshot(i))")


def send(page: "sync_api.Page", frames: Frames, at: int) -> None:
    """The frames from `at` on, as a message from the kernel."""
    message = {"at": at, "frames": [changes(frames, i) for i in range(at, len(frames))]}
    page.evaluate(APPEND, json.loads(json.dumps(message)))


def test_the_browser_has_the_frames_that_python_has(show):
    for seed in range(12):
        trace = random_run(seed)[0].trace
        frames = Frames(trace)
        assert snapshots(show(trace)) == [plain(frames, i) for i in range(len(frames))], f"seed {seed}"


def test_new_steps_come_as_messages(show):
    run = Run(num_blocks=6)
    run.add(make_sequence("aaaa bbbb c", max_tokens=9, id=0))
    frames = Frames(run.trace)
    page = show(frames)
    page.evaluate(f"{PLAYER}.show({PLAYER}.recording, 0)")
    sent = len(frames)
    for request in range(1, 4):
        run.add(make_sequence("aaaa d", max_tokens=5, id=request))
        run.step()
        run.step()
        send(page, frames, sent - 1)
        sent = len(frames)
        assert snapshots(page) == [plain(frames, i) for i in range(len(frames))]


def test_steps_that_come_while_it_is_hidden(show):
    """Back in sight it may be drawn, for a theme or a mouse, before the browser says that its size has changed."""
    run = Run(num_blocks=6)
    run.add(make_sequence("aaaa bbbb c", max_tokens=9, id=0))
    frames = Frames(run.trace)
    page = show(frames)
    page.evaluate(f"{PLAYER}.root.style.display = 'none'")
    sent = len(frames)
    run.add(make_sequence("aaaa d", max_tokens=5, id=1))
    run.step()
    send(page, frames, sent - 1)
    page.evaluate(f"{PLAYER}.root.style.display = ''; {PLAYER}.draw()")
    assert index(page) == len(frames) - 1
    assert page.evaluate(f"{PLAYER}.parts[1].slots.size") == 2  # a row for each request


def test_slider(show, scene):
    page = show(scene, step=0)
    slider = page.get_by_role("slider", name="Cache map and timeline: step")
    before = pictures(page)
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 10, y)
    page.mouse.down()
    seen = set()
    for i in range(1, 11):
        page.mouse.move(box["x"] + box["width"] * i / 10 - 4, y)
        seen.add(index(page))
    page.mouse.up()
    assert len(seen) == 10 and max(seen) == len(scene.steps)
    assert all(a != b for a, b in zip(before, pictures(page))), "map, requests and timeline are drawn anew"


def test_keys(show, scene):
    page = show(scene, step=3)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    last = len(scene.steps)
    pressed = [("ArrowRight", 5), ("ArrowRight", 6), ("ArrowLeft", 5), ("End", last), ("ArrowRight", last)]
    pressed += [("PageUp", last - 10), ("Home", 0), ("ArrowLeft", 0), ("PageDown", 10)]
    for key, expected in pressed:
        page.keyboard.press(key)
        assert index(page) == expected, key
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('.nanovllm')"), "there is one element with focus, not more"


def test_no_key_leaves_but_with_ctrl(show, scene):
    page = show(scene)
    page.evaluate("window.left = []; document.addEventListener('keydown', (event) => left.push(event.key))")
    page.locator("input[type=range]").focus()
    for key in ("b", "a", "ArrowDown", "Enter", " "):
        page.keyboard.press(key)
    assert page.evaluate("left") == []
    page.keyboard.press("Control+s")
    assert page.evaluate("left") == ["Control", "s"], "JupyterLab saves"


def test_the_sentence_is_said(show, scene):
    page, frames = show(scene, step=0), Frames(scene)
    status = page.get_by_role("status")
    assert status.get_attribute("aria-live") == "polite"
    for i in range(2, len(frames)):
        page.locator("input[type=range]").press("ArrowRight")
        sync_api.expect(status).to_have_text(frames[i].sentence)
        sync_api.expect(page.get_by_role("slider")).to_have_attribute("aria-valuetext", frames[i].title)


def test_nothing_moves_by_itself_and_play_does(show, scene):
    page = show(scene, step=0)
    page.wait_for_timeout(700)
    assert index(page) == 1 and page.evaluate(f"{PLAYER}.numDrawn") <= 3
    page.get_by_label("Speed").select_option(label="30 steps/s")
    page.locator("input[type=range]").press(" ")
    page.wait_for_function(f"{PLAYER}.index > 4")
    page.get_by_role("button", name="Pause").click()
    stopped = index(page)
    page.wait_for_timeout(200)
    assert index(page) == stopped
    page.get_by_role("button", name="Play").click()
    page.wait_for_function(f"{PLAYER}.index === {len(scene.steps)}")
    sync_api.expect(page.get_by_role("button", name="Play")).to_be_visible()  # it stops at the end


def test_a_request_lights_up_its_way(show, scene):
    page = show(scene, step=2)
    before = pictures(page)[0]
    slider = page.locator("input[type=range]")
    slider.press("ArrowDown")
    tables = scene.block_tables_at(2)
    way = ", ".join(f"{i} → {block}" for i, block in enumerate(tables[0]))
    sync_api.expect(page.locator(".nanovllm-detail")).to_contain_text(f"A: decode, computes 1; ")
    sync_api.expect(page.locator(".nanovllm-detail")).to_contain_text(f"logical → physical blocks: {way}")
    assert pictures(page)[0] != before
    slider.press("Escape")
    index(page)
    assert pictures(page)[0] == before
    page.locator("canvas").nth(1).hover(position={"x": 20, "y": 10})
    sync_api.expect(page.locator(".nanovllm-detail")).to_contain_text(way)


def test_a_block_tells_what_it_holds(show, scene):
    page = show(scene, step=2)
    x, y = page.evaluate(f"{PLAYER}.parts[0].corner(0)")
    page.locator("canvas").first.hover(position={"x": x + 20, "y": y + 20})
    detail = page.locator(".nanovllm-detail")
    sync_api.expect(detail).to_contain_text("Block 0: held by A, B; hash")
    sync_api.expect(detail).to_contain_text(f"4 of 4 tokens: “{'97' * 4}”")


def test_a_click_on_the_timeline_goes_there(show, scene):
    page = show(scene, view="Timeline", step=0)
    x = page.evaluate(f"46 + 7.5 * {PLAYER}.parts[0].column")
    page.locator("canvas").click(position={"x": x, "y": 40})
    assert index(page) == 8
    page.locator("canvas").hover(position={"x": x, "y": 30})
    sync_api.expect(page.locator(".nanovllm-detail")).to_contain_text("step 7, A: ")


def test_a_budget_far_above_is_off_the_scale_of_the_timeline(show):
    """Nobody would see the steps' tokens beside it."""
    seen = []
    for budget in (16, 65, 1000):  # a step has 16 tokens
        run = Run(num_blocks=8, budget=budget)
        run.add(make_sequence("aaaa bbbb cccc d", max_tokens=4, id=0))
        while run.scheduler.has_work():
            run.step(token=7)
        page = show(run.trace)
        index(page)
        seen.append(pictures(page)[-1])
    assert seen[0] != seen[1] == seen[2]


@pytest.mark.parametrize("width", [900, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_and_widths(show, scene, width, scheme):
    page = show(scene, width, scheme)
    background = page.locator(".nanovllm").evaluate("root => getComputedStyle(root).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"


@pytest.mark.parametrize("width", [900, 1400])
def test_print_is_light(show, scene, width):
    light, dark = show(scene, width, "light"), show(scene, width, "dark")
    assert pictures(light) != pictures(dark)
    for page in (light, dark):
        page.emulate_media(media="print")
        page.wait_for_timeout(100)
    assert pictures(light) == pictures(dark)
    sync_api.expect(light.get_by_role("slider")).to_be_hidden()


def test_jupyterlab_decides_the_theme(show, scene):
    page = show(scene, scheme="light")
    before = pictures(page)
    page.evaluate("document.body.style.cssText = '--jp-layout-color0: #111; --jp-content-font-color0: #fff'")
    index(page)
    assert all(a != b for a, b in zip(before, pictures(page)))


def test_4096_blocks(show):
    run = long_run(num_steps=60, num_seqs=256, num_blocks=4096)
    page = show(run.trace)
    canvas = page.locator("canvas").first.bounding_box()
    assert canvas["height"] <= 470 and canvas["width"] <= 900
    x, y = page.evaluate(f"{PLAYER}.parts[0].corner(4095)")
    page.locator("canvas").first.hover(position={"x": x + 2, "y": y + 2})
    sync_api.expect(page.locator(".nanovllm-detail")).to_contain_text("Block 4095: ")


def test_what_stays_from_the_last_drawing_is_right(show):
    """Of many blocks only those that changed are drawn anew: the picture is the same as one drawn from nothing."""
    page = show(long_run(num_steps=120).trace, step=80)
    for step in (81, 82, 83, 90, 70, 120, 0):
        page.evaluate(f"{PLAYER}.goTo({step})")
        assert index(page) == step
        picture = pictures(page)[0]
        page.evaluate(f"{PLAYER}.parts[0].drawn = null; {PLAYER}.draw()")
        assert pictures(page)[0] == picture


def test_a_long_run_is_scrubbed_at_30_frames_a_second(show):
    page = show(long_run().trace)
    rates = []
    while len(rates) < 10 and max(rates, default=0.0) < 30:  # the machine may be busy with something else for a while
        result = page.evaluate(DRAG, 1)
        rates.append(result["distinct"] / result["seconds"])
    print("distinct pictures a second:", ", ".join(f"{rate:.0f}" for rate in rates))
    assert max(rates) >= 30

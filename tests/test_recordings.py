"""Launches and kernels: read from a profiler's trace, kept in a file, drawn; the device that is watched on a CPU."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from nanovllm import LLM
from nanovllm.lessons import chapter_05, record
from nanovllm.lessons.device import Device
from nanovllm.lessons.launches import Event, Launches, draw_launches, from_profiler, short, told
from nanovllm.lessons.tiny import TINY


def event(cat: str, name: str, ts: float, dur: float) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {}}


# What torch.profiler exports, cut down: two launches, a graph's launch, a copy, and what they did; and other things.
EXPORTED = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    event("cpu_op", "aten::mm", 999.0, 30.0),
    event("cuda_runtime", "cudaLaunchKernel", 1000.0, 6.0),
    event("cuda_driver", "cuLaunchKernelEx", 1050.0, 5.0),
    event("cuda_runtime", "cudaMemcpyAsync", 1080.0, 4.0),
    event("cuda_runtime", "cudaGraphLaunch", 1100.0, 9.0),
    event("cuda_runtime", "cudaStreamSynchronize", 1120.0, 500.0),
    event("kernel", "void at::native::vectorized_elementwise_kernel<4, at::add>(int)", 1060.0, 2.5),
    event("kernel", "rms_norm_kernel", 1010.0, 3.0),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1090.0, 1.0),
    event("kernel", "rms_norm_kernel", 1110.0, 3.0),
    event("ac2g", "ac2g", 1000.0, 1.0),
]


def test_from_profiler():
    run = from_profiler(EXPORTED)
    assert [e.name for e in run.launches] == [
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaMemcpyAsync",
        "cudaGraphLaunch",
    ]
    assert [e.name for e in run.kernels] == [
        "rms_norm_kernel",
        "at::native::vectorized_elementwise_kernel",
        "Memcpy HtoD",
        "rms_norm_kernel",
    ]
    assert run.launches[0] == Event("cudaLaunchKernel", 0.0, pytest.approx(6e-6))
    assert run.kernels[0].start == pytest.approx(10e-6)
    assert run.seconds == pytest.approx(113e-6) and run.busy == pytest.approx(9.5 / 113)


def test_nothing_that_happened():
    run = from_profiler([])
    assert run.seconds == 0 and run.busy == 0 and told(run) == "0 launches, 0 ms, busy 0%"


def test_short_names():
    assert short("void f<int, 3>(float*)") == "f" and short("g(int)") == "g" and len(short("x" * 99)) == 60


def test_launches_survive_a_file():
    run = from_profiler(EXPORTED)
    again = Launches.from_dict(json.loads(json.dumps(run.to_dict())))
    for before, after in zip((*run.launches, *run.kernels), (*again.launches, *again.kernels), strict=True):
        assert before.name == after.name
        assert (after.start, after.seconds) == pytest.approx((before.start, before.seconds), abs=1e-7)


def test_a_box_is_drawn_for_each_event():
    run = from_profiler(EXPORTED)
    figure = draw_launches({"eager": run, "graph": Launches(run.launches[:1], run.kernels)})
    for ax, num_launches in zip(figure.axes, (4, 1)):
        boxes = [len(collection.get_paths()) for collection in ax.collections]  # narrow and wide, of each lane
        assert boxes[0] + boxes[1] == num_launches and boxes[2] + boxes[3] == 4
    assert figure.axes[0].get_title(loc="left").startswith("eager: 4 launches, 0.113 ms, busy 8%")
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_a_box_is_to_scale():
    run = Launches([Event("a", 0.0, 0.25)], [Event("b", 0.5, 0.5)])
    ax = draw_launches({"run": run}).axes[0]
    wide = [box.get_extents() for collection in ax.collections for box in collection.get_paths()]
    assert [(box.x0, box.x1) for box in wide] == [(0, 250), (500, 1000)]  # milliseconds


# -- Recordings --------------------------------------------------------------------------------------------------------


def made_up() -> dict:
    """Of this test alone: no notebook shows it."""
    run = from_profiler(EXPORTED).to_dict()
    return {
        "about": record.about("05"),
        "timelines": {f"{name}, batch {n}": run for n in (1, 256) for name in ("eager", "graph")},
        "seconds": {"eager": {"1": 0.03, "256": 0.04, "prefill": 0.03}, "graph": {"1": 0.002, "256": 0.015}},
        "graphs": {"count": 102, "pieces": 928, "bytes": 671_000_000, "seconds": 10.0},
    }


def test_about():
    about = record.about("05")
    assert about["command"] == "python -m nanovllm.lessons record 05"
    assert {"gpu", "driver", "cuda", "torch", "python", "commit", "date", "model"} <= about.keys()
    assert about["torch"] == torch.__version__ and all(isinstance(value, str) for value in about.values())


def test_a_recording_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDINGS", tmp_path / "recordings")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = record.write("05_decode_step", made_up())
    assert (
        record.recording("05_decode_step")
        == json.loads(path.read_text())
        == made_up() | {"about": json.loads(path.read_text())["about"]}
    )
    with pytest.raises(ValueError, match="200,000 are allowed"):
        record.write("05_decode_step", {"x": "x" * 200_001})


def test_a_gpu_records_afresh(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(record.MADE_BY, "05_decode_step", lambda: {"fresh": True})
    assert record.recording("05_decode_step") == {"fresh": True}


@pytest.mark.usefixtures("tapes")
def test_the_recorder_runs_through_on_a_tape(tmp_path, monkeypatch):
    """The real one but for the GPU: a tiny model, tapes in the place of CUDA graphs, no profiler."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    small = dict(device="cpu", dtype="float32", num_kv_blocks=64, max_num_batched_tokens=32, max_num_seqs=4)
    sizes = dict(SETTINGS=small, BATCH_SIZES=(1, 2), DRAWN=(1,), CONTEXT_LEN=8, ROUNDS=2, STEPS=1)

    def make(path, **settings):
        llm = LLM(path, **settings)
        if not settings.get("enforce_eager"):
            chapter_05.capture_graphs(llm)
        return llm

    paused = iter([0.5, 0.0, 0.25, 0.5])  # in the first round, and again in the second with graphs

    def profiled(work):
        work()
        run, pause = from_profiler(EXPORTED), next(paused)
        return replace(run, kernels=[kernel._replace(start=kernel.start + pause) for kernel in run.kernels])

    slow_for_a_while = iter([0.5, 0.25, 0.125, 1.5] + [1.0] * 4)  # batch 1 in the first round, batch 2 in the second
    fastest = lambda work: (work(), next(slow_for_a_while))[1]
    changed = sizes | dict(
        LLM=make, profiled=profiled, fastest_seconds=fastest, qwen3_folder=lambda: nullcontext(tmp_path)
    )
    for name, value in changed.items():
        monkeypatch.setattr(record, name, value)
    monkeypatch.setattr(record, "RECORDINGS", tmp_path)
    with chapter_05.in_the_place_of_cuda_graphs(chapter_05.Recorder):
        made = record.decode_step()
    assert made["timelines"].keys() == {"eager, batch 1", "graph, batch 1"}
    first_kernel = {name: Launches.from_dict(run).kernels[0].start for name, run in made["timelines"].items()}
    assert first_kernel["eager, batch 1"] < 0.25 < first_kernel["graph, batch 1"] < 0.5
    assert made["seconds"] == {"eager": {"1": 0.125, "2": 0.25}, "graph": {"1": 1.0, "2": 1.0}}
    assert made["graphs"]["count"] == 7 + 3 and made["graphs"]["seconds"] > 0
    assert json.loads(record.write("05_decode_step", made).read_text()) == made
    assert "10 graphs and 0 pieces" in "\n".join(chapter_05.lines_of(made))


def test_a_benchmark_is_a_recording(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(record, "qwen3_folder", lambda: nullcontext(tmp_path))
    monkeypatch.setattr(record, "measure_gpu", lambda report, *args: report.add({"measurement": "shared benchmark"}))
    made = record.benchmark()
    assert [r["measurement"] for r in made["records"]] == ["environment", "shared benchmark"]
    assert made["about"]["command"] == "python -m nanovllm.lessons record 07"


def test_ranks_are_recorded_where_there_are_several_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDINGS", tmp_path)
    monkeypatch.setattr(record, "measure_ranks", lambda report: report.add({"measurement": "m"}))
    monkeypatch.setattr(record, "measure_gpu", lambda *args: None)
    for name, value in {"is_available": True, "device_count": 1, "get_device_name": "GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setitem(record.MADE_BY, "07_benchmark", lambda: {})
    assert [path.name for path in record.record("07")] == ["07_benchmark.json"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [path.name for path in record.record("07")] == ["07_benchmark.json", "07_ranks.json"]
    made = json.loads((tmp_path / "07_ranks.json").read_text())
    assert made["about"]["gpu"] == "2 x GPU" and made["records"] == [{"measurement": "m"}]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_is_profiled_without_a_gpu_is_empty(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run = record.profiled(lambda: torch.ones(3) + 1)
    assert run.launches == [] and run.kernels == []


def test_a_recording_is_shown(capsys):
    chapter_05.show_recording(made_up())
    said = capsys.readouterr().out
    assert "batch 256: eager  40.00 ms, graph  15.00 ms, 2.7 times" in said
    assert "102 graphs and 928 pieces: 671 MB, captured in 10.0 s" in said and "% of the step" in said
    assert "commit" in said and "Look for" in said


@pytest.mark.parametrize(
    ("chapter", "words"), [("05", "torch finds none here"), ("03", "there are 05_decode_step, 07_benchmark, 07_ranks")]
)
def test_the_command_without_a_gpu(chapter, words):
    command = [sys.executable, "-m", "nanovllm.lessons", "record", chapter]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and words in run.stderr and "Traceback" not in run.stderr


def test_what_is_stored_is_a_recording():
    for path in record.RECORDINGS.glob("*.json"):
        assert path.stem.removesuffix("_h100") in record.MADE_BY and path.stat().st_size <= record.MAX_BYTES
        about = json.loads(path.read_text())["about"]
        assert about["gpu"] != "none" and not about["commit"].endswith("-dirty")


# -- The device of chapter 05 ------------------------------------------------------------------------------------------


@pytest.fixture
def device():
    device = Device()
    yield device
    device.close()


def test_the_device_computes_what_it_is_told(device):
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    device.put("a", a)
    device.put("b", b)
    device.launch("mm", "c", "a", "b")
    device.launch("sigmoid", "c", "c")
    torch.testing.assert_close(device.get("c"), (a @ b).sigmoid())
    assert device.get("nothing") is None


def test_a_replay_reads_what_is_there_now(device):
    device.put("x", torch.tensor([1.0, 2.0]))
    device.launch("add", "y", "x", "x")
    device.load([("add", "y", "x", "x"), ("mul", "y", "y", "x")])
    device.put("x", torch.tensor([3.0, 5.0]))
    run = device.watch(device.replay)
    assert device.get("y").tolist() == [18.0, 50.0]
    assert [e.name for e in run.launches] == ["replay"] and [e.name for e in run.kernels] == ["add", "mul"]


def test_another_shape_gets_other_memory(device):
    for n in (2, 3):
        device.put("x", torch.ones(n))
        device.launch("add", "y", "x", "x")
        assert device.get("y").tolist() == [2.0] * n


def test_a_wrong_shape_is_refused_before_it_is_sent(device):
    device.put("a", torch.ones(2, 3))
    with pytest.raises(RuntimeError):
        device.launch("mm", "c", "a", "a")
    device.launch("add", "c", "a", "a")
    assert device.get("c").shape == (2, 3)


def test_launches_come_before_what_they_launch(device):
    device.put("x", torch.ones(100))
    for _ in range(2):
        run = device.watch(lambda: [device.launch("add", "x", "x", "x") for _ in range(10)])
        assert len(run.launches) == len(run.kernels) == 10 and run.launches[0].start == 0
        assert all(kernel.start > launch.start for launch, kernel in zip(run.launches, run.kernels))
        assert all(a.end <= b.start for a, b in zip(run.kernels, run.kernels[1:]))
        assert 0 < run.busy <= 1
    fastest = device.fastest(lambda: device.launch("add", "x", "x", "x"), repeats=3, x=torch.ones(100))
    assert device.get("x").tolist() == [2.0] * 100 and len(fastest.kernels) == 1


def test_the_device_ends():
    device = Device()
    device.close()
    device.close()
    assert device.process.returncode == 0

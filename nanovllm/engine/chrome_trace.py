"""A trace in the Chrome trace format, which https://ui.perfetto.dev and chrome://tracing open.

The format is a list of events; times are in microseconds. "X" is a slice with a beginning and a duration, and slices on
one track nest by their times. "C" is a counter, drawn as an area. "M" names a track. (Google, "Trace Event Format".)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.engine.trace import Trace

PROCESS, TRACK = 1, 1


def chrome_events(trace: "Trace") -> list[dict[str, Any]]:
    """A slice for each step with one for each of its phases inside, and counters: blocks, requests, tokens."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": PROCESS, "tid": TRACK, "name": "process_name", "args": {"name": "nanovllm"}},
        {"ph": "M", "pid": PROCESS, "tid": TRACK, "name": "thread_name", "args": {"name": "engine"}},
    ]
    for step, pool in zip(trace.steps, trace.pools()):
        start = 1e6 * step.start
        name = f"step {step.index}" if step.scheduled_rows else "between steps"
        duration = 1e6 * sum(step.times.values())
        about = {"tokens": step.num_tokens, "preempted": step.preempted, "finished": step.finished}
        events.append(slice_event(name, start, duration, about))
        for phase, seconds in step.times.items():
            events.append(slice_event(phase, start, 1e6 * seconds, {}))
            start += 1e6 * seconds
        counters = {
            "blocks in use": trace.num_blocks - len(pool.free),
            "running": len(pool.block_tables),
            "waiting": len(step.waiting),
            "tokens": step.num_tokens,
        }
        for counter, value in counters.items():
            events.append(
                {"ph": "C", "pid": PROCESS, "name": counter, "ts": 1e6 * step.start, "args": {counter: value}}
            )
    return events


def slice_event(name: str, start: float, duration: float, about: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": PROCESS, "tid": TRACK, "name": name, "ts": start, "dur": duration, "args": about}

"""Steps that overlap: on a GPU, a step is launched before the tokens of the one before it are known.

`LLMEngine.step` waits for its tokens before it plans the next step, and meanwhile the GPU has nothing to do. Here the
next step is planned and launched first; then Python learns what the last one gave, while the GPU computes. Planning
needs counts, not tokens, and a sequence's next token is read where it was sampled, on the GPU. (vLLM and SGLang do the
same; NanoFlow, Zhu et al. 2024, has it as asynchronous scheduling.)

The price: that a sequence is finished is learnt one step late. What was launched for it meanwhile is dropped.
"""

import weakref
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING

from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.scheduler import Batch
from nanovllm.utils.interrupts import signals_deferred

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine


class Overlap:
    """Makes an engine's steps, up to two of them in flight at a time."""

    def __init__(self, engine: "LLMEngine") -> None:
        self.engine = weakref.proxy(engine)  # no cycle: once nobody holds it, an engine gives its memory back at once
        self.in_flight: deque[tuple[Batch, LaunchedStep]] = deque()  # the oldest first

    def step(self) -> Batch:
        """Launch a step, and learn what the one before it gave: returns that one's batch.

        The first step has none before it: the batch is empty. If a step fails, it raises; the sequences of all steps in
        flight go back to the queue, as if these had never been.
        """
        start = perf_counter()
        engine, batch, learnt = self.engine, Batch(), Batch()
        try:
            batch = engine.schedule(is_in_flight=bool(self.in_flight))
            if batch.scheduled:
                self.in_flight.append((batch, engine.model_runner.launch(batch)))
            if len(self.in_flight) > bool(batch.scheduled):
                learnt = self.learn()
                engine._log(learnt, perf_counter() - start)
        except BaseException:  # the handler of a signal may raise anything
            self.fail(batch)
            raise
        if not engine.requests:
            self.drain()  # what was launched for those who had finished already
        return learnt

    def learn(self) -> Batch:
        """Wait for the oldest step in flight, and take in what it gave."""
        batch, launched = self.in_flight[0]
        token_ids, logprobs = launched.tokens(), launched.logprobs
        with signals_deferred():
            self.in_flight.popleft()
            self.engine.scheduler.update(batch, token_ids)
            self.engine._show(batch, logprobs)
        return batch

    def drain(self) -> None:
        """Wait for all steps in flight; the next step tells which requests they finished."""
        try:
            while self.in_flight:
                self.learn()
        except BaseException:
            self.fail()
            raise

    def fail(self, *batches: Batch) -> None:
        """A step has failed, and with it all in flight: those after it had its results to work on."""
        self.engine.scheduler.fail(*(batch for batch, _ in self.in_flight), *batches)
        self.in_flight.clear()

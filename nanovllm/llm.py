"""LLM: the engine as users hold it. Prompts in, answers out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm

from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine, Request
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.trace import Trace
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checks import check_text

Prompt = str | list[int]
Message = dict[str, str]


class LLM:
    """A language model that answers prompts, many at once.

    Args:
        model: a local Hugging Face folder, a repository id such as "Qwen/Qwen3-0.6B", or None for the default model,
            SmolLM2-135M-Instruct (downloaded once, 93 MB).
        **settings: any other setting of `Config`, by name.

    Raises:
        ModelUnavailableError: the model was not found, or could not be downloaded.
        TypeError, ValueError: a setting is wrong, the model is not supported or broken, or sizes do not fit.

    An answer is a dict: "text"; "token_ids"; "finish_reason" ("stop", "length" or "abort"); "num_cached_tokens", the
    prompt tokens whose keys and values were found in the prefix cache; "logprobs", one dict {token id: log-probability}
    for each token, or None if not asked for; "request_id".

    Example:
        >>> llm = LLM()
        >>> outputs = llm.generate(["Hello"], SamplingParams(temperature=0.0, max_tokens=10))
        >>> print(outputs[0]["text"])
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        self._engine: LLMEngine | None = LLMEngine(Config(model, **settings))
        self._undelivered: list[dict[str, Any]] = []  # answers to requests added by hand, finished during a `generate`
        self._awaited: set[Request] = set()  # those that a `generate` or `stream` delivers, whoever's steps finish them

    @property
    def engine(self) -> LLMEngine:
        """The engine underneath, to look at: `scheduler`, `block_manager`, `model_runner`, `tokenizer`, `config`."""
        if self._engine is None:
            raise RuntimeError("this LLM has been closed; make a new one")
        return self._engine

    # -- All at once ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Answer a list of prompts; returns their answers in the same order.

        Args:
            prompts: texts or lists of token ids; a single text counts as a list of one.
            sampling_params: for all prompts, or a list with one for each; `SamplingParams()` if not given.
            use_tqdm: show a progress bar, with prompt (prefill) and output (decode) tokens per second.

        Raises:
            TypeError, ValueError: a request is wrong; the message names it by its index, and none has been queued.
        """
        requests = self._make_requests([prompts] if isinstance(prompts, str) else prompts, sampling_params)
        pending = set(requests)
        with self._awaiting(requests), Progress(len(requests), disable=not use_tqdm) as progress:
            for i, request in enumerate(requests):
                with errors_of(f"prompt {i}"):
                    self.engine.enqueue(request)
            while pending:
                start = perf_counter()
                batch, all_finished = self._step()
                finished = pending.intersection(all_finished)
                pending -= finished
                progress.update(batch, len(finished), perf_counter() - start)
        return [request.output() for request in requests]

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer a conversation with the model's own chat template; a list of conversations gives a list of answers.

        Args:
            messages: dicts with "role" ("system", "user" or "assistant") and "content".
            sampling_params, use_tqdm: as for `generate`.
        """
        if not isinstance(messages, list):
            raise TypeError("messages must be a list of dicts with 'role' and 'content', or a list of such lists")
        if not messages or isinstance(messages[0], dict):
            prompt = self.apply_chat_template(messages)  # type: ignore[arg-type]
            return self.generate([prompt], sampling_params, use_tqdm)[0]
        prompts = []
        for i, conversation in enumerate(messages):
            with errors_of(f"conversation {i}"):
                prompts.append(self.apply_chat_template(conversation))
        return self.generate(prompts, sampling_params, use_tqdm)

    def apply_chat_template(self, messages: list[Message]) -> list[int]:
        """The prompt, as token ids, that asks the model for the next message of a conversation."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError("this model has no chat template; use generate with a prompt of your own")
        if not isinstance(messages, list):
            kind = type(messages).__name__
            raise TypeError(f"a conversation must be a list of dicts with 'role' and 'content', not {kind}")
        if not messages:
            raise ValueError("messages is empty; give at least one dict with 'role' and 'content'")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(f"messages[{i}] must be a dict with 'role' and 'content', not {message!r}")
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # "roles must alternate", say
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error
        # Special tokens the template has written already.
        return tokenizer.encode(check_text("the conversation", str(text)), add_special_tokens=False)

    # -- Piece by piece ------------------------------------------------------------------------------------------------

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[dict[str, Any]]:
        """Answer one prompt piece by piece: dicts with what is new in "text" and "token_ids", and "finish_reason".

        The finish reason is None until the last piece. The pieces together are what `generate` gives. A character that
        takes several tokens comes out whole. Leaving the loop early aborts the request.
        """
        request = self.engine.make_request(prompt, sampling_params)  # errors come now, not at the first piece
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[dict[str, Any]]:
        num_chars = num_tokens = 0
        finish_reason = None
        with self._awaiting([request]):
            self.engine.enqueue(request)
            while finish_reason is None:
                if not request.seq.is_finished:  # the steps of another call may have brought it to its end
                    self._step()
                seq, text = request.seq, request.text[num_chars:]
                finish_reason = seq.finish_reason
                token_ids = seq.token_ids[seq.num_prompt_tokens + num_tokens :].tolist()
                num_chars, num_tokens = num_chars + len(text), num_tokens + len(token_ids)
                if token_ids or finish_reason:
                    yield {"text": text, "token_ids": token_ids, "finish_reason": finish_reason}

    # -- By hand -------------------------------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue a request and return its id; `step` makes it go. Raises TypeError or ValueError if it is wrong."""
        return self.engine.enqueue(self.engine.make_request(prompt, sampling_params))

    def step(self) -> list[dict[str, Any]]:
        """Make one step for all requests; returns the answers of those that finished."""
        self._settle()
        batch, finished = self.engine.step()
        self._keep(finished)
        answers, self._undelivered = self._undelivered, []
        return answers

    def abort(self, request_id: int) -> dict[str, Any]:
        """End a request now; returns its answer so far. KeyError if no unfinished request has this id."""
        return self.engine.abort(request_id)

    def trace(self) -> Trace:
        """Record every step from now on, for as long as a `with` block lasts or until the trace's `close`.

        Example:
            >>> with llm.trace() as trace:
            ...     llm.generate(prompts)
            >>> trace.blocks_at(3)  # every block of the KV cache after step 3
        """
        self._settle()
        return self.engine.trace()

    def reset_prefix_cache(self) -> None:
        """Forget what the prefix cache holds: all blocks are as new. RuntimeError while requests are unfinished."""
        self._settle()
        self.engine.reset_prefix_cache()

    def has_unfinished_requests(self) -> bool:
        """Whether another `step` would do something."""
        return bool(self.engine.requests or self.engine.finished or self._undelivered)

    def close(self) -> None:
        """Give back all memory and end all processes. Calling it twice is fine; nothing else works afterwards."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        torch.cuda.empty_cache()  # what PyTorch would keep for our next tensors; without a GPU this does nothing

    # -- Shared by the above -------------------------------------------------------------------------------------------

    def _make_requests(
        self, prompts: list[str] | list[list[int]], sampling_params: SamplingParams | list[SamplingParams] | None
    ) -> list[Request]:
        """Check all requests before any is queued."""
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a list of strings or of token id lists, not {type(prompts).__name__}")
        if not prompts:
            raise ValueError("prompts is empty; give at least one prompt")
        if isinstance(prompts[0], int):
            raise TypeError("prompts must be a list of prompts; put a single list of token ids into another list")
        params = sampling_params if isinstance(sampling_params, (list, tuple)) else [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(params)} sampling_params; give one for each")
        requests = []
        for i, (prompt, request_params) in enumerate(zip(prompts, params)):
            with errors_of(f"prompt {i}"):
                requests.append(self.engine.make_request(prompt, request_params))  # type: ignore[arg-type]
        return requests

    def _step(self) -> tuple[Batch, list[Request]]:
        """One step of a `generate` or `stream`; returns the requests that it finished."""
        batch, finished = self.engine.advance()
        self._keep(finished)
        return batch, finished

    def _keep(self, finished: list[Request]) -> None:
        """Those that nobody awaits are the answers of `step`, now or when it is called next."""
        self._undelivered += [request.output() for request in finished if request not in self._awaited]

    def _settle(self) -> None:
        """Steps that a `generate` or `stream` has left in flight come to their end; nobody's answer is lost."""
        self._keep(self.engine.settle())

    @contextmanager
    def _awaiting(self, requests: list[Request]) -> Iterator[None]:
        """Deliver these requests ourselves. Those left are aborted: a step failed, or a cell or loop was left.

        They may be queued in here: if a scheduler of the user's own refuses one, the others are not left behind.
        """
        self._awaited.update(requests)
        try:
            yield
        finally:
            self._awaited.difference_update(requests)
            if self._engine is not None:  # closed, and they are gone with it
                self._engine.abandon(requests)


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Say in an error which of several things is wrong."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from error


class Progress:
    """The progress bar of `generate`. A rate counts the time of those steps that had such tokens to compute."""

    def __init__(self, num_requests: int, disable: bool) -> None:
        # Without smoothing: requests finish in some steps and not in others, and the rate shall be that of all.
        self.bar = tqdm(total=num_requests, desc="Generating", unit=" requests", disable=disable, smoothing=0)
        self.tokens = {"prefill": 0, "decode": 0}
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, batch: Batch, num_finished: int, seconds: float) -> None:
        """Count one step, with the tokens that came after an answer's end: where steps overlap, they are dropped."""
        num_output_tokens = sum(s.samples for s in batch.scheduled)
        num_prompt_tokens = batch.num_tokens - sum(s.num_new_tokens == 1 and s.samples for s in batch.scheduled)
        for kind, num_tokens in (("prefill", num_prompt_tokens), ("decode", num_output_tokens)):
            if num_tokens:
                self.tokens[kind] += num_tokens
                self.seconds[kind] += seconds
        rates = {k: f"{n / self.seconds[k]:.0f} tokens/s" for k, n in self.tokens.items() if self.seconds[k]}
        self.bar.set_postfix(rates, refresh=False)
        self.bar.update(num_finished)

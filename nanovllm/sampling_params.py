"""SamplingParams: what one request asks for, validated once, when it is made.

Everything behind this class may trust its values. It imports no torch, so it can be studied and tested on its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.utils.checks import check_bool, check_float, check_int, check_str, refuses_unknown_settings


@refuses_unknown_settings
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose a request's next tokens, and when to stop.

    The names and meanings are those of vLLM. A wrong type is a TypeError, a wrong value a ValueError, an unknown name a
    TypeError that suggests the nearest one. Frozen, so what was validated stays valid: change a copy with
    `dataclasses.replace(params, temperature=0.5)`.

    Choosing (each step narrows what the one before it left; see `nanovllm.layers.sampler`):
        temperature: logits are divided by it. Below 1 the likely tokens gain, above 1 the others; 0 is greedy: always
            the likeliest token, whatever the next three settings say.
        top_k: only the k likeliest tokens (Fan et al., 2018, arXiv:1805.04833). 0 is off.
        top_p: only the fewest likeliest tokens whose probabilities reach p, the one that crosses it included: nucleus
            sampling (Holtzman et al., 2019, arXiv:1904.09751). 1 is off.
        min_p: only tokens at least `min_p` times as probable as the likeliest (Nguyen et al., 2024, arXiv:2407.01082).
            0 is off.
        seed: makes the request repeatable: its random numbers depend on the seed and the position of the token alone,
            not on what else runs. None is a different answer every time.

    Stopping:
        max_tokens: at most this many output tokens. None is as many as `max_model_len` has room for.
        ignore_eos: go on after the model's end-of-sequence token. For benchmarks.
        stop: a string or several, held as a tuple; the answer ends before the first of them to appear.
        stop_token_ids: token ids that end the answer as an end-of-sequence token does, held as a tuple. They stay in
            `token_ids` and are left out of `text`.

    More:
        logprobs: per output token, the log-probabilities of the `logprobs` likeliest tokens and of the chosen one, from
            the model's raw distribution, before temperature and truncation. 0 is the chosen one alone; None is none.
        cache_salt: requests share cached prefixes only with requests of the same salt. Give each tenant its own, and
            none can learn from response times what another has asked.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 64
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        self._set("temperature", check_float("temperature", self.temperature, hint="0 is greedy"))
        self._set("top_k", check_int("top_k", self.top_k, hint="0 switches it off"))
        self._set("top_p", check_float("top_p", self.top_p, at_most=1, open_below=True, hint="1 switches it off"))
        self._set("min_p", check_float("min_p", self.min_p, at_most=1, hint="0 switches it off"))
        if self.seed is not None:  # it travels to the device as an int64
            self._set("seed", check_int("seed", self.seed, at_most=2**63 - 1, hint="None is a random one"))
        if self.max_tokens is not None:
            hint = "None is as many as max_model_len has room for"
            self._set("max_tokens", check_int("max_tokens", self.max_tokens, at_least=1, hint=hint))
        check_bool("ignore_eos", self.ignore_eos)
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.logprobs is not None:
            hint = "0 is the chosen token alone, None is none"
            self._set("logprobs", check_int("logprobs", self.logprobs, hint=hint))
        if self.cache_salt is not None:
            check_str("cache_salt", self.cache_salt, hint="None for none")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the way into a frozen dataclass, while it is being made


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, (list, tuple)):
        return tuple(check_str(f"stop[{i}]", text) for i, text in enumerate(stop))
    return (check_str("stop", stop, hint="a list for several, None for none"),)


def _stop_token_ids(token_ids: Any) -> tuple[int, ...]:
    if not isinstance(token_ids, (list, tuple)):
        raise TypeError(f"stop_token_ids must be a list of integers, not {token_ids!r}")
    return tuple(check_int(f"stop_token_ids[{i}]", token_id) for i, token_id in enumerate(token_ids))

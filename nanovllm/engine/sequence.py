"""A sequence: one request's tokens, and how far the engine has come with them."""

from array import array
from collections.abc import Iterable
from enum import Enum

from nanovllm.sampling_params import SamplingParams


class Status(Enum):
    WAITING = "waiting"  # not admitted yet, or preempted: holds no blocks
    RUNNING = "running"  # admitted: holds blocks and a row of the model runner's tables
    FINISHED = "finished"


class Sequence:
    """One request on its way through the engine.

    Two counts say all that the scheduler needs. `num_tokens` is how many tokens the sequence has: its prompt, what was
    generated, and the token that a launched step is about to generate. `num_computed_tokens` is for how many of them
    the KV cache holds keys and values, or will once the launched steps are done. What is missing between the two is
    the work to schedule: a whole prompt at first, one token at a time later. A decode is nothing special.

    `token_ids` holds the *values*, and is shorter than `num_tokens` while a step is in flight. It is an array, whose
    numbers are hashed and copied as they lie: with a list, whose numbers are objects, a step of 8,192 new tokens began
    0.5 ms later. An array never equals a list: to compare, there are `prompt_token_ids` and `output_token_ids`.
    """

    __slots__ = (
        "id",
        "token_ids",
        "num_prompt_tokens",
        "max_num_tokens",
        "stop_token_ids",
        "params",
        "status",
        "finish_reason",
        "num_tokens",
        "num_computed_tokens",
        "num_cached_tokens",
        "num_in_flight",
        "row",
        "block_table",
        "block_hashes",
        "num_entered_blocks",
        "parent",
    )

    def __init__(
        self,
        id: int,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        max_num_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.id = id
        self.token_ids = array("q", prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = max_num_tokens  # prompt and answer together end here
        self.stop_token_ids = stop_token_ids  # any of these ends the answer
        self.params = params

        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.num_tokens = self.num_prompt_tokens
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None  # found in the prefix cache when first admitted
        self.num_in_flight = 0  # launched steps whose result has not arrived
        self.row = -1  # its row in the model runner's tables while it runs

        # The block manager's notes: see block_manager.py
        self.block_table: list[int] = []  # physical block of each logical block
        self.block_hashes: list[int] = []  # chained hash of each full block, computed once
        self.num_entered_blocks = 0  # leading blocks whose content is in the prefix cache
        self.parent: int | str = params.cache_salt or ""  # serial of the last entered content; at first the salt

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens].tolist()

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :].tolist()

    def __repr__(self) -> str:
        return (
            f"Sequence({self.id}, {self.status.value}, {self.num_computed_tokens} of {self.num_tokens} tokens "
            f"computed, blocks {self.block_table})"
        )

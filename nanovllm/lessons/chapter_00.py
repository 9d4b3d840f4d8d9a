"""The exercise checks of chapter 00."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.lessons.checks import attempted, exercise
from nanovllm.lessons.tiny import tiny_llm


@exercise(1, "The same formula gives the size of any model's cache.")
def check_bytes_per_token(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    models = [
        ("Qwen3-0.6B in bfloat16", dict(num_layers=28, num_kv_heads=8, head_dim=128, bytes_per_number=2)),
        ("SmolLM2-135M in float32", dict(num_layers=30, num_kv_heads=3, head_dim=64, bytes_per_number=4)),
    ]
    for _ in range(10):
        made_up = dict(
            num_layers=random.randint(1, 99),
            num_kv_heads=random.randint(1, 16),
            head_dim=random.choice([64, 80, 128]),
            bytes_per_number=random.choice([1, 2, 4]),
        )
        models.append(("a made-up model", made_up))
    for name, sizes in models:
        right = 2 * sizes["num_layers"] * sizes["num_kv_heads"] * sizes["head_dim"] * sizes["bytes_per_number"]
        got = attempted(answer(**sizes))
        described = ", ".join(f"{key}={value}" for key, value in sizes.items())
        if got * 2 == right:
            yield f"you return {got:,} bytes for {name}, which is half. A token needs a key *and* a value."
        elif got != right:
            yield f"you return {got:,} bytes for {name} ({described}); it takes {right:,}."


@exercise(2, "The last token of an answer is never stored: nobody looks back on it.")
def check_blocks_at_the_end(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [(27, 16, 16), (1, 1, 16), (16, 1, 16), (16, 2, 16), (5, 12, 4)]
    cases += [(random.randint(1, 60), random.randint(1, 40), random.choice([1, 4, 16])) for _ in range(3)]
    for num_prompt_tokens, num_answer_tokens, block_size in cases:
        right = blocks_held(num_prompt_tokens, num_answer_tokens, block_size)
        got = attempted(answer(num_prompt_tokens, num_answer_tokens, block_size))
        case = f"a prompt of {num_prompt_tokens} tokens, an answer of {num_answer_tokens} and blocks of {block_size}"
        if got != int(got):
            yield f"you return {got} for {case}, but blocks are handed out whole: round up."
        elif got == right + 1 and (num_prompt_tokens + num_answer_tokens - 1) % block_size == 0:
            yield f"for {case} the engine holds {right}, and you say {got}. Is the last token ever stored?"
        elif got != right:
            yield f"for {case} the engine holds {right} blocks just before it finishes, and you say {got}."


def blocks_held(num_prompt_tokens: int, num_answer_tokens: int, block_size: int) -> int:
    """How many blocks a request holds in its last step, as the engine does it."""
    held = 0

    llm = tiny_llm(num_kv_blocks=256, block_size=block_size)
    manager = llm.engine.block_manager
    params = SamplingParams(temperature=0, max_tokens=num_answer_tokens, ignore_eos=True)
    request = llm.engine.make_request([7] * num_prompt_tokens, params)
    llm.engine.enqueue(request)
    release = manager.release

    def counting_release(*args: Any, **kwargs: Any) -> None:
        nonlocal held
        held = max(held, len(request.seq.block_table))
        release(*args, **kwargs)

    manager.release = counting_release  # type: ignore[method-assign]
    while llm.has_unfinished_requests():
        llm.step()
    return held


@exercise(3, "Those who decode are served first, and the newcomer's prompt takes what is left of the budget.")
def check_steps_to_first_token(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [(40, 32, 0), (40, 32, 2), (64, 32, 0), (30, 32, 2), (31, 32, 2)]
    cases += [(random.randint(1, 300), random.randint(16, 64), random.randint(0, 8)) for _ in range(5)]
    for num_prompt_tokens, budget, num_decoding in cases:
        right = steps_to_first_token(num_prompt_tokens, budget, num_decoding)
        got = attempted(answer(num_prompt_tokens, budget, num_decoding))
        case = f"a prompt of {num_prompt_tokens} tokens, a budget of {budget} and {num_decoding} requests that decode"
        if got == -(-num_prompt_tokens // budget):
            hint = " Each request that decodes takes one token of the budget, in every step."
        elif got == right + 1 and num_prompt_tokens % (budget - num_decoding) == 0:
            hint = " The prompt fits exactly: no step more is needed."
        else:
            hint = ""
        if got != right:
            yield f"with {case} the engine takes {right} steps, and you say {got}.{hint}"


def steps_to_first_token(num_prompt_tokens: int, budget: int, num_decoding: int) -> int:
    """Steps from the arrival of a prompt to its first token, measured on the engine."""
    llm = tiny_llm(num_kv_blocks=512, max_num_batched_tokens=budget, enable_prefix_caching=False)
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    for _ in range(num_decoding):
        llm.add_request([7], long)
    llm.step()  # from now on they decode
    newcomer = llm.engine.make_request([9] * num_prompt_tokens, SamplingParams(temperature=0, max_tokens=1))
    llm.engine.enqueue(newcomer)
    num_steps = 0
    while not newcomer.seq.is_finished:
        llm.step()
        num_steps += 1
    return num_steps


@exercise(4, "First come, first served, and nobody who lost keeps a block.")
def check_race(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    for _ in range(3):
        llm = tiny_llm(num_kv_blocks=64)
        lengths = random.sample(range(2, 30), 4)
        prompts = [[random.randrange(2, 512) for _ in range(random.randint(1, 20))] for _ in lengths]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        got = attempted(answer(llm, prompts, params))
        yield from complaints_about_race(llm, got, lengths)


def complaints_about_race(llm: LLM, got: Any, lengths: list[int]) -> Iterator[str]:
    num_left = len(llm.engine.requests)
    winner = lengths.index(min(lengths))
    if isinstance(got, list):
        yield "you return a list. `llm.step()` gives a list of answers; return the first of them, a dict."
    elif not isinstance(got, dict) or "request_id" not in got:
        yield f"return the winner's answer as `llm.step()` gives it, a dict, not {got!r}."
    elif got["request_id"] != winner:
        yield (
            f"with answers of {lengths} tokens, request {winner} is the first to finish, and you return request "
            f"{got['request_id']}."
        )
    elif num_left:
        yield f"{num_left} of the losers still run and hold blocks. `llm.abort(request_id)` ends a request."
    elif llm.engine.num_steps > min(lengths):
        yield (
            f"you made {llm.engine.num_steps} steps, but the first answer was there after {min(lengths)}: "
            "stop as soon as a step returns an answer."
        )

"""Sampling: is every token as likely as it should be, and does a request get its tokens whoever else is there?"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm.layers.sampler import (
    NO_TOKEN,
    SamplingBatch,
    _mix,
    _truncate,
    _weights,
    sample,
    top_logprobs,
    uniform_numbers,
)
from nanovllm.sampling_params import SamplingParams

INF, NAN = math.inf, math.nan
ALMOST_ONE = 1 - 2**-24  # the largest number that `uniform_numbers` can give


def batch_of(rows: list[dict], uniform: list[float] | np.ndarray) -> SamplingBatch:
    """A batch with the settings of each row as a dict of what differs from the defaults."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return SamplingBatch.from_host(*([row.get(name, off) for row in rows] for name, off in defaults.items()), uniform)


def sample_one(logits: list[float], uniform: float, **settings: float) -> int:
    return int(sample(torch.tensor([logits]), batch_of([settings], [uniform])))


# ---- Are the frequencies right? Chi-square against exact probabilities, with wrong samplers to try the test on. ----


def chi_square_limit(degrees: int, z: float = 4.5) -> float:
    """What a chi-square variable exceeds with the probability of a normal one exceeding z: 3 in a million at 4.5.

    Wilson and Hilferty (1931): the cube root of chi-square / degrees is nearly normal.
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + z * math.sqrt(spread)) ** 3


def fits(tokens: np.ndarray, probs: np.ndarray) -> bool:
    """Whether `tokens` may well have been drawn with `probs`: none that is impossible, the others as often as due."""
    counts = np.bincount(tokens, minlength=len(probs))
    possible = probs > 0
    if len(counts) > len(probs) or counts[~possible].any():
        return False
    expected = probs[possible] * len(tokens)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return possible.sum() == 1 or statistic < chi_square_limit(int(possible.sum()) - 1)


# Shuffled; no two alike, none too rare to be counted.
LOGITS = np.log([0.08, 0.03, 0.29, 0.01, 0.16, 0.06, 0.22, 0.04, 0.11])

CASES: dict[str, dict] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "greedy": {"temperature": 0.0},
    "greedy ignores the rest": {"temperature": 0.0, "top_k": 3, "top_p": 0.9, "min_p": 0.2},
    "top-k": {"top_k": 4},
    "top-k of one": {"top_k": 1},
    "top-k of more than there are": {"top_k": 1000},
    "top-p": {"top_p": 0.6},  # 0.29 + 0.22 = 0.51 is not enough, so the third token crosses
    "top-p of less than the best": {"top_p": 0.1},
    "top-p of nearly all": {"top_p": 0.98},
    "min-p": {"min_p": 0.25},  # 0.0725 and more
    "min-p of one": {"min_p": 1.0},
    "cold top-p": {"temperature": 0.5, "top_p": 0.7},
    "hot min-p": {"temperature": 2.0, "min_p": 0.4},
    "top-k, then top-p": {"top_k": 5, "top_p": 0.77},
    "top-p, then min-p": {"top_p": 0.7, "min_p": 0.35},
    "everything": {"temperature": 1.3, "top_k": 7, "top_p": 0.85, "min_p": 0.25},
}


def exact_probs(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The definition, one token at a time, in float64 and with nothing clever."""
    if temperature == 0:
        return np.eye(len(LOGITS))[LOGITS.argmax()]
    probs = softmax(LOGITS / temperature)
    ranking = list(probs.argsort()[::-1])
    if top_k > 0:
        ranking = ranking[:top_k]
    nucleus, mass, enough = [], 0.0, top_p * probs[ranking].sum()
    for token in ranking:
        if mass < enough:
            nucleus.append(token)
            mass += probs[token]
    return only(probs, [token for token in nucleus if probs[token] >= min_p * probs.max()])


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def only(probs: np.ndarray, kept: list[int]) -> np.ndarray:
    mask = np.isin(np.arange(len(probs)), kept)
    return np.where(mask, probs, 0) / probs[mask].sum()


Sampler = Callable[..., np.ndarray]  # (uniform [n], **settings) -> token ids [n]


def ours(uniform: np.ndarray, **settings: float) -> np.ndarray:
    rows = torch.tensor(LOGITS, dtype=torch.float32).expand(len(uniform), -1)
    return sample(rows, batch_of([settings] * len(uniform), uniform)).numpy()


def drawing_from(probs_of: Callable[..., np.ndarray]) -> Sampler:
    def sampler(uniform: np.ndarray, **settings: float) -> np.ndarray:
        return np.searchsorted(probs_of(**settings).cumsum()[:-1], uniform, side="right")

    return sampler


def is_right(sampler: Sampler, case: str) -> bool:
    uniform = uniform_numbers(np.full(20_000, 2026), np.arange(20_000))
    return fits(sampler(uniform, **CASES[case]), exact_probs(**CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_right(case: str) -> None:
    assert is_right(ours, case)
    assert is_right(drawing_from(exact_probs), case)  # the test's own sampler, which the wrong ones below are made of


def changed(**changes: Callable[[float], float]) -> Callable[..., np.ndarray]:
    """Exact probabilities of settings that were tampered with."""
    return lambda **settings: exact_probs(**{k: changes[k](v) if k in changes else v for k, v in settings.items()})


def drops_the_crossing_token(top_p: float = 1.0, **settings: float) -> np.ndarray:
    probs = exact_probs(**settings)
    ranking = probs.argsort()[::-1]
    return only(probs, list(ranking[probs[ranking].cumsum() <= top_p]))


def top_p_of_the_untruncated(top_k: int = 0, top_p: float = 1.0, **settings: float) -> np.ndarray:
    return only(exact_probs(**settings), list(np.flatnonzero(exact_probs(top_k=top_k) * exact_probs(top_p=top_p))))


def top_p_before_temperature(top_p: float = 1.0, temperature: float = 1.0, **settings: float) -> np.ndarray:
    return only(softmax(LOGITS / temperature), list(np.flatnonzero(exact_probs(top_p=top_p, **settings))))


def min_p_is_absolute(min_p: float = 0.0, **settings: float) -> np.ndarray:
    probs = exact_probs(**settings)
    return only(probs, list(np.flatnonzero(probs >= min_p)))


def min_p_before_top_p(min_p: float = 0.0, top_p: float = 1.0, **settings: float) -> np.ndarray:
    probs = exact_probs(min_p=min_p, **settings)  # as vLLM does: right in itself, but not what we promise
    ranking = probs.argsort()[::-1]
    return only(probs, list(ranking[probs[ranking].cumsum() - probs[ranking] < top_p]))


def one_number_for_all(uniform: np.ndarray, **settings: float) -> np.ndarray:
    return ours(np.full_like(uniform, uniform[0]), **settings)


def falls_off_the_end(uniform: np.ndarray, **settings: float) -> np.ndarray:
    """Forgets to divide by the sum of what truncation has left: what lies beyond goes to the last token."""
    probs = softmax(LOGITS / settings.get("temperature", 1.0))
    return np.searchsorted((probs * (exact_probs(**settings) > 0)).cumsum()[:-1], uniform, side="right")


WRONG: dict[str, tuple[Sampler, str]] = {
    "temperature twice": (drawing_from(changed(temperature=lambda t: t * t)), "cold"),
    "temperature multiplies": (drawing_from(changed(temperature=lambda t: 1 / t)), "hot"),
    "temperature ignored": (drawing_from(changed(temperature=lambda t: 1.0)), "greedy"),
    "one token too few in top-k": (drawing_from(changed(top_k=lambda k: k - 1)), "top-k"),
    "one token too many in top-k": (drawing_from(changed(top_k=lambda k: k + 1)), "top-k of one"),
    "top-p drops the crossing token": (drawing_from(drops_the_crossing_token), "top-p"),
    "top-p keeps one more than the crossing token": (drawing_from(changed(top_p=lambda p: p + 0.1)), "top-p"),
    "top-p before temperature": (drawing_from(top_p_before_temperature), "cold top-p"),
    "top-p of what top-k has taken away too": (drawing_from(top_p_of_the_untruncated), "top-k, then top-p"),
    "min-p is absolute": (drawing_from(min_p_is_absolute), "min-p"),
    "min-p before top-p": (drawing_from(min_p_before_top_p), "top-p, then min-p"),
    "min-p before temperature": (drawing_from(changed(min_p=lambda p: p**2)), "hot min-p"),
    "one number for all rows": (one_number_for_all, "plain"),
    "the first token is never drawn": (lambda uniform, **s: np.maximum(ours(uniform, **s), 1), "plain"),
    "not divided by the sum": (falls_off_the_end, "top-k"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_the_same_test_rejects_a_sampler_with(fault: str) -> None:
    sampler, case = WRONG[fault]
    assert not is_right(sampler, case)


def test_top_p_that_drops_the_boundary_token() -> None:  # a trap in ANCHORS.md
    logits = np.log([0.5, 0.3, 0.2]).tolist()
    reachable = {sample_one(logits, u, top_p=0.6) for u in np.linspace(0, ALMOST_ONE, 101)}
    assert reachable == {0, 1}  # 0.5 is not enough, so 0.3 is kept with it


# ---- Truncation keeps the same tokens as transformers. ----


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [0, 1, 50, 1500])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_transformers_keeps_the_same_tokens(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(24, 3000, generator=torch.Generator().manual_seed(7)) * torch.linspace(0.5, 2, 24)[:, None]
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k > 0:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    if min_p > 0:
        theirs = MinPLogitsWarper(min_p)(None, theirs)

    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    batch = batch_of([settings] * 24, np.zeros(24))
    weights = _weights(logits, logits.amax(dim=-1), batch.temperature)
    kept = (_truncate(weights, batch) if batch.truncates else weights) > 0
    assert torch.equal(kept, theirs.isfinite())


def test_ties_at_the_edge_are_all_kept() -> None:
    logits = [1.0, 2.0, 1.0, 1.0, 0.0]
    # The best token alone has e^2 / (e^2 + 3e + 1) = 0.446, less than 0.5.
    for settings in ({"top_k": 2}, {"top_p": 0.5}):
        assert {sample_one(logits, u, **settings) for u in np.linspace(0, ALMOST_ONE, 101)} == {0, 1, 2, 3}


# ---- A row depends on nothing but itself. ----


def crowd(n: int, vocab_size: int, seed: int) -> tuple[torch.Tensor, list[dict], np.ndarray]:
    """Rows of every kind: greedy, plain and truncated in all ways, peaked and flat, some with forbidden tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, vocab_size)) * rng.uniform(0.1, 5, (n, 1))
    logits[rng.random((n, vocab_size)) < rng.choice([0, 0.5], (n, 1))] = -INF
    rows = [
        {
            "temperature": float(rng.choice([0, 0.5, 1, 1.7])),
            "top_k": int(rng.choice([0, 0, 1, 20, vocab_size])),
            "top_p": float(rng.choice([1, 1, 0.9, 0.2])),
            "min_p": float(rng.choice([0, 0, 0.1])),
        }
        for _ in range(n)
    ]
    return torch.tensor(logits, dtype=torch.float32), rows, rng.random(n, dtype=np.float32)


@pytest.mark.parametrize(("n", "vocab_size", "repeats"), [(48, 2500, 2), (6, 151_936, 1)])
def test_a_row_gives_the_same_token_alone_and_in_a_crowd(n: int, vocab_size: int, repeats: int) -> None:
    for seed in range(repeats):
        logits, rows, uniform = crowd(n, vocab_size, seed)
        together = sample(logits, batch_of(rows, uniform))
        alone = [sample(logits[i : i + 1], batch_of(rows[i : i + 1], uniform[i : i + 1])) for i in range(n)]
        assert torch.equal(together, torch.cat(alone))
        order = np.random.default_rng(seed).permutation(n)[: n // 2]
        some = sample(logits[order], batch_of([rows[i] for i in order], uniform[order]))
        assert torch.equal(together[order], some)


def test_a_row_without_truncation_does_not_care_which_path_its_neighbours_take() -> None:
    logits, _, uniform = crowd(64, 8000, seed=5)
    plain = sample(logits, batch_of([{}] * 64, uniform))
    for neighbour in ({"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 3, "top_p": 0.9}):
        mixed = sample(logits, batch_of([neighbour, {}] * 32, uniform))
        assert torch.equal(mixed[1::2], plain[1::2])


def test_settings_that_take_nothing_away_change_nothing() -> None:
    logits, _, uniform = crowd(64, 5000, seed=6)
    plain = sample(logits, batch_of([{}] * 64, uniform))
    for settings in ({"top_k": 5000}, {"min_p": 1e-30}, {"top_k": 5000, "min_p": 1e-30}):
        assert torch.equal(sample(logits, batch_of([settings] * 64, uniform)), plain)


def test_a_nucleus_larger_than_usual_is_found_too() -> None:
    flat = torch.zeros(2, 40_000)
    flat[:, :30_000] = 1.0  # together 0.89 of the weight
    tokens = sample(flat, batch_of([{"top_p": 0.8}, {"top_p": 0.95}], [ALMOST_ONE, ALMOST_ONE]))
    assert tokens.tolist() == [29_999, 39_999]


def test_a_row_that_cannot_be_sampled_is_marked_and_disturbs_nobody() -> None:
    logits, _, uniform = crowd(6, 3000, seed=8)
    bad = logits.clone()
    bad[1, 17], bad[3], bad[4, 5] = NAN, -INF, INF
    for settings in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}):
        good_tokens = sample(logits, batch_of([settings] * 6, uniform))
        tokens = sample(bad, batch_of([settings] * 6, uniform))
        assert tokens[[1, 3, 4]].tolist() == [NO_TOKEN] * 3
        assert torch.equal(tokens[[0, 2, 5]], good_tokens[[0, 2, 5]])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}])
def test_in_place_operations_do_not_reach_the_logits(settings: dict) -> None:  # a trap in ANCHORS.md
    logits, _, uniform = crowd(4, 100, seed=9)
    before = logits.clone()
    tokens = sample(logits, batch_of([settings] * 4, uniform))
    top_logprobs(logits, tokens, 3)
    assert torch.equal(logits, before)


# ---- Edges ----


@pytest.mark.parametrize("uniform", [0.0, 2**-24, 0.5, ALMOST_ONE])
def test_a_token_of_probability_zero_is_never_chosen(uniform: float) -> None:
    nothing = [-INF] * 500
    assert sample_one([*nothing, 0.0, *nothing], uniform) == 500
    assert sample_one([-200.0, 0.0, -200.0], uniform) == 1  # exp(-200) is zero in float32
    assert sample_one([1.0, 2.0, 1.5], uniform, top_k=1) == 1
    assert sample_one([1.0, 2.0, 1.5], uniform, top_p=1e-30) == 1
    assert sample_one([1.0, 2.0, 1.5], uniform, top_p=1e-300) == 1  # zero in float32
    assert sample_one([1.0, 2.0, 1.5], uniform, min_p=1.0) == 1


def test_the_dart_is_exact_over_a_large_vocabulary() -> None:
    vocab_size = 151_936
    tokens = np.linspace(1, vocab_size - 1, 16).astype(int)
    just_before = np.floor(tokens / vocab_size * 2**24) / 2**24  # closer than a sum of 151,936 float32 can tell
    chosen = sample(torch.zeros(16, vocab_size), batch_of([{}] * 16, just_before))
    assert chosen.tolist() == [int(u * vocab_size) for u in just_before]


def test_extreme_temperatures() -> None:
    assert {sample_one([1.0, 3.0, 2.0], u, temperature=1e-30) for u in (0, 0.5, ALMOST_ONE)} == {1}
    assert sample_one([1.0, 3.0, 2.0], 0.0, temperature=1e-300) == 1  # zero in float32, so greedy
    assert [sample_one([-1e9, 1e9, -INF], u, temperature=3e38) for u in (0, 0.4, 0.6, ALMOST_ONE)] == [0, 0, 1, 1]


def test_a_step_in_which_nobody_samples() -> None:  # all of it is chunks of prompts
    assert sample(torch.zeros(0, 50), batch_of([], [])).shape == (0,)


def test_greedy_takes_the_first_of_equals() -> None:
    assert sample_one([1.0, 7.0, 7.0, 2.0], 0.9, temperature=0.0) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    logits, rows, uniform = crowd(16, 1000, seed=10)
    half = logits.to(dtype)
    assert torch.equal(sample(half, batch_of(rows, uniform)), sample(half.float(), batch_of(rows, uniform)))


def test_the_host_knows_what_the_batch_needs() -> None:
    def flags(*rows: dict) -> tuple[bool, bool, int, bool]:
        batch = batch_of(list(rows), np.zeros(len(rows)))
        return batch.all_greedy, batch.truncates, batch.largest_top_k, batch.open_nucleus

    greedy = {"temperature": 0.0, "top_k": 9, "top_p": 0.5, "min_p": 0.5}  # truncation of a greedy row needs no work
    assert flags(greedy) == flags({"temperature": 0.0, "top_p": 0.5}) == (True, False, 0, False)
    assert flags({}, greedy) == (False, False, 0, False)
    assert flags({"min_p": 0.1}) == (False, True, 0, False)
    assert flags({"top_k": 3, "top_p": 0.5}, {"top_k": 40}, greedy) == (False, True, 40, False)
    assert flags({"top_k": 3}, {"top_p": 0.5}) == (False, True, 3, True)


# ---- Random numbers ----


def test_the_random_numbers_are_those_of_splitmix64() -> None:
    golden = np.uint64(0x9E3779B97F4A7C15)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # its first numbers from state 0
    assert _mix(np.arange(1, 4, dtype=np.uint64) * golden).tolist() == published

    # Ours start from mix(seed + golden): for seed 0, from the first of these. Plain Python integers do not wrap around.
    states = [(published[0] + position * int(golden)) % 2**64 for position in (0, 1, 4096)]
    expected = _mix(np.array(states, np.uint64)) >> 40
    numbers = uniform_numbers([0, 0, 0], [0, 1, 4096])
    assert numbers.dtype == np.float32
    assert (numbers * 2**24).tolist() == expected.tolist()


def test_a_seed_means_the_same_in_every_release() -> None:
    numbers = uniform_numbers(np.array([0, 1, 1, 2**63 - 1]), np.array([0, 0, 1, 2**31]))
    assert (numbers * 2**24).astype(int).tolist() == [4727170, 14476323, 6177195, 4353659]
    assert uniform_numbers([], []).shape == (0,)


def looks_random(generator: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> bool:
    """Even, and independent from one position to the next, one seed to the next, and along both diagonals."""
    n = 512
    seeds, positions = (grid.ravel() for grid in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    numbers = generator(seeds, positions).astype(np.float64).reshape(n, n)
    if not (0 <= numbers.min() and numbers.max() < 1):
        return False
    # Even: over all pairs, and in the low bits as well as the high ones.
    if not all(fits((numbers * scale % 1 * 256).astype(int).ravel(), np.full(256, 1 / 256)) for scale in (1, 2**16)):
        return False
    # Each seed's own numbers, and each position's, are even too.
    for table in (numbers, numbers.T):
        counts = np.stack([np.bincount((row * 16).astype(int), minlength=16) for row in table])
        statistics = ((counts - n / 16) ** 2 / (n / 16)).sum(axis=1)
        if statistics.max() > chi_square_limit(15, z=5.5):
            return False
    # Independent: neighbours fill a 16 by 16 board evenly.
    for ds, dp in ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0)):
        here = numbers[: n - ds, max(0, -dp) : n - max(0, dp)]
        there = numbers[ds:, max(0, dp) : n - max(0, -dp)]
        board = (here * 16).astype(int) * 16 + (there * 16).astype(int)
        if not fits(board.ravel(), np.full(256, 1 / 256)):
            return False
    return True


def test_uniform_numbers_look_random() -> None:
    assert looks_random(uniform_numbers)
    assert looks_random(lambda seeds, positions: uniform_numbers(seeds + 2**62, positions * 16 + 1000))


@pytest.mark.parametrize(
    "generator",
    [
        lambda s, p: uniform_numbers(s + p, np.zeros_like(p)),  # the next seed is one position ahead
        lambda s, p: uniform_numbers(s ^ p, np.zeros_like(p)),
        lambda s, p: uniform_numbers(s, np.zeros_like(p)),  # forgets the position
        lambda s, p: uniform_numbers(np.zeros_like(s), p),  # forgets the seed
        lambda s, p: ((s * 0.618033988 + p * 0.754877666) % 1),  # even, but neighbours are a fixed step apart
        lambda s, p: np.minimum(uniform_numbers(s, p) * 1.02, 0.999),  # not even
    ],
    ids=["seed + position", "seed ^ position", "no position", "no seed", "lattice", "uneven"],
)
def test_the_same_test_rejects_bad_random_numbers(generator: Callable) -> None:
    assert not looks_random(generator)


# ---- Log-probabilities ----


def test_logprobs_are_a_log_softmax_of_the_raw_logits() -> None:
    logits, _, _ = crowd(8, 500, seed=11)
    token_ids = torch.arange(8)
    expected = logits.double().log_softmax(dim=-1)
    chosen, best_ids, best_logprobs = top_logprobs(logits, token_ids, 5)
    torch.testing.assert_close(chosen.double(), expected[torch.arange(8), token_ids], atol=1e-5, rtol=0)
    assert torch.equal(best_ids, logits.topk(5).indices)
    torch.testing.assert_close(best_logprobs.double(), expected.gather(1, best_ids), atol=1e-5, rtol=0)


def test_logprobs_of_no_others_or_of_all() -> None:
    logits, _, _ = crowd(3, 20, seed=12)
    chosen, best_ids, best_logprobs = top_logprobs(logits, torch.tensor([1, 2, 3]), 0)
    assert best_ids.shape == best_logprobs.shape == (3, 0) and chosen.shape == (3,)
    assert top_logprobs(logits, torch.tensor([1, 2, 3]), 1000)[1].shape == (3, 20)


def test_logprobs_of_a_row_that_could_not_be_sampled_are_nan() -> None:
    logits = torch.tensor([[0.0, NAN], [0.0, 0.0]])
    chosen, _, _ = top_logprobs(logits, torch.tensor([NO_TOKEN, 1]), 1)
    assert chosen[0].isnan() and chosen[1].item() == pytest.approx(-math.log(2))


# ---- SamplingParams ----


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, "temperature must be at least 0 and finite, not -0.5; 0 is greedy"),
        ({"temperature": NAN}, ValueError, "temperature must be at least 0 and finite, not nan; 0 is greedy"),
        ({"temperature": INF}, ValueError, "temperature must be at least 0 and finite, not inf; 0 is greedy"),
        ({"temperature": 1e39}, ValueError, "temperature must be at least 0 and finite, not 1e+39; 0 is greedy"),
        ({"temperature": [0.5]}, TypeError, "temperature must be a number, not [0.5] (list); 0 is greedy"),
        ({"temperature": "0.5"}, TypeError, "temperature must be a number, not '0.5' (str); 0 is greedy"),
        ({"temperature": None}, TypeError, "temperature must be a number, not None (NoneType); 0 is greedy"),
        ({"temperature": True}, TypeError, "temperature must be a number, not True (bool); 0 is greedy"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0, not -1; 0 switches it off"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, not 2.0 (float); 0 switches it off"),
        ({"top_k": True}, TypeError, "top_k must be an integer, not True (bool); 0 switches it off"),
        ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, not 0; 1 switches it off"),
        ({"top_p": 1.01}, ValueError, "top_p must be above 0 and at most 1, not 1.01; 1 switches it off"),
        ({"top_p": NAN}, ValueError, "top_p must be above 0 and at most 1, not nan; 1 switches it off"),
        ({"top_p": "1"}, TypeError, "top_p must be a number, not '1' (str); 1 switches it off"),
        ({"min_p": -0.1}, ValueError, "min_p must be at least 0 and at most 1, not -0.1; 0 switches it off"),
        ({"min_p": 2}, ValueError, "min_p must be at least 0 and at most 1, not 2; 0 switches it off"),
        ({"min_p": NAN}, ValueError, "min_p must be at least 0 and at most 1, not nan; 0 switches it off"),
        ({"seed": -1}, ValueError, "seed must be at least 0, not -1; None is a random one"),
        ({"seed": 2**63}, ValueError, f"seed must be at most {2**63 - 1}, not {2**63}; None is a random one"),
        ({"seed": "7"}, TypeError, "seed must be an integer, not '7' (str); None is a random one"),
        (
            {"max_tokens": 0},
            ValueError,
            "max_tokens must be at least 1, not 0; None is as many as max_model_len has room for",
        ),
        (
            {"max_tokens": 1.5},
            TypeError,
            "max_tokens must be an integer, not 1.5 (float); None is as many as max_model_len has room for",
        ),
        ({"ignore_eos": 1}, TypeError, "ignore_eos must be True or False, not 1 (int)"),
        (
            {"stop": ""},
            ValueError,
            "stop must be a string with something in it, not ''; a list for several, None for none",
        ),
        ({"stop": 5}, TypeError, "stop must be a string, not 5 (int); a list for several, None for none"),
        ({"stop": ["a", ""]}, ValueError, "stop[1] must be a string with something in it, not ''"),
        ({"stop": ["a\ud800"]}, ValueError, r"stop[0] has half a character, '\ud800', at 1"),
        ({"cache_salt": "\ud800"}, ValueError, r"cache_salt has half a character, '\ud800', at 0"),
        ({"stop": ["a", 5]}, TypeError, "stop[1] must be a string, not 5 (int)"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a list of integers, not 5"),
        ({"stop_token_ids": [1, "2"]}, TypeError, "stop_token_ids[1] must be an integer, not '2' (str)"),
        ({"stop_token_ids": [-2]}, ValueError, "stop_token_ids[0] must be at least 0, not -2"),
        (
            {"logprobs": -1},
            ValueError,
            "logprobs must be at least 0, not -1; 0 is the chosen token alone, None is none",
        ),
        (
            {"logprobs": True},
            TypeError,
            "logprobs must be an integer, not True (bool); 0 is the chosen token alone, None is none",
        ),
        (
            {"cache_salt": ""},
            ValueError,
            "cache_salt must be a string with something in it, not ''; None for none",
        ),
        ({"cache_salt": 3}, TypeError, "cache_salt must be a string, not 3 (int); None for none"),
        ({"temprature": 0.5}, TypeError, "SamplingParams: unknown setting 'temprature'; did you mean 'temperature'?"),
        (
            {"max_new_tokens": 5},
            TypeError,
            "SamplingParams: unknown setting 'max_new_tokens'; did you mean 'max_tokens'?",
        ),
        (
            {"beams": 4},
            TypeError,
            "SamplingParams: unknown setting 'beams'; the settings are temperature, top_k, top_p, min_p, seed, "
            "max_tokens, ignore_eos, stop, stop_token_ids, logprobs, cache_salt",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_refused_by_name(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SamplingParams(**settings)
    assert str(caught.value) == message


def test_settings_are_held_as_plain_python_values() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(4),
        min_p=0,
        stop="end",
        stop_token_ids=[np.int32(7)],
        max_tokens=None,
    )
    assert [type(x) for x in (params.temperature, params.top_k, params.min_p)] == [float, int, float]
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 4, None)
    assert (params.stop, params.stop_token_ids) == (("end",), (7,))
    assert SamplingParams().stop == SamplingParams(stop=[]).stop == ()
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_validated_once_stays_valid() -> None:
    params = SamplingParams(temperature=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = -1.0
    assert dataclasses.replace(params, temperature=0).temperature == 0.0
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        dataclasses.replace(params, temperature=-1)

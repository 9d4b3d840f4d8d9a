"""LLM: what users hold. Every promise of its docstrings, and every way to use it wrongly."""

import ctypes
import gc
import inspect
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.engine import llm_engine
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.utils.loader import build_model
from tests.conftest import Panic, abandoned_stream, alarms, collecting_once, collector_off, failing_once, interrupted
from tests.scheduling import Slips

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


class TestLLM:
    """The two examples of the guide that this project started from, as they stand there."""

    def test_basic_generation(self, model_path):
        llm = LLM(model_path)
        sampling_params = SamplingParams(temperature=0.0, max_tokens=10)

        outputs = llm.generate(["Hello"], sampling_params)

        assert len(outputs) == 1
        assert "text" in outputs[0]
        assert "token_ids" in outputs[0]
        assert len(outputs[0]["token_ids"]) <= 10

    def test_batch_generation(self, model_path):
        llm = LLM(model_path)
        sampling_params = SamplingParams(temperature=0.0, max_tokens=5)

        prompts = ["A", "B", "C"]
        outputs = llm.generate(prompts, sampling_params)

        assert len(outputs) == 3
        for output in outputs:
            assert len(output["token_ids"]) <= 5


@pytest.fixture(scope="module")
def shared_llm(model_path):
    return LLM(model_path, num_kv_blocks=64)


@pytest.fixture
def llm(shared_llm):
    """An engine that each test must leave as it found it: nothing running, nothing waiting, every block free."""
    yield shared_llm
    assert_idle(shared_llm)


def assert_idle(llm):
    engine = llm.engine
    assert not llm.has_unfinished_requests() and not engine.requests
    assert not engine.scheduler.running and not engine.scheduler.waiting
    assert len(engine.block_manager.free) == engine.block_manager.num_blocks
    assert all(block.ref_count == 0 for block in engine.block_manager.blocks)
    assert sorted(engine.scheduler.free_rows) == list(range(engine.config.max_num_seqs))


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


# -- Answers -----------------------------------------------------------------------------------------------------------


def test_an_output_has_all_its_parts(llm):
    (output,) = generate(llm, ["Hello"])
    assert output.keys() == {"request_id", "text", "token_ids", "finish_reason", "num_cached_tokens", "logprobs"}
    assert len(output["token_ids"]) == 8 and all(type(t) is int for t in output["token_ids"])
    assert output["text"] == llm.engine.tokenizer.decode(output["token_ids"], skip_special_tokens=True)
    assert output["finish_reason"] == "length" and output["logprobs"] is None


def test_a_single_string_is_a_list_of_one(llm):
    assert generate(llm, "Hello")[0]["token_ids"] == generate(llm, ["Hello"])[0]["token_ids"]


def test_token_ids_may_be_given_and_numpy_integers_too(llm):
    token_ids = llm.engine.tokenizer.encode("Hello there")
    expected = generate(llm, ["Hello there"])[0]["token_ids"]
    assert generate(llm, [token_ids])[0]["token_ids"] == expected
    assert generate(llm, [list(np.array(token_ids))])[0]["token_ids"] == expected


def test_outputs_come_in_the_order_of_the_prompts_with_their_own_params(llm):
    prompts = ["one", "two", "three", "four"]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (7, 1, 5, 2)]
    outputs = generate(llm, prompts, params)
    assert [len(o["token_ids"]) for o in outputs] == [7, 1, 5, 2]
    for prompt, output in zip(prompts, outputs):
        alone = generate(llm, [prompt])[0]["token_ids"]
        assert output["token_ids"] == alone[: len(output["token_ids"])]


def test_default_sampling_params(llm):
    (output,) = llm.generate(["Hello"], use_tqdm=False)
    assert 1 <= len(output["token_ids"]) <= 64


def test_num_cached_tokens_counts_the_hits_at_admission(model_path):
    llm = LLM(model_path, num_kv_blocks=64, block_size=4)
    prompt = list(range(10, 23))  # 13 tokens: three full blocks
    assert generate(llm, [prompt])[0]["num_cached_tokens"] == 0
    assert generate(llm, [prompt])[0]["num_cached_tokens"] == 12
    assert generate(llm, [prompt[:12]])[0]["num_cached_tokens"] == 8  # one token at least is computed
    assert generate(llm, [prompt[:6] + [99] * 7])[0]["num_cached_tokens"] == 4


def test_prefix_caching_can_be_switched_off(model_path):
    llm = LLM(model_path, num_kv_blocks=64, block_size=4, enable_prefix_caching=False)
    prompt = list(range(10, 23))
    assert [generate(llm, [prompt])[0]["num_cached_tokens"] for _ in range(2)] == [0, 0]


def test_cache_salt_keeps_tenants_apart(model_path):
    llm = LLM(model_path, num_kv_blocks=64, block_size=4)
    prompt = list(range(10, 23))
    hits = []
    for salt in ("red", "blue", "red", None):
        params = SamplingParams(temperature=0.0, max_tokens=2, cache_salt=salt)
        hits.append(generate(llm, [prompt], params)[0]["num_cached_tokens"])
    assert hits == [0, 0, 12, 0]


# -- Where an answer ends ----------------------------------------------------------------------------------------------


def test_eos_ends_an_answer_and_stays_in_token_ids_but_not_in_text(model_path):
    llm = LLM(model_path, num_kv_blocks=64)
    token_ids = generate(llm, ["Hello"])[0]["token_ids"]
    eos = token_ids[3]  # an ordinary token, made an end-of-sequence token: its text must go as well
    first = token_ids.index(eos)
    llm.engine.eos_token_ids = frozenset({eos, 1})
    params = SamplingParams(temperature=0.0, max_tokens=8)
    (output,) = generate(llm, ["Hello"], params)
    assert output["token_ids"] == token_ids[: first + 1] and output["finish_reason"] == "stop"
    assert output["text"] == llm.engine.tokenizer.decode(token_ids[:first], skip_special_tokens=True)
    assert generate(llm, ["Hello"])[0]["token_ids"] == token_ids, "ignore_eos goes on"


def test_trap_only_one_eos_id_honoured(model_path):
    eos = json.loads((model_path / "generation_config.json").read_text())["eos_token_id"]
    assert isinstance(eos, list) and len(eos) > 1
    llm = LLM(model_path, num_kv_blocks=8)
    for token_id in eos:
        llm.engine.model_runner.model.compute_logits = lambda hidden_states: one_hot(token_id, len(hidden_states))
        (output,) = generate(llm, ["Hello"], SamplingParams(temperature=0.0))
        assert output["token_ids"] == [token_id] and output["finish_reason"] == "stop"


def one_hot(token_id, num_rows):
    return torch.nn.functional.one_hot(torch.tensor([token_id] * num_rows), 320).float()


def test_trap_special_tokens_left_in_the_text(llm, monkeypatch):
    special = llm.engine.tokenizer.convert_tokens_to_ids("<|im_start|>")
    answers = iter([65, special, 66])
    compute = lambda hidden_states: one_hot(next(answers), len(hidden_states))  # noqa: E731
    monkeypatch.setattr(llm.engine.model_runner.model, "compute_logits", compute)
    (output,) = generate(llm, ["Hello"], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    assert output["token_ids"] == [65, special, 66]
    assert output["text"] == llm.engine.tokenizer.decode([65, 66])


def test_stop_token_ids(llm):
    token_ids = generate(llm, ["Hello"])[0]["token_ids"]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop_token_ids=[token_ids[4]])
    (output,) = generate(llm, ["Hello"], params)
    assert output["token_ids"] == token_ids[: token_ids.index(token_ids[4]) + 1]
    assert output["finish_reason"] == "stop"


def test_a_stop_string_is_left_out_of_the_text(llm):
    text = generate(llm, ["Hello"])[0]["text"]
    stop = text[3:5]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop=[stop, "never seen"])
    (output,) = generate(llm, ["Hello"], params)
    assert output["text"] == text[: text.index(stop)] and output["finish_reason"] == "stop"
    assert len(output["token_ids"]) < 8


def test_a_stop_string_completed_by_the_last_token_is_a_stop(llm):
    text = generate(llm, ["Hello"])[0]["text"]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop=text)
    (output,) = generate(llm, ["Hello"], params)
    assert output["finish_reason"] == "stop" and output["text"] == "" and len(output["token_ids"]) == 8


def test_trap_no_check_of_prompt_and_max_tokens_against_max_model_len(model_path):
    llm = LLM(model_path, num_kv_blocks=64, max_model_len=50)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (output,) = generate(llm, [[5] * 20], params)
    assert len(output["token_ids"]) == 30 and output["finish_reason"] == "length"
    params = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
    assert len(generate(llm, [[5] * 49], params)[0]["token_ids"]) == 1


def test_max_model_len_is_no_more_than_the_cache_holds(model_path):
    llm = LLM(model_path, num_kv_blocks=3, block_size=16)
    assert llm.engine.config.max_model_len == 48
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    assert len(generate(llm, [[5] * 40], params)[0]["token_ids"]) == 8


# -- Streams and conversations -----------------------------------------------------------------------------------------


def test_a_stream_is_the_answer_in_pieces(llm):
    (expected,) = generate(llm, ["Hello"])
    chunks = list(llm.stream("Hello", GREEDY))
    assert "".join(c["text"] for c in chunks) == expected["text"]
    assert sum((c["token_ids"] for c in chunks), []) == expected["token_ids"]
    assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_a_stream_never_breaks_a_character(default_model_path):
    llm = LLM(default_model_path, num_kv_blocks=64)
    prompt = "Copy exactly: 你好，世界！👩‍🚀🚀 Copy: 你好，世界！👩‍🚀🚀 Copy: "
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    (expected,) = generate(llm, [prompt], params)
    chunks = [c["text"] for c in llm.stream(prompt, params)]
    assert "".join(chunks) == expected["text"] == llm.engine.tokenizer.decode(expected["token_ids"])
    assert any(ord(c) > 0x2E80 for c in expected["text"]), "the model should answer in Chinese or emoji here"
    assert not any("\ufffd" in chunk for chunk in chunks[:-1])


def test_leaving_a_stream_early_aborts_it(llm):
    for chunk in llm.stream("Hello", SamplingParams(max_tokens=None, ignore_eos=True)):
        break
    gc.collect()
    assert_idle(llm)


def test_a_stream_ends_as_it_should_whoever_makes_its_steps(llm):
    (expected,) = generate(llm, ["Hello"])
    streams = [llm.stream("Hello", GREEDY) for _ in range(3)]
    first = [next(stream) for stream in streams]
    llm.step()
    generate(llm, ["longer"], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    for piece, stream in zip(first, streams):
        pieces = [piece, *stream]
        assert sum((p["token_ids"] for p in pieces), []) == expected["token_ids"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert not llm.has_unfinished_requests(), "nobody else is told of them"


def test_a_stream_tells_that_it_was_aborted(llm):
    stream = llm.stream("Hello", SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    llm.abort(max(llm.engine.requests))
    assert list(stream) == [{"text": "", "token_ids": [], "finish_reason": "abort"}]


def test_a_wrong_stream_request_raises_at_once(llm):
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.stream([])


def test_chat(default_model_path):
    llm = LLM(default_model_path, num_kv_blocks=64)
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0.0, max_tokens=24)
    answer = llm.chat(conversation, params, use_tqdm=False)
    assert "Paris" in answer["text"] and answer["finish_reason"] == "stop"
    assert "<|im_end|>" not in answer["text"]
    answers = llm.chat([conversation, conversation], params, use_tqdm=False)
    assert [a["token_ids"] for a in answers] == [answer["token_ids"]] * 2


GOOD_MESSAGE = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([], ValueError, "messages is empty"),
        ("Hi", TypeError, "must be a list of dicts with 'role' and 'content'"),
        ([{"role": "user"}], ValueError, r"^messages\[0\] must be a dict with 'role' and 'content'"),
        (
            ["Hi"],
            TypeError,
            "conversation 0: a conversation must be a list of dicts with 'role' and 'content', not str",
        ),
        ([[GOOD_MESSAGE], 3], TypeError, "conversation 1: a conversation must be a list of dicts"),
        ([[GOOD_MESSAGE], [{"content": "Hi"}]], ValueError, r"conversation 1: messages\[0\] must be a dict"),
        ([[GOOD_MESSAGE], []], ValueError, "conversation 1: messages is empty"),
        ([{"role": "user", "content": "a\ud800"}], ValueError, r"the conversation has half a character, '\\ud800'"),
        ([GOOD_MESSAGE, GOOD_MESSAGE], ValueError, "the model's chat template refuses the messages: take turns"),
    ],
)
def test_a_broken_conversation(llm, monkeypatch, messages, error, words):
    template = "{% if messages|length > 1 %}{{ raise_exception('take turns') }}{% endif %}{{ messages[0].content }}"
    monkeypatch.setattr(llm.engine.tokenizer, "chat_template", template)
    with pytest.raises(error, match=words):
        llm.chat(messages, use_tqdm=False)
    assert not llm.engine.requests


# -- Sampling ----------------------------------------------------------------------------------------------------------


def test_a_seeded_request_is_the_same_alone_in_a_crowd_and_after_preemption(model_path):
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True)
    others = [SamplingParams(max_tokens=24, top_k=k, ignore_eos=True) for k in range(9)]
    roomy = LLM(model_path, num_kv_blocks=200, block_size=4)
    (alone,) = generate(roomy, ["Hello"], params)
    crowd = generate(roomy, ["Hello"] + ["Others write, too"] * 9, [params] + others)
    assert crowd[0]["token_ids"] == alone["token_ids"]

    tight = LLM(model_path, num_kv_blocks=20, block_size=4)
    preempted = count_preemptions(tight)
    crowd = generate(tight, ["Others write, too"] * 9 + ["Hello"], others + [params])
    assert crowd[-1]["token_ids"] == alone["token_ids"]
    assert crowd[-1]["request_id"] in preempted


def count_preemptions(llm):
    """The ids of preempted sequences, as they come."""
    preempted, schedule = [], llm.engine.scheduler.schedule

    def recording():
        batch = schedule()
        preempted.extend(seq.id for seq in batch.preempted)
        return batch

    llm.engine.scheduler.schedule = recording
    return preempted


def test_seeds_differ_and_no_seed_is_random(llm):
    params = [SamplingParams(seed=s, max_tokens=16, ignore_eos=True) for s in (1, 2, None, None)]
    answers = {tuple(o["token_ids"]) for o in generate(llm, ["Hello"] * 4, params)}
    assert len(answers) == 4


def test_logprobs_are_those_of_transformers(model_path):
    from transformers import AutoModelForCausalLM

    llm = LLM(model_path, num_kv_blocks=64)
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    prompt = llm.engine.tokenizer.encode("Hello there")
    params = [SamplingParams(temperature=t, seed=3, max_tokens=6, ignore_eos=True, logprobs=n) for t, n in
              ((0.0, 3), (2.0, 2), (1.5, 0))]  # fmt: skip
    for output, n in zip(generate(llm, [prompt] * 3, params), (3, 2, 0)):
        token_ids = output["token_ids"]
        assert len(output["logprobs"]) == len(token_ids)
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for i, (token_id, logprobs) in enumerate(zip(token_ids, output["logprobs"])):
            assert logprobs.keys() == {*expected[i].topk(n).indices.tolist(), token_id}
            for t, logprob in logprobs.items():
                assert logprob == pytest.approx(expected[i, t].item(), abs=1e-4)


# -- By hand -----------------------------------------------------------------------------------------------------------


def test_the_engine_by_hand(llm):
    expected = generate(llm, ["Hello", "there"], [GREEDY, SamplingParams(temperature=0.0, max_tokens=3)])
    first = llm.add_request("Hello", GREEDY)
    second = llm.add_request("there", SamplingParams(temperature=0.0, max_tokens=3))
    finished, num_steps = [], 0
    while llm.has_unfinished_requests():
        finished += llm.step()
        num_steps += 1
    assert num_steps == 8
    assert [o["request_id"] for o in finished] == [second, first]
    assert [o["token_ids"] for o in finished] == [o["token_ids"] for o in expected[::-1]]
    assert llm.step() == []


def test_abort(llm):
    running, waiting = llm.add_request("Hello", GREEDY), None
    llm.step(), llm.step()
    waiting = llm.add_request("there", GREEDY)
    aborted = llm.abort(running)
    assert aborted["finish_reason"] == "abort" and len(aborted["token_ids"]) == 2
    assert llm.abort(waiting)["token_ids"] == []
    for unknown in (running, 10**9):
        with pytest.raises(KeyError, match=str(unknown)):
            llm.abort(unknown)


def test_generate_leaves_requests_added_by_hand_to_those_who_added_them(llm):
    by_hand = llm.add_request("Hello", SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    longer = llm.add_request("there", GREEDY)
    generate(llm, ["you"], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    assert llm.has_unfinished_requests()
    (output,) = llm.step()
    assert output["request_id"] == by_hand and len(output["token_ids"]) == 2
    while llm.has_unfinished_requests():
        (output,) = llm.step() or [output]
    assert output["request_id"] == longer


# -- Bad input: refused before any work, by name, and nobody else is harmed --------------------------------------------

BAD_REQUESTS = {
    "empty prompt": ([""], None, ValueError, "prompt 0: the prompt is empty"),
    "no token": ([[5], []], None, ValueError, "prompt 1: the prompt is empty"),
    "empty list": ([], None, ValueError, "prompts is empty"),
    "not a list": (5, None, TypeError, "prompts must be a list of strings or of token id lists, not int"),
    "not a prompt": (["Hello", 5.0], None, TypeError, "prompt 1: a prompt must be a string or a list of token ids"),
    "one list of ids": ([5, 6], None, TypeError, "put a single list of token ids into another list"),
    "id too large": ([[5, 10**6]], None, ValueError, r"prompt 0: prompt\[1\] must be at most \d+, not 1000000"),
    "negative id": ([[-1]], None, ValueError, r"prompt 0: prompt\[0\] must be at least 0, not -1"),
    "float id": ([[5.5]], None, TypeError, r"prompt 0: prompt\[0\] must be an integer"),
    "too long": (
        ["ok", [5] * 2000],
        None,
        ValueError,
        r"prompt 1: the prompt has 2000 tokens, but max_model_len is \d+",
    ),
    "stop id": (["ok"], SamplingParams(stop_token_ids=[10**6]), ValueError, "prompt 0: stop_token_ids must be at most"),
    "params type": (["ok"], {"temperature": 0.0}, TypeError, "sampling_params must be a SamplingParams, not dict"),
    "half a character": (["ok", "a\ud800"], None, ValueError, r"prompt 1: the prompt has half a character, '\\ud800'"),
    "too few params": (["a", "b", "c"], [GREEDY], ValueError, "there are 3 prompts but 1 sampling_params"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request(llm, case):
    prompts, params, error, message = BAD_REQUESTS[case]
    before = generate(llm, ["Hello"])[0]["token_ids"]
    earlier = llm.add_request("Hello", GREEDY)
    llm.step()
    with pytest.raises(error, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert list(llm.engine.requests) == [earlier], "nothing is queued"
    (output,) = [o for _ in range(7) for o in llm.step()]
    assert output["token_ids"] == before, "earlier requests go on"
    assert generate(llm, ["Hello"])[0]["token_ids"] == before, "the next good request answers as before"


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"max_num_seq": 4}, TypeError, "unknown setting 'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"blocksize": 4}, TypeError, "unknown setting 'blocksize'; did you mean 'block_size'"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, not 0"),
        ({"max_num_seqs": 2**40}, ValueError, "max_num_seqs must be at most 1048576, not 1099511627776"),
        ({"max_num_seqs": True}, TypeError, "max_num_seqs must be an integer, not True"),
        ({"max_num_batched_tokens": 2.5}, TypeError, "max_num_batched_tokens must be an integer"),
        ({"block_size": -16}, ValueError, "block_size must be at least 1, not -16"),
        ({"max_model_len": 1}, ValueError, "max_model_len must be at least 2"),
        ({"max_model_len": 10**9}, ValueError, "max_model_len is 1000000000, but the model's positions end at"),
        (
            {"max_model_len": 100, "num_kv_blocks": 2},
            ValueError,
            "2 blocks of 16 tokens, but one sequence of 100 tokens",
        ),
        ({"num_kv_blocks": 10**12}, ValueError, r"needs [\d.]+ GB .* has [\d.]+ GB free; lower num_kv_blocks"),
        ({"kv_cache_memory": 10}, ValueError, "0 blocks .* raise kv_cache_memory"),
        ({"gpu_memory_utilization": math.nan}, ValueError, "gpu_memory_utilization must be above 0"),
        ({"gpu_memory_utilization": 1.5}, ValueError, "gpu_memory_utilization must be above 0 and at most 1, not 1.5"),
        ({"dtype": "float8"}, ValueError, "dtype must be one of .*'bfloat16'"),
        ({"dtype": torch.float32}, TypeError, "dtype must be one of"),
        ({"max_num_batched_tokens": 65_536}, ValueError, "max_num_batched_tokens must be at most 65535, not 65536"),
        ({"load_format": "pt"}, ValueError, "load_format must be one of 'auto', 'dummy'"),
        ({"attention_backend": "tritonn"}, ValueError, "attention_backend must be one of"),
        ({"attention_backend": "flash_attn", "device": "cpu"}, ValueError, "needs an NVIDIA GPU; on a CPU use 'torch'"),
        ({"device": "gpu"}, ValueError, "device 'gpu' is not"),
        ({"device": "meta"}, ValueError, "device 'meta' is not supported"),
        ({"enforce_eager": "no"}, TypeError, "enforce_eager must be True or False"),
        ({"enable_prefix_caching": 1}, TypeError, "enable_prefix_caching must be True or False"),
        ({"scheduler": "fifo"}, TypeError, "scheduler must be a class"),
        ({"tensor_parallel_size": 3}, ValueError, "sizes that do: 1, 2, 4"),
    ],
)
def test_bad_setting(model_path, settings, error, message):
    with pytest.raises(error, match=message):
        LLM(model_path, **settings)


def test_a_backend_that_cannot_run_here_is_refused_before_the_weights_are_read(model_path, monkeypatch):
    def build_model(*args: object) -> None:
        raise AssertionError("the weights are being read")

    monkeypatch.setattr("nanovllm.engine.model_runner.build_model", build_model)
    with pytest.raises(ValueError, match="attention_backend='flash_attn' needs an NVIDIA GPU"):
        LLM(model_path, attention_backend="flash_attn", device="cpu")


def test_a_gpu_that_is_not_there(model_path):
    with pytest.raises(ValueError, match="torch finds no CUDA GPU here; use device='cpu'"):
        LLM(model_path, device="cuda")


def test_trap_a_prompt_larger_than_the_cache_kills_the_batch(model_path):
    llm = LLM(model_path, num_kv_blocks=4)
    running = llm.add_request("Hello", GREEDY)
    llm.step()
    with pytest.raises(ValueError, match="65 tokens, but max_model_len is 64 .*4 blocks of 16 tokens"):
        llm.add_request([5] * 65)
    outputs = [output for _ in range(7) for output in llm.step()]
    assert [output["request_id"] for output in outputs] == [running]


def test_trap_zip_silently_truncates_prompts_or_params(llm):
    for num_prompts, num_params in ((3, 2), (2, 3)):
        with pytest.raises(ValueError, match=f"there are {num_prompts} prompts but {num_params} sampling_params"):
            generate(llm, ["Hello"] * num_prompts, [GREEDY] * num_params)


def test_trap_unknown_keyword_ignored(model_path):
    with pytest.raises(TypeError, match="Config: unknown setting 'max_num_seq'; did you mean 'max_num_seqs'"):
        LLM(model_path, max_num_seq=4)
    with pytest.raises(TypeError, match="SamplingParams: unknown setting 'maxtokens'; did you mean 'max_tokens'"):
        SamplingParams(maxtokens=4)


def test_enforce_eager_and_other_good_settings(model_path):
    llm = LLM(str(model_path), enforce_eager=True, dtype="bfloat16", kv_cache_memory=2**20, max_num_seqs=np.int64(3))
    assert llm.engine.model_runner.kv_cache.dtype == torch.bfloat16
    assert llm.engine.num_steps == 0
    assert len(generate(llm, ["a", "b", "c", "d", "e"])) == 5


def test_a_folder_without_config(tmp_path):
    with pytest.raises(RuntimeError, match="holds no config.json"):
        LLM(tmp_path)


def test_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Llam')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        LLM(tmp_path)


@pytest.mark.parametrize("model_type, architecture", [("gpt2", "GPT2LMHeadModel"), ("no_such_type", "NoSuchModel")])
def test_an_unsupported_architecture_is_named(tmp_path, model_type, architecture):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": model_type}))
    with pytest.raises(ValueError, match=architecture):
        LLM(tmp_path)


def test_no_tokenizer(model_path, tmp_path):
    """A folder with weights alone serves token ids."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        os.symlink(model_path / name, tmp_path / name)
    llm = LLM(tmp_path, num_kv_blocks=8)
    (output,) = generate(llm, [[5, 6, 7]])
    assert len(output["token_ids"]) == 8 and output["text"] == ""
    with pytest.raises(ValueError, match="no tokenizer; give the prompt as token ids"):
        llm.generate(["Hello"], use_tqdm=False)


def test_a_tokenizer_that_knows_more_tokens_than_the_model(model_path, tmp_path):
    """An id beyond the vocabulary would fail in the middle of a step, again and again, and with it everybody's."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        os.symlink(model_path / name, tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.add_tokens([f"<new{i}>" for i in range(100)])
    tokenizer.save_pretrained(tmp_path)
    llm = LLM(tmp_path, num_kv_blocks=8)
    earlier = llm.add_request("Hello", GREEDY)
    with pytest.raises(ValueError, match=r"token \d+ of the prompt must be at most \d+, not \d+; the vocabulary has"):
        llm.add_request("Hello <new99>", GREEDY)
    assert list(llm.engine.requests) == [earlier]


# -- Accidents ---------------------------------------------------------------------------------------------------------


def test_trap_old_requests_linger_when_a_cell_is_interrupted_and_run_again(llm):
    expected = generate(llm, ["Hello"])
    earlier = llm.add_request("there", GREEDY)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    timer = threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            generate(llm, ["Hello"] * 3, params)
    timer.join()
    assert set(llm.engine.requests) <= {earlier}, "its own requests are gone"
    while llm.has_unfinished_requests():
        llm.step()
    assert generate(llm, ["Hello"])[0]["token_ids"] == expected[0]["token_ids"]


@pytest.mark.parametrize("call_number", [1, 2, 3])
@pytest.mark.parametrize("by", ["generate", "stream"])
def test_an_interrupt_while_requests_are_queued_leaves_none(llm, monkeypatch, by, call_number):
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "add", interrupted(llm.engine.scheduler.add, call_number, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            generate(llm, ["Hello"] * 3) if by == "generate" else [list(llm.stream("Hello", GREEDY)) for _ in range(3)]
    assert_idle(llm)


def test_an_interrupt_while_a_request_is_added_by_hand(llm, monkeypatch):
    """Its id is lost, but not the request: whoever steps gets its answer."""
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "add", interrupted(llm.engine.scheduler.add, 1, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            llm.add_request("Hello", GREEDY)
    assert [request.seq for request in llm.engine.requests.values()] == list(llm.engine.scheduler.waiting)
    while llm.has_unfinished_requests():
        llm.step()
    assert_idle(llm)


@pytest.mark.parametrize("call_number", [1, 2])
def test_a_second_interrupt_while_requests_are_aborted_leaves_none(llm, monkeypatch, call_number):
    scheduler = llm.engine.scheduler
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "update", interrupted(scheduler.update, 2, signal.SIGINT))
        patch.setattr(scheduler, "finish", interrupted(scheduler.finish, call_number, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            generate(llm, ["Hello", "there", "you"])
    assert_idle(llm)


def test_an_alarm_at_the_end_of_a_step_does_not_make_it_fail(llm, monkeypatch):
    """Its tokens have been taken in: nobody is computed again, and a trace tells of the step once."""
    expected = generate(llm, ["Hello"])[0]["token_ids"]
    llm.reset_prefix_cache()
    llm.add_request("Hello", GREEDY)
    with monkeypatch.context() as patch, alarms(SystemExit("time is up")), llm.trace() as trace:
        patch.setattr(llm.engine.scheduler, "update", interrupted(llm.engine.scheduler.update, 2))
        answers = []
        while llm.has_unfinished_requests():
            try:
                answers += llm.step()
            except SystemExit:
                pass
    assert [answer["token_ids"] for answer in answers] == [expected]
    assert len(trace.steps) == 8 and not any(step.error for step in trace.steps)


def test_a_stream_that_the_collector_ends_while_it_is_admitted_again(model_path, monkeypatch):
    """It is aborted when the step is over; who waits behind it is not lost."""
    prompts, params = [list(range(8)), [9, 9, 9]], replace(GREEDY, max_tokens=12)
    expected = [answer["token_ids"] for answer in generate(LLM(model_path, dtype="float32"), prompts, params)]
    llm = LLM(model_path, dtype="float32", num_kv_blocks=7, block_size=4, max_num_seqs=3)
    ids = [llm.add_request(prompts[0], params)]
    with collector_off():
        abandoned_stream(llm, list(range(50, 58)), replace(GREEDY, max_tokens=14))
        while not llm.engine.scheduler.waiting:  # it is preempted
            llm.step()
        ids.append(llm.add_request(prompts[1], params))
        monkeypatch.setattr(llm.engine.block_manager, "share", collecting_once(llm.engine.block_manager.share))
        answers = {}
        while llm.has_unfinished_requests():
            answers |= {answer["request_id"]: answer["token_ids"] for answer in llm.step()}
    assert answers == dict(zip(ids, expected))
    assert_idle(llm)


def test_a_stream_that_the_collector_ends_while_its_last_token_is_taken_in(llm, monkeypatch):
    expected = generate(llm, ["Hello"])[0]["token_ids"]
    with collector_off(), monkeypatch.context() as patch:
        abandoned_stream(llm, "there", replace(GREEDY, max_tokens=3))
        patch.setattr(llm.engine.scheduler, "finish", collecting_once(llm.engine.scheduler.finish))
        assert generate(llm, ["Hello"])[0]["token_ids"] == expected
    assert_idle(llm)


def test_an_interrupt_waits_for_the_end_of_the_step(llm, monkeypatch):
    launch = llm.engine.model_runner.launch

    def interrupted(batch):
        signal.raise_signal(signal.SIGINT)
        return launch(batch)

    llm.add_request("Hello", GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.model_runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.step()
    (request,) = llm.engine.requests.values()
    assert len(request.seq.output_token_ids) == 1, "the step was made"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    llm.abort(request.seq.id)


@pytest.mark.parametrize("by", ["step", "generate"])
def test_an_answer_that_an_interrupted_step_finished_is_not_lost(llm, monkeypatch, by):
    launch = llm.engine.model_runner.launch

    def interrupted(batch):
        signal.raise_signal(signal.SIGINT)
        return launch(batch)

    one = SamplingParams(temperature=0.0, max_tokens=1)
    by_hand = llm.add_request("Hello", one)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.model_runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.step() if by == "step" else generate(llm, ["there"], one)
    assert llm.has_unfinished_requests()
    (answer,) = llm.step()
    assert answer["request_id"] == by_hand and len(answer["token_ids"]) == 1
    assert not llm.has_unfinished_requests()
    assert generate(llm, ["you"])[0]["finish_reason"], "and the next call gives its own answers alone"


@pytest.mark.parametrize(
    "owner, name",
    [
        (BlockManager, "allocate"),
        (Scheduler, "schedule"),
        (ModelRunner, "launch"),
        (LaunchedStep, "tokens"),
        (Scheduler, "finish"),
        (Scheduler, "update"),
        (Detokenizer, "append"),
        (Detokenizer, "finish"),
    ],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
@pytest.mark.parametrize("call_number", [1, 2, 9])
def test_the_handler_of_a_signal_that_raises_harms_nobody(llm, monkeypatch, owner, name, call_number):
    """An alarm's, say, or that of SIGTERM: all who ran are computed again, and nothing is lost of rows and blocks."""
    expected = generate(llm, ["Hello", "there"])
    by_hand = llm.add_request("Hello", GREEDY)
    llm.step()
    with monkeypatch.context() as patch, alarms(SystemExit("time is up")):
        patch.setattr(owner, name, interrupted(getattr(owner, name), call_number))
        try:
            generate(llm, ["there"])
        except SystemExit:
            pass
        else:
            assert call_number > 2, f"{name} is called less often"
    answers, llm._undelivered = llm._undelivered, []
    while llm.has_unfinished_requests():
        answers += llm.step()
    assert [(a["request_id"], a["token_ids"]) for a in answers] == [(by_hand, expected[0]["token_ids"])]
    assert answers[0]["text"] == expected[0]["text"]
    assert_idle(llm)
    llm.reset_prefix_cache()
    assert generate(llm, ["there"])[0]["token_ids"] == expected[1]["token_ids"]


@pytest.mark.parametrize("error", [OverflowError("too much"), Panic("rust")], ids=["exception", "panic"])
@pytest.mark.parametrize("params", [{"max_tokens": 1}, {"max_tokens": 6}, {"max_tokens": 6, "stop": ["zzz"]}])
def test_a_text_that_cannot_be_made_ends_its_request_and_no_other(llm, monkeypatch, caplog, params, error):
    """A tokenizer of the user's own may raise, also at the token with which the answer ends."""
    expected = generate(llm, ["there"])[0]
    bad, good = llm.add_request("Hello", SamplingParams(temperature=0.0, **params)), llm.add_request("there", GREEDY)
    monkeypatch.setattr(Detokenizer, "append", failing_once(Detokenizer.append, error))
    with llm.trace() as trace:
        (answer,) = llm.step()
    assert trace.requests[bad].output_token_ids == answer["token_ids"]
    assert answer["request_id"] == bad and answer["finish_reason"] == "abort" and len(answer["token_ids"]) == 1
    assert (
        f"request {bad} is aborted" in caplog.text and type(error).__name__ in caplog.text
    ), "with where it was raised"
    while llm.has_unfinished_requests():
        (answer,) = llm.step() or [answer]
    assert answer == expected | {"request_id": good, "num_cached_tokens": answer["num_cached_tokens"]}
    assert_idle(llm)


def test_a_scheduler_that_raises_half_way_harms_nobody(model_path):
    expected = [o["token_ids"] for o in generate(LLM(model_path, num_kv_blocks=64), ["Hello", "there you are"])]
    llm = LLM(model_path, num_kv_blocks=64, scheduler=Slips)
    ids = [llm.add_request("Hello", GREEDY)]
    llm.step()
    ids.append(llm.add_request("there you are", GREEDY))
    with llm.trace() as trace:
        with pytest.raises(IndexError, match="a slip"):
            llm.step()
        assert trace.steps[-1].error == "a slip"
        assert_the_same_blocks(trace, llm)
        answers = {}
        while llm.has_unfinished_requests():
            answers |= {output["request_id"]: output["token_ids"] for output in llm.step()}
            assert_the_same_blocks(trace, llm)
    assert [answers[id] for id in ids] == expected
    assert_idle(llm)


def assert_the_same_blocks(trace, llm) -> None:
    """What the trace makes of the events is what the block manager has."""
    states, blocks = trace.blocks_at(len(trace.steps) - 1), llm.engine.block_manager.blocks
    assert [(s.ref_count, s.hash) for s in states] == [(b.ref_count, b.hash) for b in blocks]


class Refuses(Scheduler):
    def add(self, seq):
        if len(seq.token_ids) > 5:
            raise ValueError("too long for me")
        super().add(seq)


def test_a_scheduler_that_refuses_one_prompt_gets_none_of_them(model_path):
    llm = LLM(model_path, num_kv_blocks=64, scheduler=Refuses)
    with pytest.raises(ValueError, match="prompt 1: too long for me"):
        llm.generate([[5, 6], [5] * 6], use_tqdm=False)
    assert not llm.engine.requests and not llm.engine.scheduler.has_work()


def test_trap_blocks_stay_in_the_cache_although_their_step_failed(llm, monkeypatch):
    """The step raises, and can be made again."""
    prompt = list(range(20, 70))
    expected = generate(llm, [prompt])[0]["token_ids"]
    other = list(range(70, 120))
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.model_runner.model, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            generate(llm, [other])
    assert_idle(llm)
    request_id = llm.add_request(other, GREEDY)
    llm.step()
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.model_runner.model, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            llm.step()
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert outputs[0]["request_id"] == request_id and outputs[0]["num_cached_tokens"] == 0
    fresh = LLM(llm.engine.config.model, num_kv_blocks=64)
    assert outputs[0]["token_ids"] == generate(fresh, [other])[0]["token_ids"]
    assert generate(llm, [prompt])[0]["token_ids"] == expected


def fail(*args):
    raise ZeroDivisionError


def test_nan_ends_the_request_it_comes_from_and_no_other(llm, monkeypatch):
    expected = generate(llm, ["there"])[0]["token_ids"]
    compute_logits = llm.engine.model_runner.model.compute_logits

    def poisoned(hidden_states):
        logits = compute_logits(hidden_states)
        logits[0] = math.nan
        return logits

    monkeypatch.setattr(llm.engine.model_runner.model, "compute_logits", poisoned)
    bad, good = llm.add_request("Hello", GREEDY), llm.add_request("there", GREEDY)
    (output,) = llm.step()
    assert output["request_id"] == bad and output["finish_reason"] == "abort" and output["token_ids"] == []
    monkeypatch.undo()
    while llm.has_unfinished_requests():
        (output,) = llm.step() or [output]
    assert output["request_id"] == good and output["token_ids"] == expected


def test_what_a_request_with_nan_has_computed_is_found_by_nobody(llm, monkeypatch):
    """Its keys and values may be NaN as well: in 16-bit numbers, say, where those of one token are too large."""
    prompt = [(7 * i) % 250 for i in range(50)]
    compute_logits = llm.engine.model_runner.model.compute_logits
    monkeypatch.setattr(llm.engine.model_runner.model, "compute_logits", lambda h: compute_logits(h).fill_(math.nan))
    assert generate(llm, [prompt])[0]["finish_reason"] == "abort"
    monkeypatch.undo()
    assert generate(llm, [prompt])[0]["num_cached_tokens"] == 0
    assert generate(llm, [prompt])[0]["num_cached_tokens"] == 48


def test_a_scheduler_that_schedules_nothing_is_an_error_not_a_hang(model_path):
    from nanovllm.engine.scheduler import Batch, Scheduler

    class Lazy(Scheduler):
        def schedule(self):
            return Batch()

    with pytest.raises(RuntimeError, match="Lazy scheduled nothing, although requests wait"):
        LLM(model_path, num_kv_blocks=8, scheduler=Lazy).generate(["Hello"], use_tqdm=False)


# -- Memory and other engines ------------------------------------------------------------------------------------------


def test_trap_a_second_engine_in_one_process_fails(model_path, tiny_llama_path):
    one, two = LLM(model_path, num_kv_blocks=16), LLM(tiny_llama_path, num_kv_blocks=16, block_size=8)
    alone = [generate(one, ["Hello"])[0]["token_ids"], generate(two, ["Hello"])[0]["token_ids"]]
    one.add_request("Hello", GREEDY), two.add_request("Hello", GREEDY)
    outputs = [[], []]
    while one.has_unfinished_requests() or two.has_unfinished_requests():
        outputs[0] += one.step()
        outputs[1] += two.step()
    assert [o[0]["token_ids"] for o in outputs] == alone


@pytest.mark.parametrize("how", ["close", "del"])
def test_trap_del_llm_frees_nothing(default_model_path, how):
    after = []
    for _ in range(2):
        llm = LLM(default_model_path, num_kv_blocks=8)
        generate(llm, ["Hello"])
        model = weakref.ref(llm.engine.model_runner.model)
        loaded = resident_memory()
        if how == "close":
            llm.close()
            llm.close()
            with pytest.raises(RuntimeError, match="closed"):
                generate(llm, ["Hello"])
        del llm
        assert model() is None, "gone at once, without waiting for the garbage collector"
        after.append(resident_memory())
        assert loaded - after[-1] > 400e6
    assert after[1] - after[0] < 50e6, "the second engine found room where the first had been"


def resident_memory() -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps for the next allocation is not held by us
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("fault", ["memory", "weights", "architecture"])
def test_trap_a_failed_constructor_leaves_torch_changed(model_path, tmp_path, fault):
    before = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled()
    if fault == "memory":
        with pytest.raises(ValueError):
            LLM(model_path, num_kv_blocks=10**12, dtype="bfloat16")
    else:
        config = json.loads((model_path / "config.json").read_text())
        config["architectures"] = config["architectures"] if fault == "weights" else ["Unknown"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError):
            LLM(tmp_path, dtype="bfloat16")
    after = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled()
    assert after == before


# -- What is shown -----------------------------------------------------------------------------------------------------


def test_the_progress_bar_tells_both_speeds(llm, capsys):
    llm.generate(["Hello"] * 3, GREEDY)
    shown = capsys.readouterr().err
    assert "Generating: 100%" in shown and "3/3" in shown
    assert "prefill=" in shown and "decode=" in shown and "tokens/s" in shown
    llm.generate(["Hello"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_debug_logging_tells_each_step_in_one_line(llm, caplog):
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        generate(llm, ["Hello"] * 2)
    lines = [r.getMessage() for r in caplog.records if r.name == llm_engine.__name__]
    assert len(lines) == 8 and all("\n" not in line for line in lines)
    assert "2 sequences, 2 admitted, 0 preempted, 2 running, 0 waiting" in lines[0]


def test_public_api_has_types_and_docstrings():
    for name in ("generate", "chat", "stream", "add_request", "step", "abort", "close"):
        method = getattr(LLM, name)
        assert inspect.getdoc(method), name
        signature = inspect.signature(method)
        assert all(p.annotation is not p.empty for p in list(signature.parameters.values())[1:]), name
        assert signature.return_annotation is not signature.empty, name


class TestGuideSnippets:
    """The profiling and debugging snippets of the guide, once their free names are given."""

    def test_model_loading_issues(self, model_path):
        from nanovllm.utils.loader import load_model

        assert callable(load_model)
        assert os.path.exists(model_path) and os.listdir(model_path)

    def test_performance_issues(self, model_path):
        llm, prompts, sampling_params = LLM(model_path), ["a", "b"], GREEDY
        start_time = time.time()
        outputs = llm.generate(prompts, sampling_params)
        end_time = time.time()
        total_tokens = sum(len(output["token_ids"]) for output in outputs)
        assert total_tokens / (end_time - start_time) > 0

    def test_debug_mode(self, model_path):
        level = logging.root.level
        try:
            logging.basicConfig(level=logging.DEBUG)
            llm = LLM(model_path, enforce_eager=True)
            assert llm.generate(["Test"], SamplingParams(max_tokens=3))[0]["token_ids"]
        finally:
            logging.root.setLevel(level)

    def test_timing_profiling(self, model_path):
        llm = LLM(model_path)
        llm.generate(["Warm up"], SamplingParams(max_tokens=10))
        start_time = time.perf_counter()
        llm.generate(["Test"], SamplingParams(max_tokens=100))
        assert time.perf_counter() > start_time

    @pytest.mark.gpu
    def test_memory_profiling(self, model_path):
        llm = LLM(model_path)
        torch.cuda.reset_peak_memory_stats()
        llm.generate(["Test prompt"], SamplingParams(max_tokens=100))
        assert torch.cuda.max_memory_allocated() > 0


# -- What is left of an engine -----------------------------------------------------------------------------------------


def keep_trace(llm):
    with llm.trace() as trace:
        llm.generate(["Hi"], SamplingParams(max_tokens=3), use_tqdm=False)
    return trace


def keep_open_trace(llm):
    return llm.trace()


def keep_stream(llm):
    stream = llm.stream("Hi", SamplingParams(max_tokens=30, ignore_eos=True))
    next(stream)
    return stream


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("keep", [keep_trace, keep_open_trace, keep_stream])
def test_a_closed_engine_goes_whatever_is_kept_of_it(model_path, keep):
    """At once, with weights and KV cache, and not when Python next looks for cycles."""
    llm = LLM(model_path, dtype="float32", device="cpu", num_kv_blocks=40)
    engine = weakref.ref(llm.engine)
    kept = keep(llm)
    with collector_off():
        llm.close()
        assert engine() is None
    if keep is keep_stream:
        kept.close()  # its request went with the engine
    else:
        assert repr(kept).startswith("Trace")


def test_two_engines_in_a_thread_each(model_path):
    """What a step tells its attention layers is nobody else's."""
    settings = dict(dtype="float32", device="cpu", num_kv_blocks=60)
    prompts = [[[i % 250 for i in range(start, start + n)] for start in (0, 9)] for n in (70, 30)]
    engines = [LLM(model_path, **settings) for _ in prompts]
    expected = [[a["token_ids"] for a in generate(llm, p)] for llm, p in zip(engines, prompts)]

    def answers(i):
        return [[a["token_ids"] for a in generate(engines[i], prompts[i])] for _ in range(15)]

    with ThreadPoolExecutor(2) as pool:
        for i, answer in enumerate(pool.map(answers, (0, 1))):
            assert answer == [expected[i]] * 15


def test_another_thread_closes_the_engine(model_path):
    for _ in range(5):
        llm = LLM(model_path, dtype="float32", device="cpu", num_kv_blocks=60)
        closing = threading.Timer(0.1, llm.close)
        closing.start()
        with pytest.raises(RuntimeError, match="has been closed"):
            while True:
                generate(llm, [[1, 2, 3]] * 8, SamplingParams(max_tokens=None, ignore_eos=True))
        closing.join()


def test_an_engine_that_could_not_be_made_leaves_nothing_behind(model_path, monkeypatch):
    """Not even while somebody holds the error, as a notebook does until the next one."""
    models = []

    def build(*args):
        model = build_model(*args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr("nanovllm.engine.model_runner.build_model", build)
    with pytest.raises(ValueError, match="a KV cache of .* blocks needs") as error:
        LLM(model_path, device="cpu", num_kv_blocks=10**9)
    gc.collect()
    assert [model() for model in models] == [None] and error.value is not None

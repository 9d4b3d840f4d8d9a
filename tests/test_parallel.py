"""Tensor parallelism: several ranks answer as one does, and whatever happens to one of them, nobody waits for ever.

On CPUs, through gloo. tests/gpu does the same through NCCL where there are GPUs enough.
"""

import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Pipe

import psutil
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.kv_cache import MemoryUse, size_kv_cache
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.parallel import ParallelRunner, check_shares
from nanovllm.engine.torchrun import accept, connect, torchrun_store
from nanovllm.models import get_model_class
from nanovllm.utils.loader import init_dummy, pieces_of
from nanovllm.utils.ranks import Ranks

from .conftest import SIZES, alarms, save_random_model

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
SOON = 5.0  # seconds within which a fault must be noticed


def generate(llm: LLM, prompts, params=GREEDY) -> list[list[int]]:
    return [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]


def is_alive(pid: int) -> bool:
    """Whether it runs: a zombie, whose parent has not asked for its status yet, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds: float = SOON) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# -- Who has what ------------------------------------------------------------------------------------------------------


def qwen3_config(num_heads: int = 12, num_kv_heads: int = 12, **changes) -> Qwen3Config:
    sizes = SIZES | dict(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, intermediate_size=96)
    return Qwen3Config(head_dim=16, architectures=["Qwen3ForCausalLM"], **(sizes | changes))


def test_shares_are_contiguous_and_equal_or_copied():
    assert [list(Ranks(rank, 3).share(9)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [list(Ranks(rank, 6).share(2)) for rank in range(6)] == [[0], [0], [0], [1], [1], [1]]
    assert list(Ranks().share(7)) == list(range(7))


@pytest.mark.parametrize("size, num_kv_heads", [(1, 12), (2, 2), (3, 12), (3, 1), (4, 12), (4, 2), (12, 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_ranks_parts_make_up_the_whole(size, num_kv_heads, tied):
    """Matrices are split without a gap or an overlap, but for the KV heads that are copied; the rest all have whole."""
    config = qwen3_config(num_kv_heads=num_kv_heads, vocab_size=310, tie_word_embeddings=tied)
    holders: dict[str, torch.Tensor] = {}
    for rank in range(size):
        for piece in pieces_of(config, Ranks(rank, size)):
            holders.setdefault(piece.name, torch.zeros(piece.shape))[piece.part] += 1
    assert ("lm_head.weight" in holders) != tied
    for name, count in holders.items():
        if "norm" in name:
            copies = size
        elif "k_proj" in name or "v_proj" in name:
            copies = max(1, size // num_kv_heads)
        else:
            copies = 1
        assert (count == copies).all(), name


def test_a_ranks_random_weights_are_its_part_of_those_of_one():
    """So that `load_format="dummy"` is the same model, however many share it."""
    config = qwen3_config()
    model_class = get_model_class(config)
    whole, part = (model_class(config, ranks).requires_grad_(False) for ranks in (Ranks(), Ranks(2, 3)))
    init_dummy(whole), init_dummy(part)
    assert torch.equal(
        part.model.layers[1].self_attn.o_proj.weight, whole.model.layers[1].self_attn.o_proj.weight[:, 128:]
    )
    q, k, v = whole.model.layers[1].self_attn.qkv_proj.weight.chunk(3)
    assert torch.equal(part.model.layers[1].self_attn.qkv_proj.weight, torch.cat([q[128:], k[128:], v[128:]]))


@pytest.mark.parametrize(
    "size, heads, sizes",
    [(2, (9, 3, 1536), "1, 3"), (5, (16, 8, 3072), "1, 2, 4, 8, 16"), (4, (12, 3, 96), "1, 3, 6, 12")],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_would(size, heads, sizes):
    num_heads, num_kv_heads, width = heads
    config = qwen3_config(num_heads, num_kv_heads, intermediate_size=width)
    with pytest.raises(
        ValueError, match=f"tensor_parallel_size is {size}, .* {num_heads} attention heads, .*: {sizes}$"
    ):
        check_shares(config, size)


def test_refused_before_any_process_starts(model_path, monkeypatch):
    monkeypatch.setattr(ParallelRunner, "start", lambda *args: pytest.fail("a rank was started"))
    with pytest.raises(ValueError, match="sizes that do: 1, 2, 4"):
        LLM(model_path, tensor_parallel_size=3)
    with pytest.raises(ValueError, match="at least 1"):
        LLM(model_path, tensor_parallel_size=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="there are 1 GPUs here"):
        LLM(model_path, tensor_parallel_size=2, device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device is 'cuda:1', but tensor_parallel_size is 2; use device='cuda'"):
        LLM(model_path, tensor_parallel_size=2, device="cuda:1")


def test_torchrun_and_the_size_must_agree(model_path, monkeypatch, caplog):
    """An engine of its own in each process may be what somebody wants; but then it is better said."""
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun has started 2 processes, but tensor_parallel_size is 4"):
        LLM(model_path, tensor_parallel_size=4)
    LLM(model_path, device="cpu", num_kv_blocks=8)
    assert "2 processes, but tensor_parallel_size is 1: each makes an engine of its own" in caplog.text
    caplog.clear()
    monkeypatch.setenv("WORLD_SIZE", "1")
    LLM(model_path, device="cpu", num_kv_blocks=8)
    assert not caplog.messages


# -- The same answers --------------------------------------------------------------------------------------------------


def requests(seed: int, num: int = 10) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(seed)
    beginning = [rng.randrange(256) for _ in range(40)]
    prompts = [
        beginning[: rng.randint(0, 40)] + [rng.randrange(256) for _ in range(rng.randint(1, 30))] for _ in range(num)
    ]
    params = [
        SamplingParams(
            temperature=rng.choice([0, 0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            max_tokens=rng.randint(1, 24),
            ignore_eos=True,
            logprobs=rng.choice([None, 3]),
        )
        for i in range(num)
    ]
    return prompts, params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(num_kv_heads): a tiny Qwen3, twelve heads, an untied head, a vocabulary that is no multiple of 3."""
    paths = {}

    def make(num_kv_heads: int):
        if num_kv_heads not in paths:
            config = qwen3_config(num_kv_heads=num_kv_heads, tie_word_embeddings=False)
            paths[num_kv_heads] = save_random_model(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("qwen3"))
        return paths[num_kv_heads]

    return make


@pytest.mark.parametrize("size, num_kv_heads", [(2, 12), (3, 12), (4, 12), (3, 1), (4, 2)])
def test_several_ranks_answer_as_one(checkpoint, size, num_kv_heads):
    """Shared prompts, chunks, a cache so small that sequences are preempted, greedy and not, log-probabilities."""
    path = checkpoint(num_kv_heads)
    settings = dict(num_kv_blocks=16, max_num_batched_tokens=32, max_num_seqs=5, dtype="float32", device="cpu")
    prompts, params = requests(size)
    one, several = LLM(path, **settings), LLM(path, tensor_parallel_size=size, **settings)
    expected, answers = (llm.generate(prompts, params, use_tqdm=False) for llm in (one, several))
    several.close()
    for answer, other in zip(answers, expected, strict=True):
        assert answer["token_ids"] == other["token_ids"] and answer["text"] == other["text"]
        assert answer["num_cached_tokens"] == other["num_cached_tokens"]
        assert (answer["logprobs"] is None) == (other["logprobs"] is None)
        for mine, theirs in zip(answer["logprobs"] or [], other["logprobs"] or [], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


def test_biases_count_once_and_a_tied_head_is_split_too(tmp_path):
    config = LlamaConfig(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **(SIZES | {"vocab_size": 331}))
    path = save_random_model(LlamaForCausalLM, config, tmp_path)
    tensors = load_file(path / "model.safetensors")
    biases = {name: torch.randn_like(tensor) for name, tensor in tensors.items() if name.endswith("bias")}
    assert len(biases) == 2 * 7
    save_file(tensors | biases, path / "model.safetensors", metadata={"format": "pt"})
    prompts = [[1, 2, 3], [330, 17, 200, 166, 165]]  # 166 is the first token of the second rank
    expected = generate(LLM(path, num_kv_blocks=16, device="cpu"), prompts)
    llm = LLM(path, num_kv_blocks=16, device="cpu", tensor_parallel_size=2)
    assert generate(llm, prompts) == expected
    llm.close()


def test_the_default_model_on_three_ranks(default_model_path):
    """Nine heads, three KV heads: one for each rank."""
    prompts = ["The capital of France is", "Once upon a time"]
    params = SamplingParams(temperature=0, max_tokens=8)
    expected = generate(LLM(default_model_path, num_kv_blocks=16, device="cpu"), prompts, params)
    llm = LLM(default_model_path, num_kv_blocks=16, device="cpu", tensor_parallel_size=3)
    with llm.trace() as trace:
        assert generate(llm, prompts, params) == expected
    assert trace.environment["device"] == "CPU" and trace.steps[0].times["forward"] > 0
    ranks = llm.engine.model_runner.describe()
    llm.close()
    num_tokens = sum(s.num_new_tokens for step in trace.steps for s in step.scheduled)
    num_logits = sum(len(step.sampled) for step in trace.steps)
    for rank, holds in enumerate(ranks):
        assert holds["rank"] == rank and holds["kv_cache"] == [2, 30, 17, 16, 1, 64]
        parts = {tensor["name"]: tensor["part"] for tensor in holds["tensors"]}
        assert parts["model.layers.7.self_attn.k_proj.weight"] == [[64 * rank, 64 * rank + 64], [0, 576]]
        assert parts["model.layers.7.mlp.down_proj.weight"] == [[0, 576], [512 * rank, 512 * rank + 512]]
        assert parts["model.embed_tokens.weight"] == [[16384 * rank, 16384 * rank + 16384], [0, 576]]
        # One sum after attention and one after the MLP of each layer, and one after the embedding.
        sums = {"calls": 61 * len(trace.steps), "bytes": 61 * num_tokens * 576 * 4}
        logits = {"calls": len(trace.steps), "bytes": num_logits * 16384 * 4}
        assert holds["traffic"] == {"all_reduce": sums, "all_gather": logits}


@pytest.mark.parametrize("asked", [(0, 1, 2), (2,)])
def test_steps_in_flight_are_told_apart(checkpoint, asked):
    """Those that failed here are never asked for. Chunks of a long prompt, because they need no tokens of the step
    before: for others it takes a GPU (tests/gpu)."""
    path, prompt = checkpoint(12), [n % 250 for n in range(40)]
    settings = dict(num_kv_blocks=16, max_num_batched_tokens=16, dtype="float32", device="cpu")
    expected = generate(LLM(path, **settings), [prompt])
    llm = LLM(path, tensor_parallel_size=2, **settings)
    llm.add_request(prompt, GREEDY)
    engine = llm.engine
    batches = [engine.scheduler.schedule() for _ in range(3)]
    launched = [engine.model_runner.launch(batch) for batch in batches]
    for i, (batch, step) in enumerate(zip(batches, launched)):
        token_ids = step.tokens() if i in asked else []
        assert len(token_ids) == (i == 2) and ("forward" in step.times) == (i in asked)
        engine.scheduler.update(batch, token_ids)
    while llm.has_unfinished_requests():
        answers = llm.step()
    assert [answer["token_ids"] for answer in answers] == expected
    llm.close()


# -- Faults ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(model_path):
    llm = LLM(model_path, num_kv_blocks=64, device="cpu", tensor_parallel_size=2)
    pids = [process.pid for process in llm.engine.model_runner.processes]
    ports = [port for pid in pids for port in listening(pid)]
    assert ports, "gloo listens somewhere"
    yield llm
    llm.close()
    assert not any(map(is_alive, pids)), "no process is left behind"
    assert all(map(is_free, ports)), "no port hangs"


def listening(pid: int) -> list[int]:
    """The ports at which a process can be called."""
    process = psutil.Process(pid)
    sockets = process.net_connections() if hasattr(process, "net_connections") else process.connections()
    return [each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN]


def is_free(port: int) -> bool:
    with socket.socket() as mine, suppress(OSError):
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # whoever hung up may still be remembered
        mine.bind(("127.0.0.1", port))
        return True
    return False


def assert_ended(llm: LLM, start: float) -> None:
    assert time.monotonic() - start < SOON
    assert not any(is_alive(process.pid) for process in llm.engine.model_runner.processes)
    with pytest.raises(RuntimeError, match="make a new LLM"):
        generate(llm, [[1, 2, 3]])
    assert not llm.has_unfinished_requests()


def assert_a_new_engine_works(model_path) -> None:
    expected = generate(LLM(model_path, num_kv_blocks=8, device="cpu"), [[1, 2, 3]])
    llm = LLM(model_path, num_kv_blocks=8, device="cpu", tensor_parallel_size=2)
    assert generate(llm, [[1, 2, 3]]) == expected
    llm.close()


def test_a_rank_killed_before_the_first_step(model_path, monkeypatch):
    runners, start_ranks = [], ParallelRunner.start

    def start_and_kill(self, *args, **kwargs):
        start_ranks(self, *args, **kwargs)
        runners.append(self)
        threading.Timer(0.5, os.kill, [self.processes[1].pid, signal.SIGKILL]).start()  # while it loads

    with monkeypatch.context() as patch:
        patch.setattr(ParallelRunner, "start", start_and_kill)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by SIGKILL"):
            LLM(model_path, num_kv_blocks=8, device="cpu", tensor_parallel_size=2)
    assert time.monotonic() - start < 0.5 + SOON
    assert not any(is_alive(process.pid) for process in runners[0].processes)
    assert_a_new_engine_works(model_path)


def test_a_rank_killed_between_steps(llm, model_path):
    generate(llm, [[1, 2, 3]])
    os.kill(llm.engine.model_runner.processes[1].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by SIGKILL; this engine has ended"):
        generate(llm, [[1, 2, 3]])
    assert_ended(llm, start)
    assert_a_new_engine_works(model_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_inside_a_step(llm, model_path, rank):
    """Between two of its messages to us, so most probably in the middle of an exchange with the others."""
    killed = []

    def kill():
        killed.append(time.monotonic())
        os.kill(llm.engine.model_runner.processes[rank].pid, signal.SIGKILL)

    threading.Timer(0.5, kill).start()
    with pytest.raises(RuntimeError, match=f"rank {rank} of 2 was killed by SIGKILL"):
        generate(llm, [[1, 2, 3]] * 8, ENDLESS)
    assert_ended(llm, killed[0])
    assert_a_new_engine_works(model_path)


@pytest.mark.parametrize("other", ["fails", "aborts"])
def test_a_rank_that_raises_is_named_with_its_error(llm, model_path, other):
    """Only it: the other waits for it in an exchange, and fails later because it is gone; NCCL's aborts itself."""
    runner = llm.engine.model_runner
    send = runner.send

    def send_nonsense_to_one(*message):
        runner.tell(runner.connections[0], pickle.dumps(message))
        runner.tell(runner.connections[1], pickle.dumps((*message[:-1], "no inputs")))
        if other == "aborts":
            os.kill(runner.processes[0].pid, signal.SIGSTOP)  # so that it says nothing before
            time.sleep(0.5)
            os.kill(runner.processes[0].pid, signal.SIGABRT)
            os.kill(runner.processes[0].pid, signal.SIGCONT)

    runner.send = send_nonsense_to_one
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed:(?s:.*)AttributeError: 'str' object"):
        generate(llm, [[1, 2, 3]])
    runner.send = send
    assert_ended(llm, start)
    assert_a_new_engine_works(model_path)


def test_an_interrupt_of_the_ranks_themselves_is_ignored(llm):
    """As under torchrun, whose processes are in one group: who is at the other end decides what it ends."""
    expected = generate(llm, [[1, 2, 3]])
    for process in llm.engine.model_runner.processes:
        process.send_signal(signal.SIGINT)
    assert generate(llm, [[1, 2, 3]]) == expected


def test_what_ranks_write(model_path, tmp_path, monkeypatch, capfd):
    """The first one's progress bars, and warnings, are shown. What is below Python is told in the error."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent("""
            import sys, threading, time
            def draw():
                time.sleep(0.1)
                print("a bar", file=sys.stderr, flush=True)
            if "nanovllm.engine.rank" in sys.orig_argv:
                threading.Thread(target=lambda: [draw() for _ in range(200)], daemon=True).start()
            """))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")  # writes when a process aborts
    llm = LLM(model_path, num_kv_blocks=8, device="cpu", tensor_parallel_size=2)
    runner = llm.engine.model_runner
    shown: list[str] = []
    assert wait_until(lambda: shown.append(capfd.readouterr().err) or "a bar" in "".join(shown))
    for rank, process in enumerate(runner.processes):
        process.send_signal(signal.SIGABRT)
        process.wait(SOON)
        told = runner.obituary(rank).text
        assert told.startswith("was killed by SIGABRT; the last that it wrote:") and "_bootstrap_inner" in told
    llm.close()


def test_a_rank_listens_while_it_computes(llm):
    """Else whoever tells it of the next step would wait for ever, if it waits itself for one that has died."""
    runner = llm.engine.model_runner
    os.kill(runner.processes[1].pid, signal.SIGSTOP)
    llm.add_request([1, 2, 3], GREEDY)
    step = runner.launch(llm.engine.scheduler.schedule())
    more_than_a_pipe_holds = pickle.dumps(("nothing", bytes(1 << 24)))
    telling = threading.Thread(target=runner.tell, args=[runner.connections[0], more_than_a_pipe_holds], daemon=True)
    telling.start()
    telling.join(SOON)
    assert not telling.is_alive()
    os.kill(runner.processes[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by SIGKILL"):
        step.tokens()


@pytest.mark.parametrize("error", [RuntimeError, TimeoutError])  # the latter is an OSError, as of a broken pipe
def test_an_alarm_in_the_middle_of_a_step_ends_the_engine(llm, error):
    """What the ranks have answered meanwhile would be taken for the answer to the next question."""
    os.kill(llm.engine.model_runner.processes[1].pid, signal.SIGSTOP)  # so that the alarm finds us waiting
    with alarms(error("time is up")), pytest.raises(error, match="time is up"):
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        generate(llm, [[1, 2, 3]] * 8, ENDLESS)
    assert_ended(llm, time.monotonic())


def test_a_close_that_was_cut_short(llm):
    runner = llm.engine.model_runner
    os.kill(runner.processes[1].pid, signal.SIGSTOP)  # one that does not notice that we are gone
    close = runner.logs[0].close
    runner.logs[0].close = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        runner.close()
    runner.logs[0].close = close
    runner.close()
    assert not any(psutil.pid_exists(process.pid) for process in runner.processes)
    assert all(log.closed for log in runner.logs)


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_an_alarm_between_question_and_answer(llm, moment):
    """It ends the engine, too: no answer is taken for that to another question."""
    runner = llm.engine.model_runner
    send, receive, rings = runner.send, runner.receive, [True]

    def ring():
        if rings:
            rings.clear()
            raise ValueError("time is up")

    def noisy_send(*message):
        if message[0] == "tokens" and moment == "before":
            ring()
        send(*message)

    def noisy_receive():
        if moment == "between":
            ring()
        answers = receive()
        ring()
        return answers

    runner.send, runner.receive = noisy_send, noisy_receive
    with pytest.raises(ValueError, match="time is up"):
        generate(llm, [[1, 2, 3]])
    with pytest.raises(RuntimeError, match="has been closed"):
        generate(llm, [[1, 2, 3]])
    assert_ended(llm, time.monotonic())


def test_a_rank_killed_in_the_middle_of_an_answer(llm):
    runner = llm.engine.model_runner
    ours, theirs = Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 40_000) + b"the beginning")
    theirs.close()
    os.kill(runner.processes[0].pid, signal.SIGRTMIN)  # a signal without a name
    runner.connections[0].close()
    runner.connections[0] = ours
    with pytest.raises(RuntimeError, match=f"rank 0 of 2 was killed by (SIGRTMIN|signal {int(signal.SIGRTMIN)})"):
        runner.receive()
    assert_ended(llm, time.monotonic())


def test_another_thread_closes_the_engine(llm):
    closing = threading.Timer(0.5, llm.engine.close)
    closing.start()
    with pytest.raises(RuntimeError, match="this engine has been closed"):
        generate(llm, [[1, 2, 3]] * 8, ENDLESS)
    closing.join()
    assert_ended(llm, time.monotonic())


def test_a_broken_checkpoint_is_the_users_error_and_leaves_no_process(model_path, tmp_path):
    for file in model_path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="lacks model.safetensors"):
        LLM(tmp_path, device="cpu", tensor_parallel_size=2)


def test_two_engines_at_once(llm, model_path):
    other = LLM(model_path, num_kv_blocks=64, device="cpu", tensor_parallel_size=2)
    for engine in (llm, other):
        engine.add_request([1, 2, 3], GREEDY)
    answers = {llm: [], other: []}
    while llm.has_unfinished_requests() or other.has_unfinished_requests():
        for engine in (other, llm):
            answers[engine] += [answer["token_ids"] for answer in engine.step()]
    assert answers[llm] == answers[other] == generate(llm, [[1, 2, 3]])
    other.close()
    assert generate(llm, [[1, 2, 3]]) == answers[llm], "it does not miss the other"


def test_close_waits_for_nobody_and_is_not_cut_short(llm):
    """Neither for a rank that hangs, nor for a forked process with our ends of the pipes; an interrupt comes after."""
    runner = llm.engine.model_runner
    first, last = runner.processes
    os.kill(last.pid, signal.SIGSTOP)
    kill = first.kill
    first.kill = lambda: (kill(), signal.raise_signal(signal.SIGINT))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    first.kill = kill
    assert time.monotonic() - start < 2
    assert not any(psutil.pid_exists(process.pid) for process in runner.processes)
    assert all(log.closed for log in runner.logs)


def test_an_interrupt_while_ranks_are_started_leaves_none(model_path, monkeypatch):
    start_process, pids = subprocess.Popen, []

    def start_and_interrupt(*args, **kwargs):
        process = start_process(*args, **kwargs)
        pids.append(process.pid)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        LLM(model_path, num_kv_blocks=8, device="cpu", tensor_parallel_size=2)
    assert not any(map(psutil.pid_exists, pids))


def test_a_scheduler_that_fails_leaves_no_rank(model_path, monkeypatch):
    """Not even while somebody holds the error, as a notebook does until the next one."""
    closed = []
    monkeypatch.setattr(ModelRunner, "close", lambda self: closed.append(self))

    def fail(config, block_manager):
        raise TypeError("of the user's")

    with pytest.raises(TypeError, match="of the user's"):
        LLM(model_path, num_kv_blocks=8, device="cpu", scheduler=fail)
    assert len(closed) == 1


def test_ranks_on_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: 2000)
    config = Config(num_kv_blocks=9, tensor_parallel_size=2)
    assert size_kv_cache(config, 100, torch.device("cpu")) == 9
    with pytest.raises(ValueError, match="needs 0.00 GB"):
        size_kv_cache(config, 101, torch.device("cpu"))


def test_deleted_without_close(model_path):
    llm = LLM(model_path, num_kv_blocks=8, device="cpu", tensor_parallel_size=2)
    pids = [process.pid for process in llm.engine.model_runner.processes]
    del llm
    assert not any(map(is_alive, pids))


# -- From outside ------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from nanovllm import LLM, SamplingParams

llm = LLM({path!r}, num_kv_blocks=64, device="cpu", tensor_parallel_size=2)
params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
try:
    print(*[process.pid for process in llm.engine.model_runner.processes], flush=True)
    while True:
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
        print("went on", flush=True)
except KeyboardInterrupt:
    answer = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    print(len(answer[0]["token_ids"]), "tokens after the interrupt", flush=True)
"""


@pytest.fixture
def script(model_path, tmp_path):
    """A script without a `__main__` guard that generates for ever, in a process group of its own.

    It is called from a folder with a file that is named like a module, which is none of its ranks' business.
    """
    path, here = tmp_path / "script.py", tmp_path / "here"
    path.write_text(SCRIPT.format(path=str(model_path)))
    here.mkdir()
    if sys.version_info >= (3, 11):  # before, `python -m` always looked there
        (here / "random.py").write_text("raise ImportError('found in the current folder')")
    process = subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=here
    )
    yield process
    process.kill()
    process.communicate()


def test_the_parent_is_killed(script):
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    script.kill()
    assert wait_until(lambda: not any(map(is_alive, pids))), "its ranks have ended, too"


def test_an_interrupt_of_the_whole_group_leaves_the_ranks_alone(script):
    """As a terminal's Ctrl-C and Jupyter's stop button send it."""
    pids = [int(pid) for pid in script.stdout.readline().split()]
    time.sleep(0.3)
    os.killpg(script.pid, signal.SIGINT)
    output, _ = script.communicate(timeout=30)
    assert output.splitlines()[-1] == "4 tokens after the interrupt" and script.returncode == 0
    assert not any(map(is_alive, pids))


def test_in_a_notebook(model_path):
    """A cell is interrupted while ranks compute; the next one goes on with the same ranks."""
    manager, client = start_new_kernel()
    try:
        code = SCRIPT.format(path=str(model_path)).partition("try:")[0]
        assert execute(client, code)["status"] == "ok"
        threading.Timer(0.5, manager.interrupt_kernel).start()
        reply = execute(client, "llm.generate([[1, 2, 3]] * 4, params, use_tqdm=False)\nwhile True: pass")
        assert reply["ename"] == "KeyboardInterrupt"
        assert execute(client, "llm.generate('Hi', SamplingParams(max_tokens=4), use_tqdm=False)")["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute(client, code: str) -> dict:
    return client.execute_interactive(code, timeout=60, output_hook=lambda message: None)["content"]


def torchrun(script, host: int = 0, ranks: int = 1, **environment: str) -> tuple[list[subprocess.Popen], int]:
    """Two hosts as far as torchrun knows, some ranks each, with a GPU of its own if there are two; and their port.

    One has the store over which the two torchruns talk: when it has ended, the other does not wait for it any more.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        f"--nproc-per-node={ranks}",
        "--rdzv-id=test",
    ]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    environment = os.environ | environment
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*command, f"--rdzv-conf=is_host={int(node == host)}", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"CUDA_VISIBLE_DEVICES": str(node)},
        )
        for node in range(2)
    ]
    return nodes, port


@pytest.mark.parametrize(
    ("device", "ranks", "shares_its_store"),
    [("cpu", 1, 1), ("cpu", 1, 0), ("cpu", 2, 1), pytest.param("cuda", 1, 1, marks=pytest.mark.gpu)],
)
def test_two_torchrun_nodes(model_path, tmp_path, device, ranks, shares_its_store):
    """The first is where the script goes on. That of PyTorch 2.4 never shares its store."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    size = 2 * ranks
    settings = dict(num_kv_blocks=64, device=device, dtype="float32")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
            from nanovllm import LLM, SamplingParams
            print("starts")
            llm = LLM({str(model_path)!r}, **{settings}, tensor_parallel_size={size})
            params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
            print(llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"])
            llm.close()
            try:
                LLM({str(model_path)!r}, **{settings}, tensor_parallel_size={size})
            except RuntimeError as error:
                print(error)
            """))
    nodes, port = torchrun(script, ranks=ranks, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=str(1 - shares_its_store))
    try:
        outputs = [node.communicate(timeout=90) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    expected = generate(LLM(model_path, **settings), [[1, 2, 3]])[0]
    refusal = "under torchrun a script makes one LLM: the other ranks ended with the first"
    assert sorted(stdout for stdout, _ in outputs) == [
        "starts\n" * ranks,
        "starts\n" * ranks + f"{expected}\n{refusal}\n",
    ]
    assert is_free(port)


FAULTS = {
    "the driver is killed": "while True: time.sleep(1)",  # between two steps, when a rank waits for the next
    "the driver is killed in a step": "while True: llm.generate([[1, 2, 3]] * 8, params, use_tqdm=False)",
    "the rank is killed": "while True: llm.generate([[1, 2, 3]] * 8, params, use_tqdm=False)",
    "the script fails": "time.sleep(1); 1 / 0",
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_torchrun_node_ends_the_other(model_path, tmp_path, fault, device):
    """Else its torchrun waits five minutes for the first, because it believes that its own rank has done its work."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
            import os, time
            from nanovllm import LLM, SamplingParams
            print(os.environ["RANK"], os.getpid(), flush=True)
            llm = LLM({str(model_path)!r}, num_kv_blocks=64, device={device!r}, tensor_parallel_size=2)
            params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
            print("ready", flush=True)
            {FAULTS[fault]}
            """))
    nodes, port = torchrun(script, host=int(fault != "the rank is killed"))  # the one that is left alone
    processes = []
    try:
        pids = dict(tuple(map(int, node.stdout.readline().split())) for node in nodes)  # by rank
        driver = nodes[list(pids).index(0)]
        assert driver.stdout.readline() == "ready\n"
        processes = [each for node in nodes for each in psutil.Process(node.pid).children(recursive=True)]
        time.sleep(0.5)
        if "killed" in fault:
            os.kill(pids[int("rank" in fault)], signal.SIGKILL)
        else:
            time.sleep(1)  # until it fails
        assert wait_until(lambda: not any(is_alive(process.pid) for process in processes)), "all ours end within 5 s"
        outputs = [node.communicate(timeout=15) for node in nodes]  # torchrun itself takes a while to notice
        assert is_free(port)
    finally:
        for process in [*nodes, *processes]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert [node.returncode for node in nodes] == [1, 1], outputs
    error = {"the rank is killed": "RuntimeError: rank 1 of 2 ", "the script fails": "ZeroDivisionError"}.get(fault, "")
    assert error in outputs[nodes.index(driver)][1]


class Store(dict):
    """As much of a torch store as `accept` needs."""

    def add(self, key, amount):
        self[key] = self.get(key, 0) + amount
        return self[key]

    def set(self, key, value):
        self[key] = value.encode()


def test_strangers_who_call_are_not_ranks(monkeypatch):
    store = Store()
    monkeypatch.setattr("nanovllm.engine.torchrun.torchrun_store", lambda is_first=False: store)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    accepted = []
    accepting = threading.Thread(target=lambda: accepted.extend(accept(4)), daemon=True)
    accepting.start()
    assert wait_until(lambda: "driver" in store)
    address = ("127.0.0.1", int(store["driver"].split()[0]))
    socket.create_connection(address).close()
    with socket.create_connection(address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(AuthenticationError):
            Client(address, authkey=b"a guess")
        ranks = {rank: connect(rank) for rank in (3, 1, 2)}
    accepting.join(SOON)
    for rank, connection in enumerate(accepted, 1):
        connection.send("hello")
        assert ranks[rank].poll(SOON) and ranks[rank].recv() == "hello"
    assert len(accepted) == 3


def test_ranks_wait_an_hour_for_the_first(monkeypatch):
    """Its host may fetch the model meanwhile."""
    server = TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    assert torchrun_store.__wrapped__().underlying_store.timeout == timedelta(hours=1)


WAITS = """
import sys, threading, time
from multiprocessing.connection import Connection
from queue import SimpleQueue
from nanovllm.engine import rank

rank.GRACE = 0.5
threading.Thread(target=rank.listen, args=[Connection(int(sys.argv[1])), SimpleQueue()]).start()
time.sleep(60)
"""
END = struct.pack("!i", len(pickle.dumps(("end",)))) + pickle.dumps(("end",))


@pytest.mark.parametrize("said, code", [(END, 0), (END[:-1], 1), (b"", 1)], ids=["all", "most", "nothing"])
def test_a_rank_that_waits_for_another_hears_the_end(said, code):
    """Through NCCL it may wait for one that is gone, for ever. Without a whole word at the end, it has failed."""
    ours, theirs = Pipe()
    rank = subprocess.Popen([sys.executable, "-c", WAITS, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    os.write(ours.fileno(), said)
    ours.close()
    assert rank.wait(30) == code


def test_the_memory_of_each_rank_is_logged(tmp_path, monkeypatch, caplog):
    """By the parent, whose log somebody may read."""
    ready = [((8, torch.float32, "a GPU", MemoryUse(), False), f"memory: {rank} MB") for rank in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("nanovllm.engine.parallel.resolve_device", torch.device)
    monkeypatch.setattr(ParallelRunner, "start", lambda *args, **kwargs: None)
    monkeypatch.setattr(ParallelRunner, "receive", lambda self: ready)
    with caplog.at_level("INFO", "nanovllm"):
        ParallelRunner(Config(device="cuda", tensor_parallel_size=2), tmp_path)
    assert caplog.messages == [f"rank {rank} of 2, on a GPU: memory: {rank} MB" for rank in range(2)]

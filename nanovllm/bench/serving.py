"""Many requests at once, against what everybody has installed already: transformers' `generate` and `generate_batch`.

`generate` takes a static batch: prompts are padded on the left to the longest, and every sequence goes on until the
longest answer is done. `generate_batch` batches continuously on a paged KV cache, as the engine does. All sides decode
greedily and ignore the end of the sequence, so that they do the same work; only tokens that were asked for count.
"""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import transformers

from nanovllm import LLM, SamplingParams
from nanovllm.bench.report import Report
from nanovllm.bench.timing import watch_others
from nanovllm.config import Config
from nanovllm.layers.attention import Attention
from nanovllm.utils.checkpoint import load_hf_config

if TYPE_CHECKING:
    from nanovllm.bench import Size


SETTINGS = ("block_size", "num_kv_blocks", "max_num_batched_tokens", "max_num_seqs")  # of the engine, that are recorded
PEER_PAGE_ON_GPU = 256  # tokens: FlashAttention 2, which transformers takes where it is installed, can do no fewer

# How many times as fast as each peer we must be at least.
BARS = {
    "cpu": {"generate": 2.5, "generate_batch": 4.0, "sharing": 4.0},
    "cuda": {"generate": 1.0, "generate_batch": 1.0, "sharing": 1.0},
}

GPU_BLOCKS = 8192  # of the KV cache on a GPU, where the engine would else leave no memory for its peer

PATIENCE = 120.0  # seconds after which nobody runs again

Tokens = list[list[int]]


@dataclass
class Workload:
    """Prompts, as token ids, and how many tokens to answer each with."""

    prompts: Tokens
    output_lens: list[int]

    @classmethod
    def make(cls, num_requests: int, prefix_len: int, vocab_size: int, size: "Size") -> "Workload":
        """Random prompts of random lengths after a prefix that all share: the same ones every time."""
        generator = random.Random(0)
        prefix = generator.choices(range(vocab_size), k=prefix_len)
        prompts = [
            prefix + generator.choices(range(vocab_size), k=generator.randint(*size.prompt_lens))
            for _ in range(num_requests)
        ]
        return cls(prompts, [generator.randint(*size.output_lens) for _ in range(num_requests)])

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    def beginning(self) -> "Workload":
        """A little of it, to warm up."""
        return Workload([prompt[:16] for prompt in self.prompts[:2]], [4, 4])


@dataclass
class Answers:
    """What a side gave, and the seconds that it took."""

    token_ids: Tokens
    seconds: float


class Engine:
    """nanovllm."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.num_runs = 0

    def settings(self) -> dict[str, Any]:
        runner = self.llm.engine.model_runner
        attention = next(module for module in runner.model.modules() if isinstance(module, Attention))
        backend = attention.backend.__name__.rpartition(".")[2]
        return {name: getattr(self.llm.engine.config, name) for name in SETTINGS} | {"attention": backend}

    def run(self, work: Workload) -> Answers:
        self.num_runs += 1  # a salt of its own, so that a run finds nothing of the one before in the prefix cache
        params = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, cache_salt=f"run {self.num_runs}")
            for n in work.output_lens
        ]
        start = perf_counter()
        outputs = self.llm.generate(work.prompts, params, use_tqdm=False)
        return Answers([output["token_ids"] for output in outputs], perf_counter() - start)


class Generate:
    """transformers' `generate`, one padded batch after the other."""

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size

    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "attention": self.model.config._attn_implementation}

    def run(self, work: Workload) -> Answers:
        outputs: Tokens = []
        start = perf_counter()
        for i in range(0, len(work.prompts), self.batch_size):
            outputs += self.batch(work.prompts[i : i + self.batch_size], work.output_lens[i : i + self.batch_size])
        return Answers(outputs, perf_counter() - start)

    def batch(self, prompts: Tokens, output_lens: list[int]) -> Tokens:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        input_ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts)])
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
        device, max_new_tokens = self.model.device, max(output_lens)
        tokens = self.model.generate(
            input_ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens
        )[:, longest:]
        return [row[:n] for row, n in zip(tokens.tolist(), output_lens)]


class GenerateBatch:
    """transformers' `generate_batch`, by the manager underneath, which takes an output length for each request."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.model = model
        self.own_settings, self.attention = settings, "none yet"
        self.configs = {
            "generation_config": transformers.GenerationConfig(do_sample=False, eos_token_id=-1),  # -1 is none
            "continuous_batching_config": transformers.ContinuousBatchingConfig(**settings),
        }

    def settings(self) -> dict[str, Any]:
        return self.own_settings | {"attention": self.attention}

    def run(self, work: Workload) -> Answers:
        # A new manager for each run, so that it finds nothing of the one before. Its warm-up makes the KV cache.
        with self.model.continuous_batching_context_manager(**self.configs) as manager:
            self.attention = self.model.config._attn_implementation  # it chooses one, for this run only
            start = perf_counter()
            ids = [
                manager.add_request(prompt, max_new_tokens=output_len)
                for prompt, output_len in zip(work.prompts, work.output_lens)
            ]
            answers: dict[str, list[int]] = {}
            while len(answers) < len(ids):
                result = manager.get_result()
                if result.is_finished():
                    answers[result.request_id] = result.generated_tokens
            seconds = perf_counter() - start
        return Answers([answers[request_id] for request_id in ids], seconds)


def load_peer(path: Path, load_format: str, dtype: str) -> Any:
    """The same model in transformers, set to answer greedily and to ignore the end of the sequence."""
    if load_format == "dummy":
        model = transformers.AutoModelForCausalLM.from_config(load_hf_config(path), dtype=getattr(torch, dtype))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def measure_serving(
    report: Report, path: Path, load_format: str, dtype: str, size: "Size", device: str = "cpu"
) -> None:
    """Output tokens per second for requests that have nothing in common, and for some that share a prefix."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        report.progress(f"requests are left out: transformers {transformers.__version__} is too old, 5.17 is needed")
        return
    report.progress(f"{dtype}: loading the model, for nanovllm and for transformers")
    num_kv_blocks = size.num_kv_blocks or (None if device == "cpu" else GPU_BLOCKS)
    llm = LLM(path, load_format=load_format, dtype=dtype, device=device, num_kv_blocks=num_kv_blocks)
    config, peer = llm.engine.config, load_peer(path, load_format, dtype).to(device)
    bars = BARS[device]
    engine = Engine(llm)
    generate = Generate(peer, size.static_batch_size)
    generate_batch = GenerateBatch(peer, as_peer_settings(config, device))

    work = Workload.make(size.num_requests, 0, llm.engine.vocab_size, size)
    sides = {"nanovllm": engine, "generate": generate, "generate_batch": generate_batch}
    name = f"{size.num_requests} requests"
    compare(report, name, dtype, sides, work, bars, size.serving_rounds)

    work = Workload.make(size.num_sharing, size.prefix_len, llm.engine.vocab_size, size)
    sides = {"nanovllm": engine, "generate": generate}
    name = f"{size.num_sharing} requests that share {size.prefix_len} tokens"
    compare(report, name, dtype, sides, work, bars | {"generate": bars["sharing"]}, size.serving_rounds)
    llm.close()


def as_peer_settings(config: Config, device: str) -> dict[str, Any]:
    """The engine's settings for `generate_batch`: a cache of as many tokens, the same budget. Its blocks are pages."""
    assert config.num_kv_blocks is not None
    page_size = config.block_size if device == "cpu" else PEER_PAGE_ON_GPU
    known = {field.name for field in dataclasses.fields(transformers.ContinuousBatchingConfig)}
    return {
        "page_size" if "page_size" in known else "block_size": page_size,  # the latter in transformers 5.17
        "num_blocks": config.num_kv_blocks * config.block_size // page_size,
        "max_batch_tokens": config.max_num_batched_tokens,
        "max_requests_per_batch": config.max_num_seqs,
    }


def compare(
    report: Report,
    name: str,
    dtype: str,
    sides: dict[str, Any],
    work: Workload,
    bars: dict[str, float],
    rounds: int,
) -> None:
    """Let the sides work in turns, and report the best run of each peer against the engine's."""
    for side in sides.values():
        side.run(work.beginning())  # warm-up
    best: dict[str, Answers] = {}
    begin = perf_counter()
    with watch_others() as load:
        for i in range(rounds):
            if perf_counter() - begin > PATIENCE:
                break
            for side_name, side in sides.items():
                report.progress(f"{dtype}: {name}, {side_name}, run {i + 1}")
                answers = side.run(work)
                assert [len(token_ids) for token_ids in answers.token_ids] == work.output_lens
                if side_name not in best or answers.seconds < best[side_name].seconds:
                    best[side_name] = answers
    engine = best.pop("nanovllm")
    for peer_name, peer in best.items():
        record = {
            "measurement": f"{name}, against {peer_name}",
            "dtype": dtype,
            "value": round(peer.seconds / engine.seconds, 3),
            "unit": "x its tokens/s",
            "at_least": bars[peer_name],
            "tokens_per_second": {
                "nanovllm": round(work.num_output_tokens / engine.seconds, 1),
                peer_name: round(work.num_output_tokens / peer.seconds, 1),
            },
            "same_answers": sum(ours == theirs for ours, theirs in zip(engine.token_ids, peer.token_ids)),
            "settings": {name: sides[name].settings() for name in ("nanovllm", peer_name)},
        }
        report.add(record | load)

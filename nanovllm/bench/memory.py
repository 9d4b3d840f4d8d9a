"""Peak resident memory, which only a process of its own can tell: this module runs itself in one."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.bench.report import Report
from nanovllm.utils.checkpoint import load_hf_config

BAR = 500  # MB beyond model and KV cache


def measure_memory(report: Report, path: Path, load_format: str) -> None:
    """What the engine takes at the default settings, beyond its imports, the model's weights and the KV cache."""
    report.progress("peak memory, in a process of its own")
    command = [sys.executable, "-m", "nanovllm.bench.memory", str(path), load_format]
    megabytes = json.loads(subprocess.check_output(command))
    report.add(
        {
            "measurement": "peak memory beyond imports, model and KV cache",
            "dtype": "float32",
            "value": megabytes["peak"] - megabytes["imports"] - megabytes["model"] - megabytes["kv_cache"],
            "unit": "MB",
            "at_most": BAR,
            "megabytes": megabytes,
        }
    )


def exercise(path: Path, load_format: str) -> dict[str, int]:
    """Load the model and make the largest steps there are; returns megabytes."""
    imports = peak_bytes()
    llm = LLM(path, load_format=load_format, device="cpu")
    config, kv_cache = llm.engine.config, llm.engine.model_runner.kv_cache
    kv_cache.zero_()  # what nobody has written to takes no memory yet
    assert config.num_kv_blocks is not None and config.max_model_len is not None
    # As many sequences as may run, so that together they use up the budget of a step: greedy, then random.
    num_seqs = min(config.max_num_seqs, config.num_kv_blocks)
    prompt = [1] * max(1, config.max_num_batched_tokens // num_seqs)
    for params in (SamplingParams(temperature=0.0, max_tokens=4), SamplingParams(max_tokens=4)):
        llm.generate([[i, *prompt[1:]] for i in range(num_seqs)], params, use_tqdm=False)
    # One sequence as long as a step's budget allows.
    prompt = [2] * min(config.max_num_batched_tokens, config.max_model_len - 1)
    llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)

    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(load_hf_config(path)).num_parameters()
    sizes = {"imports": imports, "model": 4 * num_parameters, "kv_cache": kv_cache.nbytes, "peak": peak_bytes()}
    return {name: round(size / 1e6) for name, size in sizes.items()}


def peak_bytes() -> int:
    """The most memory that this process has held at any one time."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(exercise(Path(sys.argv[1]), sys.argv[2])))

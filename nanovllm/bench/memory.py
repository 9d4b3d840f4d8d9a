"""Peak resident memory, which only a process of its own can tell: this module runs itself in one."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.bench.report import Report
from nanovllm.utils.checkpoint import load_hf_config
from nanovllm.utils.children import environment_of_a_child

STATUS = Path("/proc/self/status")
BAR = 500  # MB beyond model and KV cache


def measure_memory(report: Report, path: Path, load_format: str) -> None:
    """What the engine takes at the default settings, beyond its imports, the model's weights and the KV cache."""
    if not STATUS.exists():
        report.progress("peak memory is left out: only Linux tells it")
        return
    report.progress("peak memory, in a process of its own")
    program = "from nanovllm.bench.memory import main; main()"
    command, environment = [sys.executable, "-c", program, str(path), load_format], environment_of_a_child()
    megabytes = json.loads(subprocess.check_output(command, env=environment))
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
    # As many sequences as may run, so short that one step has room for them all; then one that fills a step by itself.
    num_seqs = min(config.max_num_seqs, config.num_kv_blocks)
    prompt_len = max(1, config.max_num_batched_tokens // num_seqs)
    llm.generate([[i] * prompt_len for i in range(num_seqs)], SamplingParams(max_tokens=2), use_tqdm=False)
    prompt_len = min(config.max_num_batched_tokens, config.max_model_len - 1)
    llm.generate([[0] * prompt_len], SamplingParams(max_tokens=1), use_tqdm=False)

    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(load_hf_config(path)).num_parameters()
    sizes = {"imports": imports, "model": 4 * num_parameters, "kv_cache": kv_cache.nbytes, "peak": peak_bytes()}
    return {name: round(size / 1e6) for name, size in sizes.items()}


def peak_bytes() -> int:
    """The most resident memory that this process has had at any one time (VmHWM, see proc(5)).

    `getrusage` would tell it everywhere, but a new process inherits its parent's peak there.
    """
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    print(json.dumps(exercise(Path(sys.argv[1]), sys.argv[2])))

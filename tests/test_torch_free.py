"""The parts of the engine that plan need no torch: they load at once, anywhere, and can be studied on their own."""

import subprocess
import sys

import pytest

TORCH_FREE = [
    "engine.block_manager",
    "engine.buckets",
    "engine.scheduler",
    "engine.sequence",
    "engine.trace",
    "engine.recorder",
    "config",
    "sampling_params",
]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_is_imported_without_torch(module):
    script = f"""
import sys
for name in ("torch", "numpy", "transformers", "triton"):
    sys.modules[name] = None  # importing it is an ImportError now
import nanovllm.{module}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_public_settings_are_imported_without_torch():
    script = "import sys; from nanovllm import SamplingParams; assert 'torch' not in sys.modules; SamplingParams()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

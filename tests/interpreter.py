"""Triton's kernels on a CPU: its interpreter is on or off for a whole process, and must be so before they are imported.

Where it is off, they can be compiled, for GPUs that are not here.
"""

import inspect
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

IS_ON = os.environ.get("TRITON_INTERPRET") == "1"


def run_tests_of(file: str) -> None:
    """Run a test file once more, in a process of its own whose interpreter is on; fail if it fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", file]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def shared_memory_of(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    aligned: Sequence[str] = (),
    **options,
) -> int:
    """Compile a kernel for a GPU of some compute capability; the bytes of shared memory that each program takes.

    What has no type and is no constant is an i32; addresses and strides that are `aligned` are multiples of 16. What is
    no argument of this kernel is passed over.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("the compiler of this Triton is called otherwise")
    names = kernel.arg_names
    types = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name in aligned},
    )
    # Fusion: a * b + c is rounded once; from 3.10 off by default.
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options | dict(enable_fp_fusion=True))
    return compiled.metadata.shared

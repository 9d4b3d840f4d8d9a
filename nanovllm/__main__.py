"""The `nanovllm` command: open the notebooks, try the engine in a terminal, measure it, report a bug.

nanovllm lab                  the notebooks in JupyterLab, opened on the first one
nanovllm generate "Once"      an answer as it is made, then one line of statistics
nanovllm chat                 a conversation
nanovllm bench                the benchmarks of docs/performance.md on this machine
nanovllm env                  versions and devices, for bug reports
"""

import argparse
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nanovllm

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "transformers",
    "safetensors",
    "numpy",
    "xxhash",
    "jupyterlab",
    "anywidget",
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.run is not run_bench:  # which measures what scripts have
        # Beside other programs, threads that wait for each other had better sleep soon than spin for long: on two cores
        # with two of them at work 25 tokens a second, not one; alone 47, not 48. Read when torch is imported, and by
        # the kernels of notebooks, which inherit it.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        args.run(args)
    except KeyboardInterrupt:
        print()
        return 130
    except (RuntimeError, TypeError, ValueError) as error:  # of a wrong model, setting or prompt
        print(f"nanovllm: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanovllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    lab = commands.add_parser("lab", help="open the notebooks in JupyterLab")
    lab.add_argument("--port", type=int, default=8888, help="the first port to try (default: 8888)")
    lab.add_argument("--no-browser", action="store_true", help="print the address instead of opening it")
    lab.set_defaults(run=run_lab)

    generate = commands.add_parser("generate", help="answer one prompt")
    generate.add_argument("prompt")
    generate.add_argument("--max-tokens", type=int, default=64, help="length of the answer (default: 64)")
    generate.set_defaults(run=run_generate)

    chat = commands.add_parser("chat", help="talk to the model")
    chat.add_argument("--max-tokens", type=int, default=512, help="length of an answer (default: 512)")
    chat.set_defaults(run=run_chat)

    for command in (generate, chat):
        command.add_argument(
            "--model", help="a folder or a Hugging Face repository id (default: SmolLM2-135M-Instruct)"
        )
        command.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
        command.add_argument("--seed", type=int, help="makes the answer repeatable")

    bench = commands.add_parser("bench", help="measure the engine on this machine")
    bench.add_argument("--model", help="a folder or a Hugging Face repository id (default: SmolLM2-135M-Instruct)")
    bench.add_argument("--load-format", default="auto", choices=["auto", "dummy"], help="dummy: random weights")
    bench.add_argument("--out", type=Path, help="also append the results to this file, one JSON line each")
    bench.add_argument("--trace", action="store_true", help="measure only what it costs to record a trace")
    bench.set_defaults(run=run_bench)

    env = commands.add_parser("env", help="print versions and devices")
    env.set_defaults(run=run_env)
    return parser


def run_lab(args: argparse.Namespace) -> None:
    from jupyterlab.labapp import main as jupyter_lab

    from nanovllm.utils.hub import resolve_model

    notebook = NOTEBOOKS / "00_quickstart.ipynb"
    if not notebook.is_file():
        raise ValueError(
            f"there is no {notebook}: the notebooks come with the repository; install it with `pip install -e .`"
        )
    resolve_model(None)  # fetched now, with a progress bar, so that the first cell need not wait for it
    options = [
        f"--port={args.port}",
        f"--ServerApp.root_dir={NOTEBOOKS.parent}",  # the chapters link to docs/, too
        f"--LabApp.default_url=/lab/tree/{NOTEBOOKS.name}/{notebook.name}",  # so that the printed address opens it
        "--ContentsManager.pre_save_hook=nanovllm.lessons.saving.drop_live_entries",
    ]
    if args.no_browser:
        options.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")  # as in a container; Jupyter would refuse otherwise
    jupyter_lab(options)


def run_generate(args: argparse.Namespace) -> None:
    from nanovllm import LLM, SamplingParams

    llm = LLM(args.model)
    params = SamplingParams(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens)
    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    arrivals = []
    for chunk in llm.stream(args.prompt, params):
        print(chunk["text"], end="", flush=True)
        arrivals += [time.perf_counter() - start] * len(chunk["token_ids"])
    line = f"{len(arrivals)} tokens"
    if arrivals:
        line += f", the first after {arrivals[0]:.2f} s"
    if len(arrivals) > 1:
        line += f", then {(len(arrivals) - 1) / (arrivals[-1] - arrivals[0]):.1f} tokens/s"
    print(f"\n\n[{line}; {chunk['finish_reason']}]", file=sys.stderr)


def run_chat(args: argparse.Namespace) -> None:
    from nanovllm import LLM, SamplingParams

    llm = LLM(args.model)
    params = SamplingParams(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens)
    messages: list[dict[str, str]] = []
    print("An empty line or Ctrl-D ends the conversation.")
    while True:
        try:
            text = input("\nYou: ").strip()
        except EOFError:
            print()
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        print("\nModel: ", end="", flush=True)
        answer = ""
        for chunk in llm.stream(llm.apply_chat_template(messages), params):
            print(chunk["text"], end="", flush=True)
            answer += chunk["text"]
        print()
        messages.append({"role": "assistant", "content": answer})


def run_bench(args: argparse.Namespace) -> None:
    from nanovllm.bench import run

    run(model=args.model, load_format=args.load_format, out=args.out, only_trace=args.trace)


def run_env(args: argparse.Namespace) -> None:
    import torch

    print(f"nanovllm {nanovllm.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    print(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        print(f"GPU {i}: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB")
    if not torch.cuda.is_available():
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of torch"
        print(f"GPU: none ({build})")


if __name__ == "__main__":
    sys.exit(main())

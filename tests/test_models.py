"""Our models against transformers' in float32, and a loader that notices what is wrong with a checkpoint."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nanovllm import LLM
from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.models import get_model_class
from nanovllm.utils.loader import build_model
from nanovllm.utils.ranks import Ranks
from tests.conftest import SIZES, save_random_model
from tests.paged import PagedModel

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# What checkpoints may differ in: each of these computes something else if a setting is overlooked.
VARIANTS = {
    "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(head_dim=32, tie_word_embeddings=False, **SIZES)),
    "qwen3-tied-biased": lambda: (
        Qwen3ForCausalLM,
        Qwen3Config(head_dim=16, tie_word_embeddings=True, attention_bias=True, **SIZES),
    ),
    "llama": lambda: (LlamaForCausalLM, LlamaConfig(tie_word_embeddings=True, **SIZES)),
    "llama-untied-biased": lambda: (
        LlamaForCausalLM,
        LlamaConfig(tie_word_embeddings=False, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3, **SIZES),
    ),
    "llama3-scaling": lambda: (
        LlamaForCausalLM,
        LlamaConfig(rope_theta=10000.0, rope_scaling=LLAMA3, head_dim=24, **SIZES),
    ),
}


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, SIZES["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(path: Path, **settings) -> torch.nn.Module:
    arguments = dict(dtype=torch.float32, device="cpu") | settings
    return build_model(AutoConfig.from_pretrained(path), path, **arguments)


def test_weights_that_take_long_have_a_bar(tiny_qwen3_path, monkeypatch, capsys):
    load(tiny_qwen3_path)
    assert not capsys.readouterr().err, "these take no time"
    monkeypatch.setattr("nanovllm.utils.loader.tqdm", lambda todo, delay, **about: tqdm(todo, delay=0 * delay, **about))
    load(tiny_qwen3_path)
    assert "Loading weights: 100%" in capsys.readouterr().err


@torch.inference_mode()
def transformers_logits(path: Path, token_ids: list[int]) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(path)(torch.tensor([token_ids])).logits[0]


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


# ---- The same logits as transformers ----


@pytest.fixture(scope="module", params=VARIANTS)
def path(request, tmp_path_factory) -> Path:
    model_class, config = VARIANTS[request.param]()
    path = save_random_model(model_class, config, tmp_path_factory.mktemp(request.param))
    # Biases and norms are made as zeros and ones: as such nobody would notice if they were left out.
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if tensor.dim() == 1:
            weights[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_whole_prompt(path):
    prompt = tokens(150)
    assert_same_logits(PagedModel(load(path)).step({"a": prompt})["a"], transformers_logits(path, prompt))


@pytest.mark.parametrize("block_size, chunk", [(16, 16), (16, 37), (1, 50), (32, 8)])
def test_prompt_in_chunks(path, block_size, chunk):
    prompt = tokens(150)
    model = PagedModel(load(path), block_size, num_blocks=200)
    logits = [model.step({"a": prompt[i : i + chunk]})["a"] for i in range(0, len(prompt), chunk)]
    assert_same_logits(torch.cat(logits), transformers_logits(path, prompt))


def test_token_by_token(path):
    prompt = tokens(40)
    model = PagedModel(load(path))
    logits = [model.step({"a": [token]})["a"] for token in prompt]
    assert_same_logits(torch.cat(logits), transformers_logits(path, prompt))


def test_several_sequences_in_one_batch(path):
    """Decodes, chunks and whole prompts side by side, in an order that changes from step to step."""
    prompts = {"a": tokens(60, 1), "b": tokens(33, 2), "c": tokens(5, 3), "d": tokens(90, 4)}
    model = PagedModel(load(path))
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}
    for sizes in [{"a": 58, "c": 4}, {"b": 20, "a": 1, "c": 1, "d": 64}, {"d": 16, "b": 13, "a": 1}, {"d": 10}]:
        start = {name: model.num_computed.get(name, 0) for name in sizes}
        chunks = {name: prompts[name][start[name] : start[name] + size] for name, size in sizes.items()}
        for name, chunk_logits in model.step(chunks).items():
            logits[name].append(chunk_logits)
    for name, prompt in prompts.items():
        assert_same_logits(torch.cat(logits[name]), transformers_logits(path, prompt))


def test_bfloat16_is_near(path):
    prompt = tokens(100)
    model = load(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    paged = PagedModel(model, dtype=torch.bfloat16)
    logits = torch.cat([paged.step({"a": prompt[:60]})["a"], paged.step({"a": prompt[60:]})["a"]])
    expected = transformers_logits(path, prompt)
    assert logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(logits.float(), expected).min() > 0.99


# ---- Loading ----


def copy_of(path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / "copy"))


def change_weights(path: Path, change) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_sharded_checkpoint(tiny_qwen3_path, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_qwen3_path).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, many = (PagedModel(load(path)).step({"a": tokens(20)})["a"] for path in (tiny_qwen3_path, tmp_path))
    assert torch.equal(one, many)


def test_missing_shard(tiny_qwen3_path, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_qwen3_path).save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}. Weights are read from safetensors files only"):
        load(tmp_path)


def test_only_pickled_weights(tiny_llama_path, tmp_path):
    path = copy_of(tiny_llama_path, tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks model.safetensors. .* a pickle \(\*.bin, \*.pt\) is never loaded"):
        load(path)


def test_tied_head_may_be_in_the_file(tiny_llama_path, tmp_path):
    path = copy_of(tiny_llama_path, tmp_path)
    change_weights(path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    one, other = (PagedModel(load(p)).step({"a": tokens(20)})["a"] for p in (tiny_llama_path, path))
    assert torch.equal(one, other)


def test_tied_head_that_differs_is_refused(tiny_llama_path, tmp_path):
    """Which of the two does the model mean?"""
    path = copy_of(tiny_llama_path, tmp_path)
    change_weights(path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    with pytest.raises(
        ValueError, match="lm_head.weight and model.embed_tokens.weight differ, but .*tie_word_embeddings"
    ):
        load(path)


def test_whole_numbers_are_no_weights(tiny_llama_path, tmp_path):
    path, name = copy_of(tiny_llama_path, tmp_path), "model.layers.0.mlp.up_proj.weight"
    change_weights(path, lambda w: w.update({name: w[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"1 quantized, which is not supported: {name} is I8"):
        load(path)


def test_untied_head_must_be_in_the_file(tiny_qwen3_path, tmp_path):
    path = copy_of(tiny_qwen3_path, tmp_path)
    change_weights(path, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="do not fit the model of its config.json; 1 missing: lm_head.weight$"):
        load(path)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"],
)
def test_missing_weight(tiny_llama_path, tmp_path, name):
    path = copy_of(tiny_llama_path, tmp_path)
    change_weights(path, lambda w: w.pop(name))
    with pytest.raises(ValueError, match=f"1 missing: {name}$"):
        load(path)


def test_left_over_and_misshapen_weights_are_told_together(tiny_llama_path, tmp_path):
    path = copy_of(tiny_llama_path, tmp_path)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        weights["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(64, 128)

    change_weights(path, change)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value) == (
        f"the weights in {path} do not fit the model of its config.json; "
        "1 left over: model.layers.0.self_attn.q_proj.bias; "
        "1 of the wrong shape: model.layers.1.mlp.gate_proj.weight is [64, 128] instead of [128, 64]"
    )


def test_many_problems_are_counted(tiny_llama_path, tmp_path):
    path = copy_of(tiny_llama_path, tmp_path)
    change_weights(path, lambda w: [w.pop(name) for name in list(w) if "layers.1" in name])
    with pytest.raises(ValueError, match=r"9 missing: (model\.layers\.1\.[a-z_.]+, ){5}\.\.\.$"):
        load(path)


def test_old_rope_constants_do_no_harm(tiny_llama_path, tmp_path):
    path = copy_of(tiny_llama_path, tmp_path)
    change_weights(path, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load(path)


@pytest.mark.parametrize("size", [0, 5, 100, 40_000])
def test_truncated_file(tiny_llama_path, tmp_path, size):
    path = copy_of(tiny_llama_path, tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or not complete \(.+\); download it again"):
        load(path)


def test_file_that_is_no_safetensors(tiny_llama_path, tmp_path):
    path = copy_of(tiny_llama_path, tmp_path)
    (path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 5\n")
    with pytest.raises(ValueError, match="is damaged or not complete"):
        load(path)


def test_dummy_weights(tiny_llama_path):
    one, same = (load(tiny_llama_path, load_format="dummy") for _ in range(2))
    logits = PagedModel(one).step({"a": tokens(20)})["a"]
    assert torch.equal(logits, PagedModel(same).step({"a": tokens(20)})["a"])
    assert logits.isfinite().all() and logits.std() > 1e-3
    assert len(set(logits.argmax(-1).tolist())) > 5


@pytest.mark.parametrize("damage", [None, "config", "weights"])
def test_global_settings_are_left_as_they_were(tiny_llama_path, tmp_path, damage):
    path = copy_of(tiny_llama_path, tmp_path)
    config = AutoConfig.from_pretrained(path)
    if damage == "config":  # found when the model is half made
        config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    elif damage == "weights":
        change_weights(path, lambda w: w.pop("model.norm.weight"))
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    try:
        build_model(config, path, torch.bfloat16, "cpu")
        assert damage is None
    except ValueError:
        assert damage is not None
    assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before


def test_loading_takes_no_more_memory_than_the_model(default_model_path):
    """The file is mapped into memory, and must not count on top. Of a process of its own, for peaks are for life."""

    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from transformers import AutoConfig\n"
        "from nanovllm.utils.loader import build_model\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before, path = peak(), Path(sys.argv[1])\n"
        "model = build_model(AutoConfig.from_pretrained(path), path, torch.float32, 'cpu')\n"
        "print(peak() - before)\n"
    )
    peak = int(subprocess.check_output([sys.executable, "-c", script, str(default_model_path)]))
    model_size = (default_model_path / "model.safetensors").stat().st_size
    head_size = 4 * 49152 * 576  # packed beside the embedding
    assert peak < model_size + head_size + 150e6


# ---- Several ranks ----


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_part_of_a_file_and_no_more(tiny_qwen3_path, monkeypatch, rank):
    """Matrices by halves, norms whole: so many numbers of each tensor are asked for."""
    numbers_read: Counter[str] = Counter()

    class Watched:
        def __init__(self, tensors, name: str) -> None:
            self.tensors, self.name = tensors, name

        def get_shape(self) -> list[int]:
            return self.tensors.get_slice(self.name).get_shape()

        def get_dtype(self) -> str:
            return self.tensors.get_slice(self.name).get_dtype()

        def __getitem__(self, part) -> torch.Tensor:
            tensor = self.tensors.get_slice(self.name)[part]
            numbers_read[self.name] += tensor.numel()
            return tensor

    @contextmanager
    def watched_open(file, **settings):
        with safe_open(file, **settings) as tensors:
            yield SimpleNamespace(
                keys=tensors.keys,
                get_slice=lambda name: Watched(tensors, name),
                get_tensor=lambda name: Watched(tensors, name)[:],
            )

    monkeypatch.setattr("nanovllm.utils.loader.safe_open", watched_open)
    load(tiny_qwen3_path, ranks=Ranks(rank, 2))
    weights = load_file(tiny_qwen3_path / "model.safetensors")
    assert numbers_read == {
        name: tensor.numel() if "norm" in name else tensor.numel() // 2 for name, tensor in weights.items()
    }


def test_ranks_agree_on_the_smallest(tiny_qwen3_path):
    """Two in threads, with room for 20 blocks and for 14: both count on 14."""
    store = dist.HashStore()

    def start(rank: int) -> tuple[int, int]:
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))
        ranks = Ranks(rank, 2, group)
        config = Config(dtype="float32", device="cpu", num_kv_blocks=[20, 14][rank], tensor_parallel_size=2)
        runner = ModelRunner(config, AutoConfig.from_pretrained(tiny_qwen3_path), tiny_qwen3_path, ranks)
        return ranks.smallest([-3, 5][rank], torch.device("cpu")), runner.num_blocks

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(start, range(2))) == [(-3, 14), (-3, 14)]


# ---- The registry ----


def test_unsupported_architecture_is_named():
    config = AutoConfig.for_model("gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported; supported are LlamaFor.*, Qwen3For"):
        get_model_class(config)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "[]", "config.json is not a JSON object"),
        ("generation_config.json", "[]", "generation_config.json is not a JSON object"),
        ("model.safetensors.index.json", "[]", "index.json is not a JSON object"),
        ("config.json", {"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        (
            "config.json",
            {"model_type": "llama"},
            "Qwen3ForCausalLM .* model_type 'llama', .* that of the one is 'qwen3'",
        ),
        ("config.json", {"rms_norm_eps": "small"}, "rms_norm_eps.* float"),
        (
            "generation_config.json",
            {"eos_token_id": 2.5},
            "eos_token_id must be a token id, or a list of them, not 2.5",
        ),
        ("generation_config.json", {"eos_token_id": [None]}, r"must be a token id, or a list of them, not \[None\]"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "must be a token id, or a list of them, not '</s>'"),
        ("tokenizer.json", "{}", "the tokenizer in .* cannot be read"),
        ("tokenizer_config.json", "[]", "the tokenizer in .* cannot be read"),
        ("tokenizer.json", '{"version": "1.', "the tokenizer in .* cannot be read"),
    ],
)
def test_a_broken_file_is_named(model_path, tmp_path, name, content, words):
    for file in model_path.iterdir():
        shutil.copy(file, tmp_path)
    if isinstance(content, dict):
        path = tmp_path / name
        content = json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | content)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        LLM(tmp_path)


def test_quantization_is_named(tiny_llama_path, tmp_path):
    path = copy_of(tiny_llama_path, tmp_path)
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="quantization 'gptq' is not supported; use a checkpoint in float32"):
        load(path)


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (dict(use_sliding_window=True), "use_sliding_window is not supported"),
    ],
)
def test_settings_that_would_be_computed_wrongly_are_refused(setting, message):
    config = Qwen3Config(architectures=["Qwen3ForCausalLM"], **SIZES, **setting)
    with pytest.raises(ValueError, match=message):
        get_model_class(config)

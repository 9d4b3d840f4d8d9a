"""The models, and the registry that finds the right one for a checkpoint."""

from torch import nn
from transformers import PretrainedConfig

from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM

# `architectures` in a checkpoint's config.json -> the class that computes it. A new model is added here.
MODELS: dict[str, type[LlamaForCausalLM] | type[Qwen3ForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def get_model_class(hf_config: PretrainedConfig) -> type[nn.Module]:
    """The class for a checkpoint; call it with the config. ValueError if we would not compute what the config means."""
    architectures = hf_config.architectures or []
    model_class = next((MODELS[name] for name in architectures if name in MODELS), None)
    if model_class is None:
        found = ", ".join(architectures) or f"of model_type {hf_config.model_type!r} without a name"
        raise ValueError(f"architecture {found} is not supported; supported are {', '.join(MODELS)}")
    if hf_config.model_type != model_class.model_type:  # with settings, and defaults of settings, of another model
        raise ValueError(
            f"config.json names architecture {', '.join(architectures)} and model_type {hf_config.model_type!r}, but "
            f"that of the one is {model_class.model_type!r}"
        )
    if quantization := getattr(hf_config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ValueError(f"quantization {method!r} is not supported; use a checkpoint in float32, bfloat16 or float16")
    if hf_config.hidden_act != "silu":
        raise ValueError(f"hidden_act {hf_config.hidden_act!r} is not supported; supported is silu")
    if getattr(hf_config, "use_sliding_window", False):
        raise ValueError("use_sliding_window is not supported; supported is attention to the whole context")
    return model_class

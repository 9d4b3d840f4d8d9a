"""Qwen3, dense (Qwen team 2025, "Qwen3 Technical Report"): Llama, but queries and keys are normalised head by head."""

import torch
from torch import nn
from transformers import PretrainedConfig

from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import RotaryEmbedding, norm_and_rotate
from nanovllm.utils.ranks import Ranks


class Qwen3Attention(nn.Module):
    def __init__(self, config: PretrainedConfig, ranks: Ranks) -> None:
        super().__init__()
        self.head_dim = config.head_dim  # not hidden_size // num_heads
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_heads, self.num_kv_heads = len(ranks.share(num_heads)), len(ranks.share(num_kv_heads))  # of this rank
        parts = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size, parts, self.head_dim, ranks, bias=config.attention_bias
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim, config.hidden_size, ranks, bias=config.attention_bias
        )
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.attn = Attention(self.num_heads, self.head_dim, self.head_dim**-0.5, self.num_kv_heads)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        qk, v = heads.split_with_sizes([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        qk = norm_and_rotate(qk, self.q_norm, self.k_norm, self.num_heads, cos, sin)
        q, k = qk.split_with_sizes([self.num_heads, self.num_kv_heads], dim=1)
        return self.o_proj(self.attn(q, k, v))


class Qwen3MLP(nn.Module):
    def __init__(self, config: PretrainedConfig, ranks: Ranks) -> None:
        super().__init__()
        size = config.intermediate_size
        parts = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, parts, 1, ranks)
        self.down_proj = RowParallelLinear(size, config.hidden_size, ranks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class Qwen3DecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, ranks: Ranks) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, ranks)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config, ranks)

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """`x`, `[num_tokens, hidden_size]`, is the residual stream, `delta` what the layer before has to add to it.

        Returns what this one has to add. Each norm adds first, in place, because on a GPU that is one kernel with it.
        """
        delta = self.self_attn(self.input_layernorm(x, delta), cos, sin)
        return self.mlp(self.post_attention_layernorm(x, delta))


class Qwen3Model(nn.Module):
    def __init__(self, config: PretrainedConfig, ranks: Ranks) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ranks)
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, ranks) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)  # [num_tokens, hidden_size], the residual stream that every layer adds to
        cos, sin = self.rotary_emb(positions, x.dtype)
        delta = None
        for layer in self.layers:
            delta = layer(x, delta, cos, sin)
        return self.norm(x, delta)


class Qwen3ForCausalLM(nn.Module):
    """Tokens to hidden states, and hidden states to logits: not every token's are wanted, and the head is large."""

    model_type = "qwen3"  # of the config that it is made from

    def __init__(self, config: PretrainedConfig, ranks: Ranks) -> None:
        super().__init__()
        self.model = Qwen3Model(config, ranks)
        self.lm_head = LMHead(self.model.embed_tokens, tied=config.tie_word_embeddings)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`input_ids` and `positions` are `[num_tokens]` int64; returns hidden states, `[num_tokens, hidden_size]`."""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` is `[num_rows, hidden_size]`; returns `[num_rows, vocab_size]`."""
        return self.lm_head(hidden_states)

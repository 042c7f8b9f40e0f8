"""Keys of a checkpoint's ``model_config.yaml`` that fix the shape of the weights.

They, and a few that decide what a model computes, are known, so that a configuration written for NeMo-Aligner may
repeat them, but the checkpoint decides: a value that differs from the checkpoint's is an error
(:func:`nemo_dpo.config.checks.check_model`), for the weights would not fit or would mean something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Shape keys; null means the checkpoint's value, anything else must equal it."""

    max_position_embeddings: int | None = None
    """Longest sequence the model was built for."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention)."""
    kv_channels: int | None = None
    """Width of one attention head."""
    normalization: str | None = None
    """layernorm, layernorm1p or rmsnorm."""
    layernorm_epsilon: float | None = None
    """Epsilon of the norms."""
    bias: bool | None = None
    """Whether linear layers have a bias."""
    qkv_bias: bool | None = None
    """Whether the query/key/value projection alone has a bias (Qwen2)."""
    activation: str | None = None
    """MLP activation, for example gelu or fast-swiglu."""
    bias_activation_fusion: bool | None = None
    """Bias and activation in NeMo's one kernel, which computes GELU by its tanh approximation."""
    position_embedding_type: str | None = None
    """rope or learned_absolute."""
    rotary_percentage: float | None = None
    """Share of a head's channels that RoPE turns."""
    rotary_base: float | None = None
    """Base of RoPE's frequencies."""
    rotary_interleaved: bool | None = None
    """Whether RoPE pairs neighbouring channels."""
    seq_len_interpolation_factor: float | None = None
    """Linear interpolation of RoPE's positions."""
    scale_positional_embedding: bool | None = None
    """Llama 3.1's scaling of RoPE's frequencies."""
    share_embeddings_and_output_weights: bool | None = None
    """Whether the output layer is the embedding (tied)."""
    make_vocab_size_divisible_by: int | None = None
    """Padding unit of the vocabulary."""
    apply_query_key_layer_scaling: bool | None = None
    """Scaling of attention scores by the layer's number."""
    transformer_block_type: str | None = None
    """pre_ln, post_ln or normformer."""
    openai_gelu: bool | None = None
    """GELU in OpenAI's formula."""
    normalize_attention_scores: bool | None = None
    """Division of attention scores by the square root of the head's width."""
    attention_type: str | None = None
    """multihead."""
    headscale: bool | None = None
    """Learned scale per head."""
    window_size: list[int] | None = None
    """Sliding attention window."""
    num_moe_experts: int | None = None
    """Experts of a mixture-of-experts model."""
    moe_router_topk: int | None = None
    """Experts per token."""
    tokenizer: dict[str, Any] | None = None
    """library, type, model, vocab_file, merge_file, use_fast … of the tokenizer in the checkpoint."""

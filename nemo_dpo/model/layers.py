"""What megatron-core lacks: two parts of a transformer layer where Transformer Engine is absent, and GPT-NeoX's layer.

megatron-core's torch norms refuse sequence parallelism and its attention builds the [heads, S, S] matrix of scores;
`Norm` and `CausalAttention` do neither. With Transformer Engine installed neither is used.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from nemo_dpo.parallel.groups import drawing_apart


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the hidden dimension, with megatron-core's constructor.

    Its parameters carry `sequence_parallel`, which is how megatron-core knows to sum their gradients over the tensor
    parallel group when each rank normalises its own slice of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        self.centre = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.centre else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        parameters = [self.weight]
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            parameters.append(self.bias)
        else:
            self.register_parameter("bias", None)
        for parameter in parameters:
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] → [..., hidden]."""
        weight = self.weight + 1 if self.centre else self.weight
        if self.bias is None:
            return F.rms_norm(hidden, self.shape, weight, self.eps)
        return F.layer_norm(hidden, self.shape, weight, self.bias, self.eps)


class CausalAttention(nn.Module):
    """Causal scaled dot-product attention by torch's own kernels, for megatron-core's `core_attention` slot.

    Rows are padded on the right only, so causality alone keeps padding out of every real position: no mask is given.
    With a sliding window (`config.window_size`) a row longer than the window makes one of its own, [S, S].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.window = config.window_size[0] if config.window_size else None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object) -> Tensor:
        """query [S, B, heads, channels], key and value [S, B, groups, channels] → [S, B, heads × channels]."""
        if attention_mask is not None:
            raise ValueError("CausalAttention takes no mask: rows are right-padded and attention is causal")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        seen = self._seen(q)
        # Each tp rank has heads of its own.
        with drawing_apart(self.sequence_parallel) if dropout else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                q, k, v, seen, is_causal=seen is None, scale=self.scale, enable_gqa=True, dropout_p=dropout
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _seen(self, query: Tensor) -> Tensor | None:
        """[S, S] whether a position sees another, with a window shorter than the rows [B, heads, S, channels]."""
        length = query.shape[2]
        if self.window is None or length <= self.window + 1:
            return None
        return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(-self.window)


class ParallelResidualLayer(TransformerLayer):
    """GPT-NeoX's layer: x + attention(norm₁ x) + MLP(norm₂ x), where megatron-core's MLP reads attention's sum."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's layer."""
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        mlp_output_with_bias = self.mlp(self._forward_pre_mlp_layernorm(hidden_states))
        return self._forward_post_mlp(mlp_output_with_bias, attended), context

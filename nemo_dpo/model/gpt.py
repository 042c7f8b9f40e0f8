"""The policy: a megatron-core GPTModel that answers with the log-probs of given tokens instead of logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from nemo_dpo.lora.adapters import sharded as sharded_adapter
from nemo_dpo.lora.spec import POLICY
from nemo_dpo.parallel.vocab_logps import mean_logits, vocab_parallel_logps


class TokenLogps(NamedTuple):
    """What the last pipeline stage returns, one entry a response position."""

    logps: Tensor  # [R] float32
    mean_logits: Tensor  # [R] float32, no gradient: mean over the vocabulary of the logits at that position


def padding_of(tokens: Tensor, response_positions: Tensor) -> Tensor:
    """[rows, S] whether a token is padding: every row ends with its response."""
    rows, length = tokens.shape
    ends = torch.zeros(rows, dtype=torch.int64, device=tokens.device)
    # A response's last token is the one behind the last position that predicts one.
    ends.scatter_reduce_(0, response_positions // length, response_positions % length + 2, "amax")
    return torch.arange(length, device=tokens.device) >= ends[:, None]


class ResponseGPT(GPTModel):
    """GPTModel whose output layer sees response positions only.

    In a preference pair most positions are prompt or padding; projecting them to the vocabulary is wasted work, and
    `[tokens, vocabulary]` is the largest tensor of a step. Here neither happens.
    """

    real_vocab_size: int
    logps_chunk: int
    embedding_scale: float | None = None
    frozen_base = False

    def freeze_base(self) -> None:
        """From here on adapter `POLICY` is what is trained and saved."""
        self.requires_grad_(False)
        self.frozen_base = True

    def sharded_trainable(self, prefix: str = "") -> dict[str, Any]:
        """What is trained, as megatron-core's sharded tensors, keys in the checkpoint behind `prefix`."""
        return sharded_adapter(self, POLICY, prefix) if self.frozen_base else self.sharded_state_dict(prefix=prefix)

    def forward(
        self, tokens: Tensor, position_ids: Tensor, response_positions: Tensor, targets: Tensor
    ) -> Tensor | TokenLogps:  # type: ignore[override]
        """Run this pipeline stage.

        Args:
            tokens: [rows, S] int64, right-padded.
            position_ids: [rows, S] int64.
            response_positions: [R] flat index `row * S + s` of each position whose output predicts a response token.
            targets: [R] the token it predicts.

        Returns:
            Hidden states [S, rows, hidden] (a slice of S under sequence parallelism), or TokenLogps on the last stage.
        """
        padding = None if self.config.num_moe_experts is None else padding_of(tokens, response_positions)
        hidden = self._decode(tokens, position_ids, padding)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        selected = hidden.transpose(0, 1).reshape(-1, hidden.shape[-1]).index_select(0, response_positions)
        if not self.config.sequence_parallel:
            selected = copy_to_tensor_model_parallel_region(selected, group=self.pg_collection.tp)
        return self._token_logps(selected, targets)

    def logits(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """[rows, S] → [rows, S, padded vocabulary / tp], by megatron-core's own forward."""
        return super().forward(tokens, position_ids, None)

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """megatron-core's, with the embedding scaled by a number that, as in Gemma, is rounded to the model's dtype."""
        start, *rest = super()._preprocess(*args, **kwargs)
        if start is not None and self.embedding_scale is not None:
            start = start * torch.tensor(self.embedding_scale, dtype=start.dtype)
        return start, *rest

    def _decode(self, tokens: Tensor, position_ids: Tensor, padding: Tensor | None) -> Tensor:
        start, rotary, *_ = self._preprocess(input_ids=tokens, position_ids=position_ids)
        if self.pre_process and self.frozen_base and torch.is_grad_enabled():
            # Recomputed layers pass a gradient on, to their adapters too, only if their input asks for one.
            start = start.detach().requires_grad_()
        if padding is not None and self.config.sequence_parallel:
            padding = padding.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]
        return self.decoder(hidden_states=start, attention_mask=None, rotary_pos_emb=rotary, padding_mask=padding)

    def _token_logps(self, hidden: Tensor, targets: Tensor) -> TokenLogps:
        weight = self.output_weight()
        shard = dict(
            vocab_start=self.pg_collection.tp.rank() * weight.shape[0],
            vocab_size=self.real_vocab_size,
            group=self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None,
        )
        with torch.no_grad():
            means = mean_logits(hidden.detach(), weight.detach(), **shard)
        return TokenLogps(vocab_parallel_logps(hidden, weight, targets, chunk_tokens=self.logps_chunk, **shard), means)

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [padded vocabulary / tp, hidden]; the embedding's when tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

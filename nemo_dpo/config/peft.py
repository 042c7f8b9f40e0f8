"""The ``model.peft`` section: LoRA adapters. Keys and meanings are NeMo's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class LoraTuningConfig:
    """Shape and start of the trained adapter; null takes the value of the adapter that training starts from."""

    target_modules: list[str] | None = None
    """attention_qkv, attention_dense, mlp_fc1, mlp_fc2, attention, mlp, all; null is attention_qkv if new."""
    adapter_dim: int | None = None
    """Rank; null is 32 for a new adapter."""
    alpha: float | None = None
    """The update is multiplied by alpha / adapter_dim; null is adapter_dim for a new adapter, as in NeMo."""
    variant: str | None = None
    """nemo: one A for q, k and v, one for gate and up; canonical: an A each, as PEFT has; null is nemo if new."""
    layer_selection: list[int] | None = None
    """Numbers of the adapted layers, from 1; null is all of them for a new adapter."""
    adapter_dropout: float = 0.0
    """Dropout of the adapter."""
    dropout_position: str = "post"
    """post: dropout of what the adapter adds; pre: of what it reads, as in PEFT."""
    column_init_method: str = "xavier"
    """Start of A: xavier, kaiming, normal or zero."""
    row_init_method: str = "zero"
    """Start of B; anything but zero starts away from the reference."""

    @property
    def of_new(self) -> LoraTuningConfig:
        """The values of a new adapter, NeMo's, where a key is null."""
        rank = self.adapter_dim or 32
        return replace(
            self,
            target_modules=self.target_modules or ["attention_qkv"],
            adapter_dim=rank,
            alpha=self.alpha or float(rank),
            variant=self.variant or "nemo",
        )


@dataclass(frozen=True)
class PeftConfig:
    """Adapters beside frozen weights."""

    peft_scheme: str | None = "none"
    """lora trains an adapter, none all weights."""
    restore_from_path: str | None = None
    """Adapter .nemo that training starts from, for example the SFT adapter."""
    base_quantization: str | None = None
    """nf4 keeps the frozen linear layers in four bits (QLoRA, arXiv:2305.14314; needs bitsandbytes); null does not."""
    frozen_adapters: dict[str, str] = field(default_factory=dict)
    """Name → adapter .nemo, loaded beside the trained one for model.dpo.reference.kind=adapter:<name>."""
    lora_tuning: LoraTuningConfig = field(default_factory=LoraTuningConfig)
    """Shape and start of the trained adapter."""

    @property
    def lora(self) -> bool:
        return self.peft_scheme == "lora"


def stage_without_adapter(selected: Collection[int], layers: int, chunks: int) -> str:
    """What is wrong with adapters on the layers `selected` (from 1) of so many, in `chunks` equal runs; "" if nothing.

    A rank, or a chunk of interleaved stages, that has nothing to train cannot be saved or resumed by megatron-core.
    """
    size = layers // chunks
    for first in range(1, layers + 1, size):
        if not any(first <= layer < first + size for layer in selected):
            return (
                f"layers {first} to {first + size - 1} have no adapter and are a pipeline stage of their own; adapt "
                "one of them too, or lower model.pipeline_model_parallel_size (× virtual_pipeline_model_parallel_size)"
            )
    return ""

"""Adapters with random values, for the tests of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dpo.convert.adapter_nemo import dimensions_of
from nemo_dpo.lora.file import AdapterFile
from nemo_dpo.lora.spec import TARGETS, LoraSpec

ALL = TARGETS["all"]
# Grouped queries whose heads are not hidden / heads wide, so that no two sizes are alike.
CONFIG: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 40,
    "ffn_hidden_size": 56,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "position_embedding_type": "rope",
    "mcore_gpt": True,
    "bias": False,
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 2,
}
SPECS = {
    "nemo, all": LoraSpec(ALL, 4, 8.0),
    "canonical, all": LoraSpec(ALL, 4, 8.0, "canonical"),
    "nemo, qkv of some layers": LoraSpec(("linear_qkv",), 2, 3.5, "nemo", (0, 2)),
    "canonical, fc1 of one layer": LoraSpec(("linear_fc1",), 1, 1.0, "canonical", (1,)),
}


def random_adapter(
    spec: LoraSpec, config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32, **fields: Any
) -> AdapterFile:
    """Every tensor of `spec` with values of its own."""
    generator = torch.Generator().manual_seed(3)
    shapes = spec.shapes(dimensions_of(config))
    tensors = {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    return AdapterFile(spec, tensors, **fields)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert left and left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def entries(folder: Path) -> set[str]:
    """What a folder holds, hidden files too."""
    return {entry.name for entry in folder.iterdir()}

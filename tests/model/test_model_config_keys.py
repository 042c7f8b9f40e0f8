"""Keys of model_config.yaml that no converted model has: with weights rewritten to fit, transformers' logits stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_dpo.checkpoint import archive
from nemo_dpo.checkpoint.weights import Chunk, read_weights, write_weights
from nemo_dpo.parallel.groups import Layout
from tests.model.model_cases import Case, build, logits_step, random_tokens, tokens_only
from tests.model.test_logits import TOLERANCE, hf_logits
from tests.support.ranks import run_ranks
from tests.support.tiny import SHAPE, VOCABULARY

LENGTH = 24


def as_it_is(_name: str, tensor: Tensor) -> Tensor:
    return tensor


def neighbours_paired(name: str, tensor: Tensor) -> Tensor:
    """Channels i and i + half of each query and key head side by side, where interleaved RoPE looks for them."""
    if "linear_qkv.weight" not in name:
        return tensor
    layers, rows, hidden = tensor.shape
    size, queries = SHAPE["head_dim"], SHAPE["num_attention_heads"] // SHAPE["num_key_value_heads"]
    heads = tensor.reshape(layers, -1, queries + 2, size, hidden).clone()
    order = torch.arange(size).view(2, -1).t().reshape(-1)
    heads[:, :, :-1] = heads[:, :, :-1][:, :, :, order]  # all but the value head
    return heads.reshape(layers, rows, hidden)


def less_one(name: str, tensor: Tensor) -> Tensor:
    """Scales of norms as zero-centred ones store them."""
    return tensor - 1 if "norm" in name else tensor


# Keys of model_config.yaml, what becomes of the weights, and what transformers is told.
CASES: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Tensor], dict[str, Any]]] = {
    "rotary_interleaved": ({"rotary_interleaved": True}, neighbours_paired, {}),
    "zero-centred RMSNorm": ({"layernorm_zero_centered_gamma": True}, less_one, {}),
    "openai_gelu, gated": ({"openai_gelu": True}, as_it_is, {"hidden_act": "gelu_pytorch_tanh"}),
}


def rewritten(case: Case, folder: Path, name: str, *, told: bool) -> Path:
    """The extracted `.nemo` of `case` with the weights of CASES[name], and with its keys if the model is told."""
    keys, change, _ = CASES[name]
    weights = read_weights(case.nemo / archive.MODEL_WEIGHTS)
    shutil.copytree(case.nemo, folder, ignore=shutil.ignore_patterns(archive.MODEL_WEIGHTS))
    write_weights(folder / archive.MODEL_WEIGHTS, (Chunk(key, change(key, tensor)) for key, tensor in weights.items()))
    archive.write_model_config({**archive.read_model_config(folder), **(keys if told else {})}, folder)
    return folder


def logits_of_rank(_rank: int, folders: dict[tuple[str, bool], Path], layout: Layout) -> dict[tuple[str, bool], Tensor]:
    batch = tokens_only(random_tokens(2, LENGTH))
    return {case: build(nemo, layout).forward_only([batch], logits_step)[0] for case, nemo in folders.items()}


@pytest.fixture(scope="module")
def logits(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Tensor]:
    """(case, whether model_config.yaml has its key) → [2, LENGTH, vocabulary], by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("rewritten")
    folders = {
        (name, told): rewritten(cases["gqa_tied"], folder / f"{n}{told}", name, told=told)
        for n, name in enumerate(CASES)
        for told in (True, False)
    }
    shards = run_ranks(2, logits_of_rank, tmp_path_factory.mktemp("ranks"), folders, Layout(2, tp=2))
    return {case: torch.cat([shard[case] for shard in shards], dim=-1)[..., :VOCABULARY] for case in folders}


@pytest.mark.parametrize("name", CASES)
def test_logits_stay_hugging_faces(cases: dict[str, Case], logits: dict[tuple[str, bool], Tensor], name: str) -> None:
    expected = hf_logits(cases["gqa_tied"], LENGTH, **CASES[name][2])
    size = expected.abs().max()
    assert (logits[name, True] - expected).abs().max() <= TOLERANCE * size
    assert (logits[name, False] - expected).abs().max() > 1000 * TOLERANCE * size

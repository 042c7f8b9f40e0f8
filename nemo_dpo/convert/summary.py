"""What a checkpoint is: family, sizes, parameters, tokenizer, layout and hash, as a table or as JSON."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from nemo_dpo.checkpoint import archive
from nemo_dpo.checkpoint.fingerprint import chunks_hash
from nemo_dpo.convert.opened import HfFolder, Opened, open_checkpoint
from nemo_dpo.model.nemo_keys import completed
from nemo_dpo.tokenizer import TokenizerError

SIZES = {
    "layers": "num_layers", "hidden size": "hidden_size", "MLP size": "ffn_hidden_size",
    "attention heads": "num_attention_heads", "query groups": "num_query_groups", "head size": "kv_channels",
    "vocabulary": "vocab_size", "positions": "max_position_embeddings",
    "tied embeddings": "share_embeddings_and_output_weights", "rotary base": "rotary_base",
}  # fmt: skip


def summarise(path: Path, *, hashed: bool = True) -> dict[str, Any]:
    """Facts about the checkpoint at `path`, by their titles.

    Args:
        path: a Hugging Face folder, a GGUF file, a `.nemo` archive or an extracted one.
        hashed: also name its weights, for which all of them are read.

    Raises:
        CheckpointError: it cannot be read, or is of no supported family.
    """
    with open_checkpoint(path) as opened:
        entries = opened.entries()
        by_dtype: Counter[str] = Counter()
        for entry in entries:
            by_dtype[str(entry.dtype).removeprefix("torch.")] += math.prod(entry.shape)
        facts = {
            "format": opened.kind,
            "family": opened.family.model_type,
            **{title: opened.config.get(key) for title, key in SIZES.items()},
            **_experts(opened),
            "parameters": sum(by_dtype.values()),
            "parameters by dtype": dict(by_dtype),
            **({"expanded from": opened.expanded} if opened.expanded else {}),
            "bytes": sum(entry.nbytes for entry in entries),
            "tokenizer": _tokenizer(opened),
            **_layout(opened),
        }
        if hashed:
            facts["hash"] = chunks_hash(opened.chunks())
    return facts


def _experts(opened: Opened) -> dict[str, Any]:
    experts = opened.config.get("num_moe_experts")
    chosen = completed(opened.config)["moe_router_topk"]
    return {"experts": {"each layer": experts, "each token": chosen}} if experts else {}


def as_table(facts: dict[str, Any]) -> str:
    """The facts as two columns of plain text."""
    width = max(map(len, facts))
    return "\n".join(f"{title:<{width}}  {_cell(value)}" for title, value in facts.items())


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tokenizer(opened: Opened) -> dict[str, Any] | str:
    try:
        tokenizer = opened.tokenizer()
    except TokenizerError as error:
        return f"none ({error})"
    return {"tokens": tokenizer.vocab_size, "end": tokenizer.eos_id, "files": tokenizer.fingerprint[:12]}


def _layout(opened: Opened) -> dict[str, Any]:
    if isinstance(opened, HfFolder):
        return {"files": len(opened.weights.files)}
    stated = archive.read_model_config(opened.path)  # of an older layout `opened.config` is what it was rewritten to
    layout = {
        "tensor": stated.get("tensor_model_parallel_size") or 1,
        "pipeline": stated.get("pipeline_model_parallel_size") or 1,
        "virtual pipeline": stated.get("virtual_pipeline_model_parallel_size"),
        "sequence": bool(stated.get("sequence_parallel")),
        **({"expert": stated.get("expert_model_parallel_size") or 1} if stated.get("num_moe_experts") else {}),
    }
    return {"trained parallel": layout, "rows of the vocabulary": opened.weights.shape(_embedding(opened))[0]}


def _embedding(opened: Opened) -> str:
    return f"model.{opened.table.rules[0].nemo}"

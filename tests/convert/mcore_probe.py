"""Run in a process of its own by test_mcore.py: megatron-core itself loads and saves converted checkpoints.

Arguments: folders, each with `nemo/` (an extracted .nemo) and `hf/` (what it was made from); another checkpoint is
saved beside them. Builds plain `GPTModel`s from model_config.yaml, without nemo_dpo's own model code, and prints what
was found as one JSON object, folder name → findings.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_dpo.checkpoint.archive import read_model_config
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.parallel import cpu_host


def build(config: dict[str, Any], rows: int) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    transformer = TransformerConfig(
        num_layers=config["num_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["ffn_hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_query_groups"],
        kv_channels=config["kv_channels"],
        layernorm_epsilon=config["layernorm_epsilon"],
        add_bias_linear=config["bias"],
        add_qkv_bias=config["qkv_bias"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    scaling = config["rope_scaling"]
    return GPTModel(
        transformer,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=rows,
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=config["rotary_base"],
        rope_scaling=scaling is not None,
        rope_scaling_factor=scaling["factor"] if scaling else 8.0,
        seq_len_interpolation_factor=config["seq_len_interpolation_factor"],
        share_embeddings_and_output_weights=config["share_embeddings_and_output_weights"],
    ).eval()


def sharded(model: Any) -> dict[str, Any]:
    """The tensors of a model under the prefix of a .nemo, without Transformer Engine's extra objects."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    parts = model.sharded_state_dict(prefix="model.")
    return {name: part for name, part in parts.items() if not isinstance(part, ShardedObject)}


def load(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(sharded(model), str(folder), strict="raise_all")
    own = {name.removeprefix("model."): value for name, value in loaded.items()}
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing), (missing, unexpected)


def start(scratch: Path) -> None:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    cpu_host.install()
    filesystem_async._results_queue = queue.SimpleQueue()  # no helper process for one small save
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def probe(folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from transformers import AutoModelForCausalLM

    nemo, hf, saved = folder / "nemo", folder / "hf", folder / "saved"
    config, weights = read_model_config(nemo), read_weights(nemo / "model_weights")
    rows = weights.shape("model.embedding.word_embeddings.weight")[0]

    model = build(config, rows)
    load(model, nemo / "model_weights")
    tokens = torch.arange(3, 43)[None]
    mask = torch.triu(torch.ones(1, 1, 40, 40, dtype=torch.bool), 1)
    with torch.no_grad():
        logits = model(tokens, torch.arange(40)[None], mask)[..., : config["vocab_size"]]
        expected = AutoModelForCausalLM.from_pretrained(hf).eval()(tokens).logits

    saved.mkdir()
    dist_checkpointing.save(sharded(model), str(saved))
    again = read_weights(saved)

    wider = build(config, rows + 128)
    load(wider, nemo / "model_weights")
    embedding = wider.embedding.word_embeddings.weight
    return {
        "max_difference": (logits - expected).abs().max().item(),
        "largest_logit": expected.abs().max().item(),
        "same_keys": set(again) == set(weights),
        "same_shapes": all(again.shape(name) == weights.shape(name) for name in weights),
        "same_values": all(torch.equal(again[name], weights[name]) for name in weights),
        "wider_keeps_rows": torch.equal(embedding[:rows], model.embedding.word_embeddings.weight),
        "wider_pads_zeros": not embedding[rows:].any(),
    }


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    start(folders[0])
    print(json.dumps({folder.name: probe(folder) for folder in folders}))
    sys.stdout.flush()
    os._exit(0)  # tearing the process group down takes seconds

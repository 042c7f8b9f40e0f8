"""Tiny random models of every supported kind, and a rank's part of what the tests ask of them.

Expected numbers come from transformers' forward pass and autograd, in the tests' own process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nemo_dpo.data.batch import MicroBatch, collate
from nemo_dpo.data.types import TokenPair
from tests.support.tiny import SHAPE, VOCABULARY, byte_tokenizer

BETA = 0.3
PAD_ID = SHAPE["pad_token_id"]
SIZES = (2, 1)  # pairs of the two micro-batches: a mean of their means would weigh the pairs unequally
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# GPT-2's names of the same sizes; its dropout, on by default, would hide what is compared.
GPT2 = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")),
    **dict.fromkeys(("num_key_value_heads", "max_position_embeddings")),
    **{"n_embd": 64, "n_inner": 128, "n_layer": 4, "n_head": 4, "n_positions": 256},
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
PLAIN_HEADS = dict.fromkeys(("num_key_value_heads", "head_dim"))  # GPT-NeoX has neither key
# Case → (model type, changes to the tiny Llama; None takes the key away).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa_tied": ("llama", {}),
    "untied_head_dim_not_hidden_over_heads": ("llama", {"tie_word_embeddings": False, "head_dim": 24}),
    # 400 positions, so that the slow rotations, which the scaling slows down, turn at all.
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 512}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "qwen2_qkv_bias": ("qwen2", {"head_dim": None}),
    # A window that the rows are longer than: 24 positions, and 27 of the longest response.
    "mistral_window": ("mistral", {"sliding_window": 5, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gpt_neox": ("gpt_neox", {**PLAIN_HEADS, "tie_word_embeddings": False}),
    "gpt_neox_one_after_the_other": ("gpt_neox", {**PLAIN_HEADS, "use_parallel_residual": False}),
    "gpt2": ("gpt2", GPT2),
    "gemma": ("gemma", {"head_dim": 24}),
    "starcoder2": ("starcoder2", {"head_dim": None}),
    "nemotron": ("nemotron", {"head_dim": 24, "tie_word_embeddings": False}),
}


@dataclass(frozen=True)
class Case:
    """A model as Hugging Face folder and as the folder of its extracted `.nemo`."""

    hf: Path
    nemo: Path


def make_case(folder: Path, kind: str = "llama", changes: Mapping[str, Any] | None = None) -> Case:
    """Write a random model as in CASES; no parameter keeps a tell-tale initial value."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_dpo.checkpoint import archive
    from nemo_dpo.convert import hf_to_nemo

    settings = {key: value for key, value in {**SHAPE, **(changes or {})}.items() if value is not None}
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            start, spread = (parameter, 0.2) if parameter.dim() == 1 else (torch.zeros_like(parameter), 0.15)
            parameter.copy_(start + spread * torch.randn(parameter.shape))
    case = Case(folder / "hf", folder / "nemo")
    model.save_pretrained(case.hf)
    byte_tokenizer().save_pretrained(case.hf)
    hf_to_nemo(case.hf, folder / "model.nemo", precision="32")
    archive.extract(folder / "model.nemo", case.nemo)
    return case


def random_tokens(rows: int, length: int) -> Tensor:
    """[rows, length] token ids; the first and the last of the vocabulary are among them."""
    tokens = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))
    tokens[0, :2] = torch.tensor([0, VOCABULARY - 1])
    return tokens


def random_batches(sizes: Sequence[int], multiple: int = 1) -> list[MicroBatch]:
    """Micro-batches of one shape with `sizes` pairs of random tokens whose lengths differ.

    None is the padding token: transformers' embedding keeps its gradient at zero.
    """
    generator = np.random.default_rng(11)

    def tokens(least: int, most: int) -> Any:
        return generator.integers(0, PAD_ID, generator.integers(least, most)).astype(np.int32)

    pairs = [TokenPair(n, tokens(1, 9), tokens(1, 20), tokens(1, 20), 1.0, 0.0) for n in range(sum(sizes))]
    starts = np.cumsum([0, *sizes])
    longest = max(pair.longest for pair in pairs)
    return [
        collate(pairs[a:b], pad_id=PAD_ID, length=longest, multiple=multiple, rows=2 * max(sizes))
        for a, b in itertools.pairwise(starts)
    ]


def reference_logps(batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Made-up log-probs [N] of a reference, which put the losses of the pairs at different places."""
    generator = torch.Generator().manual_seed(13)
    return [-80.0 + 4 * torch.randn(batch.num_responses, generator=generator) for batch in batches]


def build(nemo: Path, layout: Any, prepare: Callable[[list[Any]], object] | None = None, **options: Any) -> Any:
    """The engine of an extracted `.nemo` under `layout`, on this process's ranks; `prepare` sees its chunks before."""
    from nemo_dpo.checkpoint import archive, sharded
    from nemo_dpo.config.schema import OptimConfig
    from nemo_dpo.model.architecture import Architecture
    from nemo_dpo.model.build import BuildOptions, build_model
    from nemo_dpo.parallel import cpu_host
    from nemo_dpo.parallel.engine import Engine
    from nemo_dpo.parallel.groups import initialize

    cpu_host.install()
    groups = initialize(layout, torch.device("cpu"), seed=1)
    arch = Architecture.parse(archive.read_model_config(nemo))
    chunks, config = build_model(arch, groups, BuildOptions(dtype=torch.float32, **options))
    sharded.load_weights(nemo / archive.MODEL_WEIGHTS, chunks)
    if prepare:
        prepare(chunks)
    return Engine(chunks, config, groups, OptimConfig(name="sgd", lr=0.1, weight_decay=0.0))


def logits_step(iterator: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Any, Any]:
    """A forward step that collects megatron-core's own logits, this rank's columns."""
    batch = next(iterator)
    output = chunk.logits(batch.tokens, batch.position_ids)  # type: ignore[operator]
    return output, lambda logits: (logits.sum(), torch.zeros((), dtype=torch.int), logits.clone())


def findings_of_rank(
    _rank: int, nemo_folders: dict[str, Path], layout: Any, lengths: dict[str, int], out: Path
) -> dict[str, dict[str, Any]]:
    """Case → this rank's part of logits, log-probs, loss and gradient, and of the model itself."""
    found = {}
    for name, nemo in nemo_folders.items():
        engine = build(nemo, layout)
        logits = engine.forward_only([tokens_only(random_tokens(2, lengths[name]))], logits_step)
        weights = dict(engine.chunks[0].named_parameters())
        found[name] = {
            "logits": logits[0] if logits else None,
            "layers": len(engine.chunks[0].decoder.layers),
            "qkv": list(weights["decoder.layers.0.self_attention.linear_qkv.weight"].shape),
            **training_step(engine, out / name),
        }
    return found


def tokens_only(tokens: Tensor) -> MicroBatch:
    """A micro-batch of `tokens` without pairs."""
    empty = torch.zeros(0, dtype=torch.int64)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return MicroBatch(
        tokens, positions, empty, empty, empty, empty.view(0, 2), empty, torch.zeros(0, 2), tokens.numel()
    )


def training_step(engine: Any, out: Path) -> dict[str, Any]:
    """One forward and backward pass of the DPO loss; the gradients are written to `out` as a model's weights are."""
    from nemo_dpo.checkpoint import sharded
    from nemo_dpo.config.schema import DpoConfig
    from nemo_dpo.losses import build_objective
    from nemo_dpo.metrics.preference import finalize
    from nemo_dpo.parallel.response import collect_logps
    from nemo_dpo.training.step import objective_step

    batches = random_batches(SIZES, multiple=engine.groups.layout.tp)
    logps = engine.forward_only(batches, collect_logps)
    objective = build_objective(DpoConfig(ref_policy_kl_penalty=BETA))
    references = reference_logps(batches) if logps else []
    outcomes = engine.forward_backward(batches, objective_step(objective, references))
    engine.optimizer.prepare_grads()
    norm = engine.optimizer.get_grad_norm()
    with torch.no_grad():
        for parameter in engine.trainable:
            parameter.copy_(parameter.main_grad)
    sharded.save_weights(out, engine)
    return {
        "logps": logps,
        "loss": finalize(torch.stack([o.sums for o in outcomes]).sum(0))["loss"] if outcomes else None,
        "grad_norm": float(norm),
    }

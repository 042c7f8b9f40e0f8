"""GPT models of NeMo 1.x without NeMo: random weights, its files for any layout of ranks, and what it computes.

Weights are kept as what they mean (one head's query, the gate, …). `write` lays them out as NeMo 1.x does, `logits`
computes with the parts themselves in float64: nothing here is shared with the converter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

LAYERS, HIDDEN, HEADS, CHANNELS, FFN, VOCABULARY, POSITIONS = 4, 48, 4, 16, 40, 301, 64
BASE: dict[str, Any] = {
    "mcore_gpt": False,
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "kv_channels": CHANNELS,
    "encoder_seq_length": POSITIONS,
    "max_position_embeddings": POSITIONS,
    "layernorm_epsilon": 1e-5,
    "override_vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "tokenizer": {"library": "sentencepiece", "model": "nemo:" + "0" * 32 + "_tokenizer.model"},
}
ROPE = {"position_embedding_type": "rope"}
UNTIED = {"share_embeddings_and_output_weights": False}
UNFUSED = {"bias_activation_fusion": False}
CASES: dict[str, dict[str, Any]] = {
    "gpt_2b_001": {
        "activation": "fast-swiglu",
        "bias": False,
        "normalization": "layernorm1p",
        "rotary_percentage": 0.5,
        **ROPE, **UNTIED, **UNFUSED,
    },
    "gpt3": {"activation": "gelu"},
    "gpt3_unfused": {"activation": "gelu", **UNFUSED},
    "split_gate": {
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "megatron_amp_O2": True,
        **ROPE, **UNTIED, **UNFUSED,
    },
    "split_gate_gelu": {"activation": "geglu", "normalization": "layernorm1p", **ROPE, **UNFUSED},
    "fused_gelu": {"activation": "fast-geglu", "bias_gelu_fusion": True, **UNTIED},
    "squared_relu": {"activation": "squared-relu", "bias": False, **ROPE, **UNFUSED},
}  # fmt: skip


@dataclass(frozen=True)
class OldModel:
    """A random model: tensors by part, `layers[n]["q"]` … [heads, channels, hidden]."""

    config: dict[str, Any]
    outer: dict[str, Tensor] = field(default_factory=dict)
    layers: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def bias(self) -> bool:
        return bool(self.config.get("bias", True))

    @property
    def gated(self) -> bool:
        return str(self.config["activation"]).endswith("glu")


def random_model(case: str, seed: int = 3) -> OldModel:
    """No parameter keeps a tell-tale initial value; every logit matters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.25

    model = OldModel({**BASE, **CASES[case]})
    norm_bias = model.config.get("normalization") != "rmsnorm"
    start = 0.0 if model.config.get("normalization") == "layernorm1p" else 1.0
    for _ in range(LAYERS):
        layer = {name: draw(HEADS, CHANNELS, HIDDEN) for name in ("q", "k", "v")}
        layer |= {"o": draw(HIDDEN, HEADS, CHANNELS), "up": draw(FFN, HIDDEN), "down": draw(HIDDEN, FFN)}
        layer |= {"gate": draw(FFN, HIDDEN)} if model.gated else {}
        layer |= {"norm1": start + draw(HIDDEN), "norm2": start + draw(HIDDEN)}
        layer |= {"norm1_bias": draw(HIDDEN), "norm2_bias": draw(HIDDEN)} if norm_bias else {}
        if model.bias:
            layer |= {f"{name}_bias": draw(HEADS, CHANNELS) for name in ("q", "k", "v")}
            layer |= {"o_bias": draw(HIDDEN), "up_bias": draw(FFN), "down_bias": draw(HIDDEN)}
            layer |= {"gate_bias": draw(FFN)} if model.gated else {}
        model.layers.append(layer)
    model.outer.update({"embedding": 2 * draw(VOCABULARY, HIDDEN), "norm": start + draw(HIDDEN)})
    if norm_bias:
        model.outer["norm_bias"] = draw(HIDDEN)
    if model.config.get("position_embedding_type") != "rope":
        model.outer["positions"] = draw(POSITIONS, HIDDEN)
    if not model.config.get("share_embeddings_and_output_weights", True):
        model.outer["head"] = draw(VOCABULARY, HIDDEN)
    return model


def write(model: OldModel, folder: Path, tp: int, pp: int) -> Path:
    """The extracted `.nemo` that NeMo 1.x would have saved from tp × pp ranks, without its tokenizer."""
    for stage in range(pp):
        for rank in range(tp):
            state = rank_state(model, rank, tp, stage, pp)
            if model.config.get("megatron_amp_O2"):
                state = {name.replace("model.", "model.module.", 1): tensor for name, tensor in state.items()}
            place = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}"
            target = folder if (tp, pp) == (1, 1) else folder / place
            target.mkdir(parents=True, exist_ok=True)
            torch.save(state, target / "model_weights.ckpt")
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    (folder / "model_config.yaml").write_text(yaml.safe_dump({**model.config, **sizes}))
    return folder


def rank_state(model: OldModel, rank: int, tp: int, stage: int, pp: int) -> dict[str, Tensor]:
    """What one rank saves; layers are counted from the stage's first."""
    top, state = "model.language_model.", {}
    divisor = model.config["make_vocab_size_divisible_by"]
    rows = -(-VOCABULARY // (divisor * tp)) * divisor

    def vocabulary(name: str) -> Tensor:
        padded = torch.full((rows * tp, HIDDEN), 7.0)  # whatever training made of rows that no token has
        padded[:VOCABULARY] = model.outer[name]
        return padded[rank * rows : (rank + 1) * rows].clone()

    if stage == 0:
        state[f"{top}embedding.word_embeddings.weight"] = vocabulary("embedding")
        if "positions" in model.outer:
            state[f"{top}embedding.position_embeddings.weight"] = model.outer["positions"]
    if "positions" not in model.outer:
        state[f"{top}rotary_pos_emb.inv_freq"] = torch.ones(4)
    per_stage = LAYERS // pp
    for number in range(per_stage):
        layer = model.layers[stage * per_stage + number]
        prefix = f"{top}encoder.layers.{number}."
        state |= {prefix + name: tensor for name, tensor in layer_state(model, layer, rank, tp).items()}
    if stage == pp - 1:
        state[f"{top}encoder.final_layernorm.weight"] = model.outer["norm"]
        if "norm_bias" in model.outer:
            state[f"{top}encoder.final_layernorm.bias"] = model.outer["norm_bias"]
        if "head" in model.outer:
            state[f"{top}output_layer.weight"] = vocabulary("head")
        elif pp > 1:
            state["model.word_embeddings.weight"] = vocabulary("embedding")
    return state


def layer_state(model: OldModel, layer: dict[str, Tensor], rank: int, tp: int) -> dict[str, Tensor]:
    """One rank's part of a layer, by the names within it."""
    heads = range(rank * HEADS // tp, (rank + 1) * HEADS // tp)
    ffn = slice(rank * FFN // tp, (rank + 1) * FFN // tp)
    state = {"input_layernorm.weight": layer["norm1"], "post_attention_layernorm.weight": layer["norm2"]}
    if "norm1_bias" in layer:
        state |= {"input_layernorm.bias": layer["norm1_bias"], "post_attention_layernorm.bias": layer["norm2_bias"]}
    for kind, ending in [("weight", ""), ("bias", "_bias")] if model.bias else [("weight", "")]:
        # head by head: its query, its key, its value
        by_head = [layer[part + ending][head] for head in heads for part in ("q", "k", "v")]
        state[f"self_attention.query_key_value.{kind}"] = torch.cat(by_head)
        up = layer["up" + ending][ffn].clone()
        if not model.gated:
            state[f"mlp.dense_h_to_4h.{kind}"] = up
        elif model.config["activation"].startswith("fast-"):
            state[f"mlp.dense_h_to_4h.{kind}"] = torch.cat([layer["gate" + ending][ffn], up])
        else:
            state[f"mlp.dense_h_to_4h.{kind}"] = layer["gate" + ending][ffn].clone()
            state[f"mlp.dense_h_to_4h_2.{kind}"] = up
    state["self_attention.dense.weight"] = layer["o"][:, heads.start : heads.stop].reshape(HIDDEN, -1)
    state["mlp.dense_4h_to_h.weight"] = layer["down"][:, ffn].clone()
    if model.bias:
        state |= {"self_attention.dense.bias": layer["o_bias"], "mlp.dense_4h_to_h.bias": layer["down_bias"]}
    return state


def logits(model: OldModel, tokens: Tensor) -> Tensor:
    """tokens [rows, S] → logits [rows, S, vocabulary] of NeMo 1.x's GPT, in float64."""
    outer = {name: tensor.double() for name, tensor in model.outer.items()}
    hidden = outer["embedding"][tokens]
    if "positions" in outer:
        hidden = hidden + outer["positions"][: tokens.shape[1]]
    for single in model.layers:
        layer = {name: tensor.double() for name, tensor in single.items()}
        hidden = hidden + attention(model, layer, normalized(model, hidden, layer, "norm1"))
        hidden = hidden + mlp(model, layer, normalized(model, hidden, layer, "norm2"))
    return normalized(model, hidden, outer, "norm") @ outer.get("head", outer["embedding"]).T


def normalized(model: OldModel, x: Tensor, parts: dict[str, Tensor], name: str) -> Tensor:
    kind, epsilon = model.config.get("normalization", "layernorm"), model.config["layernorm_epsilon"]
    if kind == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * parts[name]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return scaled * (parts[name] + (1.0 if kind == "layernorm1p" else 0.0)) + parts[f"{name}_bias"]


def attention(model: OldModel, layer: dict[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = (
        torch.einsum("rsh,nch->rnsc", x, layer[name]) + layer.get(f"{name}_bias", torch.zeros(1, 1))[:, None]
        for name in ("q", "k", "v")
    )
    if model.config.get("position_embedding_type") == "rope":
        q, k = rotated(model, q), rotated(model, k)
    length = x.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(CHANNELS)).masked_fill(future, -math.inf)
    return torch.einsum("rnsc,hnc->rsh", scores.softmax(-1) @ v, layer["o"]) + layer.get("o_bias", 0.0)


def rotated(model: OldModel, x: Tensor) -> Tensor:
    """The first channels turned, channel i with channel i + half; the others left."""
    turned = int(CHANNELS * model.config.get("rotary_percentage", 1.0))
    half = turned // 2
    angles = torch.arange(x.shape[-2])[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    a, b, rest = x[..., :half], x[..., half:turned], x[..., turned:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)


def mlp(model: OldModel, layer: dict[str, Tensor], x: Tensor) -> Tensor:
    activation = ACTIVATIONS[str(model.config["activation"]).removeprefix("fast-")]
    # By default NeMo adds the bias in a kernel that has another formula of GELU.
    if activation is gelu and model.config.get("bias_activation_fusion", True):
        activation = tanh_gelu
    inner = x @ layer["up"].T + layer.get("up_bias", 0.0)
    gate = x @ layer["gate"].T + layer.get("gate_bias", 0.0) if model.gated else inner
    inner = activation(gate) * (inner if model.gated else 1.0)
    return inner @ layer["down"].T + layer.get("down_bias", 0.0)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": lambda x: x * torch.sigmoid(x),
    "gelu": gelu,
    "geglu": gelu,
    "squared-relu": lambda x: x.clamp(min=0).square(),
}


def random_tokens() -> Tensor:
    tokens = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    tokens[0, :2] = torch.tensor([0, VOCABULARY - 1])
    return tokens


def logits_of_rank(_rank: int, folders: dict[str, Path]) -> dict[str, Tensor]:
    """Name → logits [rows, S, vocabulary] of this package's model on one process, in fp32."""
    from nemo_dpo.parallel.groups import Layout
    from tests.model.model_cases import build, logits_step, tokens_only

    found = {}
    for name, folder in folders.items():
        engine = build(folder, Layout(1))
        (found[name],) = engine.forward_only([tokens_only(random_tokens())], logits_step)
    return {name: tensor[..., :VOCABULARY] for name, tensor in found.items()}

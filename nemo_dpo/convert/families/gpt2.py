"""GPT-2: learned positions, LayerNorm and projections with biases, weights kept as [inputs, outputs] (Conv1D), tied."""

from __future__ import annotations

from typing import Any

from nemo_dpo.convert.families.common import (
    ATTENTION_NORM,
    COMMON,
    FC1,
    FC2,
    FINAL_NORM,
    MLP_NORM,
    POSITIONS,
    PROJ,
    QKV,
    WORDS,
    linear,
    norm,
    one_dropout,
    with_head,
)
from nemo_dpo.convert.family import Family, Key
from nemo_dpo.convert.rules import Copy, PaddedVocab, Param, Rule, StackedQkv, Table

EMBEDDING = Param("transformer.wte.weight", "vocab hidden")
HEAD = Param("lm_head.weight", "vocab hidden")
LAYER = "transformer.h.{layer}"

KEYS = (
    Key("n_layer", "num_layers", 12),
    Key("n_embd", "hidden_size", 768),
    Key("n_inner", "ffn_hidden_size", None),
    Key("n_head", "num_attention_heads", 12),
    Key("vocab_size", "vocab_size", 50257),
    Key("n_positions", "max_position_embeddings", 1024),
    Key("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
    Key("initializer_range", "init_method_std", 0.02),
    Key("resid_pdrop", "hidden_dropout", 0.1),
    Key("attn_pdrop", "attention_dropout", 0.1),
    Key("tie_word_embeddings", "share_embeddings_and_output_weights", True),
)
WEIGHTS: tuple[Rule, ...] = (
    PaddedVocab(WORDS, (EMBEDDING,)),
    Copy(POSITIONS, (Param("transformer.wpe.weight", "positions hidden"),)),
    *norm(ATTENTION_NORM, f"{LAYER}.ln_1"),
    StackedQkv(f"{QKV}.weight", (Param(f"{LAYER}.attn.c_attn.weight", "qkv hidden", transposed=True),)),
    StackedQkv(f"{QKV}.bias", (Param(f"{LAYER}.attn.c_attn.bias", "qkv"),)),
    *linear(PROJ, f"{LAYER}.attn.c_proj", "hidden q", transposed=True),
    *norm(MLP_NORM, f"{LAYER}.ln_2"),
    *linear(FC1, f"{LAYER}.mlp.c_fc", "ffn hidden", transposed=True),
    *linear(FC2, f"{LAYER}.mlp.c_proj", "hidden ffn", transposed=True),
    *norm(FINAL_NORM, "transformer.ln_f"),
)


def _table(config: dict[str, Any]) -> Table:
    return with_head(
        config,
        EMBEDDING,
        HEAD,
        WEIGHTS,
        derived=(".attn.bias", ".attn.masked_bias"),
        renamed=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),  # OpenAI's own files are of the model without a head
    )


def _to_nemo(hf: dict[str, Any]) -> dict[str, Any]:
    one_dropout(hf, "embd_pdrop", "resid_pdrop")
    return {}


def _to_hf(config: dict[str, Any]) -> dict[str, Any]:
    return {"embd_pdrop": config["hidden_dropout"]}


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    models="GPT-2",
    keys=KEYS,
    constants={
        **COMMON,
        "normalization": "layernorm",
        "activation": "gelu",
        "openai_gelu": True,
        "bias": True,
        "position_embedding_type": "learned_absolute",
    },
    required={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    table=_table,
    defaults={"embd_pdrop": 0.1},
    extra_nemo=_to_nemo,
    extra_hf=_to_hf,
    rope=None,
)

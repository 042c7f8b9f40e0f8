"""model_config.yaml → Architecture: NeMo's names and defaults, and what is refused by key."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from nemo_dpo.model.architecture import Architecture, ArchitectureError, RopeScaling
from nemo_dpo.model.nemo_keys import COMPUTED, EXPERTS_KEYS, KINDS

LEAST: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(**changes: Any) -> Architecture:
    return Architecture.parse({**LEAST, **changes})


def test_defaults_are_nemos() -> None:
    """What NeMo's MegatronGPTModel takes a missing key for: GPT-2's shape."""
    arch = parse()
    assert (arch.ffn_hidden_size, arch.num_query_groups, arch.kv_channels) == (4 * 48, 6, 8)
    assert (arch.normalization, arch.zero_centered_norm, arch.layernorm_epsilon) == ("LayerNorm", False, 1e-5)
    assert (arch.activation, arch.gated, arch.linear_bias, arch.qkv_bias) == ("gelu_tanh", False, True, False)
    assert (arch.position_embedding, arch.rotary_base, arch.rotary_percent) == ("learned_absolute", 10000.0, 1.0)
    assert not arch.rotary_interleaved
    assert (arch.tied_embeddings, arch.make_vocab_size_divisible_by) == (True, 128)
    assert (arch.rope_scaling, arch.rope_interpolation) == (None, None)
    assert (arch.hidden_dropout, arch.attention_dropout) == (0.1, 0.1)


def test_null_is_the_default_too() -> None:
    keys = ("ffn_hidden_size", "num_query_groups", "kv_channels", "rotary_base", "make_vocab_size_divisible_by")
    assert parse(**dict.fromkeys(keys)) == parse()


def test_values_are_taken() -> None:
    arch = parse(
        ffn_hidden_size=100,
        num_query_groups=3,
        kv_channels=16,
        layernorm_epsilon=1e-6,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=1e6,
        rotary_percentage=0.5,
        seq_len_interpolation_factor=2.0,
        hidden_dropout=0.1,
        attention_dropout=0.2,
        make_vocab_size_divisible_by=64,
    )
    assert (arch.ffn_hidden_size, arch.num_query_groups, arch.kv_channels) == (100, 3, 16)
    assert (arch.layernorm_epsilon, arch.tied_embeddings, arch.position_embedding) == (1e-6, False, "rope")
    assert (arch.rotary_base, arch.rotary_percent, arch.rope_interpolation) == (1e6, 0.5, 2.0)
    assert (arch.hidden_dropout, arch.attention_dropout, arch.make_vocab_size_divisible_by) == (0.1, 0.2, 64)


@pytest.mark.parametrize(
    ("name", "activation", "gated"),
    [
        ("fast-swiglu", "silu", True),
        ("swiglu", "silu", True),
        ("geglu", "gelu", True),
        ("fast-geglu", "gelu", True),
        ("gelu", "gelu", False),
        ("openai-gelu", "gelu_tanh", False),
        ("squared-relu", "squared_relu", False),
        ("relu", "relu", False),
    ],
)
def test_activations(name: str, activation: str, gated: bool) -> None:
    arch = parse(activation=name, bias_activation_fusion=False)
    assert (arch.activation, arch.gated) == (activation, gated)


@pytest.mark.parametrize("stated", [{}, {"bias_activation_fusion": True}])
@pytest.mark.parametrize(
    ("keys", "activation"),
    [
        ({"activation": "gelu"}, "gelu_tanh"),
        ({"activation": "gelu", "bias": False}, "gelu"),  # there is no such kernel
        ({"activation": "geglu", "bias": False}, "gelu_tanh"),
        ({"activation": "fast-geglu"}, "gelu_tanh"),
        ({"activation": "fast-swiglu"}, "silu"),
        ({"activation": "squared-relu"}, "squared_relu"),
    ],
)
def test_the_fused_kernels_have_another_formula_of_gelu(
    keys: dict[str, Any], activation: str, stated: dict[str, bool]
) -> None:
    """megatron-core's fused_bias_gelu.py and fused_bias_geglu.py; fusion is NeMo's default."""
    assert parse(**keys, **stated).activation == activation


def test_nulls_that_nemo_computes_with() -> None:
    """OmegaConf gives NeMo the null, not NeMo's default; each of these counts as false."""
    arch = parse(bias=None, share_embeddings_and_output_weights=None, position_embedding_type=None)
    assert (arch.linear_bias, arch.tied_embeddings, arch.position_embedding) == (False, False, "none")
    assert parse(bias_activation_fusion=None).activation == "gelu"


@pytest.mark.parametrize(
    ("name", "normalization", "zero_centred"),
    [("rmsnorm", "RMSNorm", False), ("layernorm", "LayerNorm", False), ("layernorm1p", "LayerNorm", True)],
)
def test_normalizations(name: str, normalization: str, zero_centred: bool) -> None:
    arch = parse(normalization=name)
    assert (arch.normalization, arch.zero_centered_norm) == (normalization, zero_centred)


def test_switches_beside_the_names() -> None:
    """`openai_gelu` goes before any activation and leaves it gated; zero-centred norms are a switch, too."""
    arch = parse(activation="geglu", openai_gelu=True, normalization="rmsnorm", layernorm_zero_centered_gamma=True)
    assert (arch.activation, arch.gated) == ("gelu_tanh", True)
    assert (arch.normalization, arch.zero_centered_norm) == ("RMSNorm", True)
    assert parse(rotary_interleaved=True).rotary_interleaved


EXPERTS = {"num_moe_experts": 8, "bias": False}


def test_experts() -> None:
    assert parse(num_moe_experts=0) == parse() and parse().experts is None
    arch = parse(**EXPERTS)
    assert (arch.experts, arch.experts_per_token, arch.load_balancing) == (8, 2, "aux_loss")
    assert arch.load_balancing_weight == 0.0  # as in NeMo, nothing is added unless the config says so
    assert set(arch.dimensions.linears()) == {"linear_qkv", "linear_proj"}
    assert parse(**EXPERTS, moe_router_topk=3, moe_aux_loss_coeff=0.02).experts_per_token == 3


# What Llama and Nemotron checkpoints of NeMo carry.
HARMLESS: dict[str, Any] = {
    "mcore_gpt": True, "name": "megatron_gpt", "apply_query_key_layer_scaling": True, "headscale": False,
    "transformer_block_type": "pre_ln", "openai_gelu": False, "normalize_attention_scores": True,
    "attention_type": "multihead", "fp32_residual_connection": False, "window_size": None, "num_moe_experts": None,
    "rotary_interleaved": False, "layernorm_zero_centered_gamma": False, "qk_layernorm": False,
    "apply_embedding_scaling": False, "mcore_customization_config": {}, "moe_router_topk": 2,
}  # fmt: skip


def test_harmless_values_change_nothing() -> None:
    assert parse(**HARMLESS) == parse() == parse(**dict.fromkeys(COMPUTED))
    assert parse(name="") == parse(name="te_gpt") == parse()
    assert parse(window_size=[-1, 0]) == parse()  # causal attention, unlimited


def test_what_some_families_have() -> None:
    plain = parse()
    assert (plain.window, plain.qk_norm, plain.scaled_embedding, plain.parallel_residual) == (None, False, False, False)
    keys = {"window_size": [4095, 0], "qk_layernorm": True, "apply_embedding_scaling": True}
    arch = parse(**keys, name="megatron_gpt_neox")
    assert (arch.window, arch.qk_norm, arch.scaled_embedding, arch.parallel_residual) == (4095, True, True, True)
    assert parse(window_size=[0, 0]).window == 0


@pytest.mark.parametrize(
    ("keys", "linear", "qkv"),
    [
        ({"bias": True}, True, False),  # megatron-core's `bias` includes the QKV bias
        ({"bias": True, "qkv_bias": True}, True, False),
        ({"bias": False}, False, False),
        ({"bias": False, "qkv_bias": True}, False, True),
    ],
)
def test_biases(keys: dict[str, bool], linear: bool, qkv: bool) -> None:
    arch = parse(**keys)
    assert (arch.linear_bias, arch.qkv_bias) == (linear, qkv)


def test_the_longest_sequence_stands_in_for_the_positions() -> None:
    assert parse(max_position_embeddings=None, encoder_seq_length=2048).max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({}, 1000),
        ({"override_vocab_size": 1200}, 1000),
        ({"vocab_size": None, "override_vocab_size": 1200}, 1200),
        ({"vocab_size": None, "override_vocab_size": None}, 900),
    ],
)
def test_the_tokenizer_decides_where_the_config_does_not(keys: dict[str, Any], size: int) -> None:
    """NeMo's own configs state no vocab_size, and override_vocab_size where the model has more rows than tokens."""
    assert Architecture.parse({**LEAST, **keys}, tokenizer_vocab_size=900).vocab_size == size


def test_rope_scaling() -> None:
    assert parse(rope_scaling=LLAMA3).rope_scaling == RopeScaling(32.0)
    old_name = {**{key: value for key, value in LLAMA3.items() if key != "rope_type"}, "type": "llama3"}
    assert parse(rope_scaling=old_name).rope_scaling == RopeScaling(32.0)
    # NeMo's own switch comes without numbers: Llama 3.1's.
    assert parse(scale_positional_embedding=True).rope_scaling == RopeScaling(8.0)
    assert parse(scale_positional_embedding=True, rope_scaling=LLAMA3).rope_scaling == RopeScaling(32.0)


@pytest.mark.parametrize(
    ("vocabulary", "multiple", "tp", "rows"),
    [
        (1000, 128, 1, 1024),
        (1000, 128, 2, 1024),
        (1000, 128, 3, 1152),
        (1000, 128, 8, 1024),
        (1025, 128, 8, 2048),
        (1024, 128, 4, 1024),
        (1, 1, 4, 4),
    ],
)
def test_vocabulary_padding(vocabulary: int, multiple: int, tp: int, rows: int) -> None:
    """The least multiple of multiple · tp that holds the vocabulary."""
    assert parse(vocab_size=vocabulary, make_vocab_size_divisible_by=multiple).padded_vocab_size(tp) == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None, "vocab_size": None}, "lacks num_layers, vocab_size"),
        ({"normalization": "batchnorm"}, r"normalization='batchnorm' .* rmsnorm, layernorm, layernorm1p"),
        ({"activation": "reglu"}, r"activation='reglu' .* fast-swiglu"),
        ({"position_embedding_type": "alibi"}, r"position_embedding_type='alibi' .* rope"),
        ({"attention_type": "multiquery"}, r"attention_type='multiquery' .* multihead"),
        ({"mcore_gpt": False}, "mcore_gpt=False is not supported; known: True"),
        ({"name": "megatron_falcon_gpt"}, "name='megatron_falcon_gpt'"),
        ({"transformer_block_type": "post_ln"}, "transformer_block_type='post_ln' is not supported; known: pre_ln"),
        ({"normalize_attention_scores": False}, "normalize_attention_scores=False"),
        ({"headscale": True}, "headscale=True"),
        ({"window_size": [4095, 4095]}, r"window_size=\[4095, 4095\] is not supported; known: \[-1, 0\] and \[n, 0\]"),
        ({"window_size": 4096}, "window_size=4096 is not supported"),
        ({"name": "megatron_falcon_gpt"}, "name='megatron_falcon_gpt'"),
        ({"softmax_scale": 0.1}, "softmax_scale=0.1 is not supported; known: null"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection=True"),
        ({"mcore_customization_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
        ({"num_moe_experts": 8, "bias": True}, "bias=True is not supported with num_moe_experts"),
        ({**EXPERTS, "name": "megatron_gpt_neox"}, "name='megatron_gpt_neox' is not supported with num_moe_experts"),
        ({**EXPERTS, "moe_router_topk": 1}, "moe_router_topk=1 of num_moe_experts=8 is not supported; known: 2 to 8"),
        ({**EXPERTS, "moe_router_topk": 9}, "moe_router_topk=9 of num_moe_experts=8"),
        (
            {**EXPERTS, "moe_router_load_balancing_type": "sinkhorn"},
            "'sinkhorn' .* aux_loss, seq_aux_loss, none",
        ),
        ({**EXPERTS, "moe_aux_loss_coeff": [0.1]}, r"moe_aux_loss_coeff=\[0.1\] is no number"),
        ({**EXPERTS, "moe_router_pre_softmax": True}, "moe_router_pre_softmax=True is not supported; known: False"),
        ({**EXPERTS, "moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; known: 1"),
        ({**EXPERTS, "moe_ffn_hidden_size": 64}, "moe_ffn_hidden_size=64 is not supported; known: ffn_hidden_size"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"type 'yarn' .* llama3"),
        ({"rope_scaling": {"factor": 4.0}}, r"type None"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 8.0}}, r"rope_scaling.high_freq_factor=8.0; .* 4.0 only"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}, r"=4096; .* 8192 only"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        parse(**changes)


# One of each kind that YAML knows, and numbers at the edge.
WRONG: tuple[Any, ...] = (
    [], {}, "x", "", 0, -1, 10**30, 1e30, float("nan"), float("inf"), True, False, date(2020, 1, 1), b"x", [[1]],
    {"a": {"b": [None]}}, [1, 2, 3], {1: 2},
)  # fmt: skip
KEYS = (*KINDS, *COMPUTED, "window_size")


@pytest.mark.parametrize("key", dict.fromkeys(KEYS))
def test_any_value_of_any_key_is_taken_or_refused_by_name(key: str) -> None:
    refused, rest = 0, EXPERTS if key.startswith(EXPERTS_KEYS) else {}
    for value in WRONG:
        try:
            parse(**{**rest, key: value}).padded_vocab_size(3)
        except ArchitectureError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500
            assert key in str(error) or "num_attention_heads" in str(error) or "kv_channels" in str(error)
    assert refused >= 10


@pytest.mark.parametrize("key", [key for key in COMPUTED if key.startswith(EXPERTS_KEYS)])
def test_keys_of_experts_mean_nothing_without_them(key: str) -> None:
    assert parse(**{key: "x"}) == parse()


@pytest.mark.parametrize("key", LLAMA3)
def test_any_value_within_rope_scaling(key: str) -> None:
    for value in WRONG[:4]:
        with pytest.raises(ArchitectureError, match=f"rope_scaling.*{'type' if 'type' in key else key}"):
            parse(rope_scaling={**LLAMA3, key: value})


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(ArchitectureError, ValueError)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor"),
    ],
)
def test_every_missing_key_is_named(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ArchitectureError, match=key):
        parse(**changes)

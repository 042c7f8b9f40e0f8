"""Every family, in odd shapes: Hugging Face → .nemo → Hugging Face, and a `.nemo` that does not say where it is from.

That the model code computes the same logits and gradients is in tests/model.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.convert import hf_to_nemo, nemo_to_hf
from nemo_dpo.convert.families import FAMILIES, REFUSED, family_of_hf, family_of_nemo
from nemo_dpo.convert.families.overview import DOCUMENT, overview
from nemo_dpo.convert.family import to_hf_config, to_model_config
from tests.convert.conftest import BASE, assert_same_tensors, hf_tensors, save_model
from tests.convert.hub_configs import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
# Without grouped queries: nine heads all the same.
PLAIN = {key: value for key, value in BASE.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
GPT2 = {"vocab_size": 301, "n_embd": 72, "n_inner": 100, "n_layer": 3, "n_head": 9, "n_positions": 128}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}

# What it shows → (model_type, settings of transformers' config class).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral with a window": ("mistral", {**BASE, "head_dim": 24, "sliding_window": 6}),
    "mistral without, tied": ("mistral", {**BASE, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**BASE, "head_dim": 24}),
    "qwen3, tied": ("qwen3", {**BASE, "head_dim": 8, "tie_word_embeddings": True}),
    "pythia": ("gpt_neox", {**PLAIN, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}),
    "gpt-neox, one after the other, tied": (
        "gpt_neox",
        {**PLAIN, "use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied, n_inner by default": ("gpt2", {**GPT2, "n_inner": None, "tie_word_embeddings": False}),
    "gemma": ("gemma", {**BASE, "head_dim": 24, "tie_word_embeddings": True}),
    "gemma, untied": ("gemma", {**BASE, "head_dim": 24}),
    "starcoder2": ("starcoder2", {**BASE, "tie_word_embeddings": True, "sliding_window": 6}),
    "starcoder2, untied, no biases": ("starcoder2", {**BASE, "use_bias": False}),
    "nemotron": ("nemotron", {**BASE, "head_dim": 24}),
    "nemotron, all biases, linear RoPE, tied": (
        "nemotron",
        {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
    "mixtral, three of five experts": ("mixtral", {**BASE, "num_local_experts": 5, "num_experts_per_tok": 3}),
    "mixtral with a window, tied": (
        "mixtral",
        {**BASE, "num_local_experts": 2, "head_dim": 24, "sliding_window": 6, "tie_word_embeddings": True},
    ),
}
# A model_config.yaml says what is computed, and Llama computes the same.
SAME = {"mistral without, tied": "llama"}


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def config_of(name: str) -> Any:
    """transformers' config; its classes write into the dictionaries that they are given."""
    from transformers import AutoConfig

    model_type, settings = copy.deepcopy(MODELS[name])
    return AutoConfig.for_model(model_type, **settings, eos_token_id=2, bos_token_id=1)


def make(folder: Path, name: str) -> tuple[Path, Path]:
    """The model as Hugging Face folder, as `.nemo` (extracted)."""
    save_model(folder / "hf", config_of(name))
    hf_to_nemo(folder / "hf", folder / "model.nemo", verify=False)  # that is for the tests to judge
    archive.extract(folder / "model.nemo", folder / "nemo")
    return folder / "hf", folder / "nemo"


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    """With its origin in model_config.yaml, the same folder; without, one that transformers computes the same with."""
    hf, nemo = make(tmp_path, name)
    nemo_to_hf(nemo, tmp_path / "back", verify=False)
    assert_same_tensors(hf, tmp_path / "back")
    assert read(tmp_path / "back") == read(hf)

    config = archive.read_model_config(nemo)
    config.pop("huggingface")
    assert family_of_nemo(config).model_type == SAME.get(name, MODELS[name][0])
    archive.write_model_config(config, nemo)
    nemo_to_hf(nemo, tmp_path / "foreign")
    assert_same_tensors(hf, tmp_path / "foreign")
    assert torch.equal(logits(hf), logits(tmp_path / "foreign"))


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(3, 43)[None]).logits
    assert found.abs().max() > 1
    return found


# NeMo's keys and values, as its own converters write them where it has one for the family.
KEYS: dict[str, dict[str, Any]] = {
    "mistral with a window": {"window_size": [5, 0], "activation": "fast-swiglu", "normalization": "rmsnorm"},
    "mistral without, tied": {"window_size": None, "share_embeddings_and_output_weights": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 24, "qkv_bias": False},
    "pythia": {
        "rotary_percentage": 0.25, "rotary_base": 5000.0, "name": "megatron_gpt_neox", "activation": "gelu",
        "openai_gelu": False, "normalization": "layernorm", "bias": True, "num_query_groups": 9, "kv_channels": 8,
    },
    "gpt-neox, one after the other, tied": {"name": "", "openai_gelu": True, "rotary_percentage": 0.25},
    "gpt2": {
        "position_embedding_type": "learned_absolute", "activation": "gelu", "openai_gelu": True, "bias": True,
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "ffn_hidden_size": 100, "encoder_seq_length": 128,
    },
    "gpt2, untied, n_inner by default": {"ffn_hidden_size": 288, "share_embeddings_and_output_weights": False},
    "gemma": {
        "apply_embedding_scaling": True, "activation": "geglu", "openai_gelu": True, "normalization": "rmsnorm",
        "layernorm_zero_centered_gamma": True, "kv_channels": 24, "bias": False,
    },
    "starcoder2": {"normalization": "layernorm", "bias": True, "window_size": [5, 0], "num_query_groups": 3},
    "nemotron": {
        "normalization": "layernorm1p", "activation": "squared-relu", "rotary_percentage": 0.5, "bias": False,
        "share_embeddings_and_output_weights": False,
    },
    "nemotron, all biases, linear RoPE, tied": {"bias": True, "seq_len_interpolation_factor": 4.0},
    "mixtral, three of five experts": {
        "num_moe_experts": 5, "moe_router_topk": 3, "moe_aux_loss_coeff": 0.001, "ffn_hidden_size": 100,
        "moe_router_load_balancing_type": "aux_loss", "moe_router_pre_softmax": False, "window_size": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_model_config_has_nemos_keys(name: str) -> None:
    config = to_model_config(FAMILIES[MODELS[name][0]], config_of(name).to_dict(), {})
    assert {key: config[key] for key in KEYS[name]} == KEYS[name]


def nemos_transformer(config: dict[str, Any]) -> Any:
    """What NeMo hands to megatron-core (`build_transformer_config`), of the keys that decide about fusion."""
    import torch.nn.functional as F
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    activation = str(config["activation"])
    functions = {"gelu": F.gelu, "geglu": F.gelu, "fast-swiglu": F.silu, "squared-relu": squared_relu}
    return TransformerConfig(
        num_layers=config["num_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        activation_func=torch.tanh if config.get("openai_gelu", False) else functions[activation],
        gated_linear_unit=activation.endswith("glu"),
        add_bias_linear=config.get("bias", True),
        bias_activation_fusion=config.get("bias_activation_fusion", True),
    )


@pytest.mark.parametrize("name", MODELS)
def test_nemo_builds_what_is_written(name: str) -> None:
    """megatron-core refuses activations that its fused kernels do not know, NeMo a `name` of which it has no layer."""
    config = to_model_config(FAMILIES[MODELS[name][0]], config_of(name).to_dict(), {"name": "megatron_gpt"})
    assert not nemos_transformer(config).bias_activation_fusion
    if MODELS[name][0] == "gpt_neox":
        assert config["name"] == ("" if "one after" in name else "megatron_gpt_neox")


@pytest.mark.parametrize("name", ["gpt2", "gemma", "starcoder2", "nemotron"])
def test_nemo_refuses_them_by_its_default(name: str) -> None:
    config = to_model_config(FAMILIES[MODELS[name][0]], config_of(name).to_dict(), {})
    del config["bias_activation_fusion"]
    with pytest.raises(ValueError, match="bias_activation_fusion"):
        nemos_transformer(config)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_fast"])
def test_gelu_of_gpt_neox(hidden_act: str) -> None:
    """Both formulas go there and back; NeMo's default is the tanh approximation."""
    from transformers import GPTNeoXConfig

    family = FAMILIES["gpt_neox"]
    config = to_model_config(family, GPTNeoXConfig(**{**copy.deepcopy(PLAIN), "hidden_act": hidden_act}).to_dict(), {})
    assert to_hf_config(family, config)["hidden_act"] == hidden_act
    del config["bias_activation_fusion"]
    assert to_hf_config(family, config)["hidden_act"] == "gelu_fast"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_silence_means_what_transformers_takes_it_for(model_type: str) -> None:
    """config.json with nothing in it, and the one that transformers makes of that, become the same."""
    from transformers import AutoConfig

    family, full = FAMILIES[model_type], AutoConfig.for_model(model_type).to_dict()
    assert to_model_config(family, {"model_type": model_type}, {}) == to_model_config(family, full, {})


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_published_models(name: str) -> None:
    """In the form that they are published in, and as transformers 5 writes it."""
    from transformers import AutoConfig

    hf = CONFIGS[name]
    family = family_of_hf(hf)
    config = to_model_config(family, hf, {})
    assert to_hf_config(family, {**config, "huggingface": {"config": hf}}) == hf
    settings = {key: value for key, value in hf.items() if key != "model_type"}
    assert to_model_config(family, AutoConfig.for_model(hf["model_type"], **settings).to_dict(), {}) == config


@pytest.mark.parametrize(
    ("model_type", "settings", "match"),
    [
        ("gemma2", {}, "model_type='gemma2' is not supported: soft-capped"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types asks for sliding windows"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias=False"),
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'gelu' or 'gelu_fast'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"embd_pdrop": 0.0}, "embd_pdrop=0.0 and resid_pdrop=0.1: megatron-core has one rate"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("starcoder2", {"embedding_dropout": 0.1}, "embedding_dropout=0.1 and residual_dropout=0.0"),
        ("nemotron", {"mlp_bias": True}, "mlp_bias without attention_bias"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 of num_local_experts=8"),
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3 of num_local_experts=2"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ],
)
def test_what_cannot_be_expressed_is_refused(model_type: str, settings: dict[str, Any], match: str) -> None:
    hf = {"model_type": model_type, **settings}
    with pytest.raises(CheckpointError, match=match) as caught:
        to_model_config(family_of_hf(hf), hf, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "changes", "match"),
    [
        ("gpt2", {"num_query_groups": 3}, r"differs from gpt2 in num_query_groups=3 \(there 12\)"),
        ("gpt2", {"position_embedding_type": "rope"}, "position_embedding='rope'"),
        ("gemma", {"layernorm_zero_centered_gamma": False}, r"zero_centered_norm=False \(there True\)"),
        ("llama", {"window_size": [5, 0]}, "differs from llama in window=5"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias=False"),
        ("gpt_neox", {"name": "", "apply_embedding_scaling": True}, "scaled_embedding=True"),
        ("mixtral", {"num_moe_experts": None}, r"experts=None \(there 8\)"),
        (None, {"num_moe_experts": 4, "normalization": "layernorm"}, "differs from mixtral in normalization"),
        (None, {"normalization": "layernorm"}, "no family computes this; it differs from llama"),
    ],
)
def test_a_nemo_that_is_not_of_the_family(model_type: str | None, changes: dict[str, Any], match: str) -> None:
    """Edited after the conversion, or (None) of unknown origin: it would be exported as something else."""
    hf = {"model_type": model_type or "llama"}
    config = {**to_model_config(family_of_hf(hf), hf, {}), **changes}
    if model_type:
        config["huggingface"] = {"config": hf}
    with pytest.raises(CheckpointError, match=match):
        family_of_nemo(config)


def rename(folder: Path, old: str, new: str) -> None:
    from safetensors.torch import save_file

    tensors = {name.replace(old, new): tensor for name, tensor in hf_tensors(folder).items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("gpt2", "transformer.", ""), ("pythia", "embed_out.", "lm_head.")],
    ids=["the files of OpenAI's GPT-2", "names of transformers 5"],
)
def test_other_names_of_the_same_parameters(tmp_path: Path, name: str, old: str, new: str) -> None:
    hf, _ = make(tmp_path, name)
    (tmp_path / "plain.nemo").write_bytes((tmp_path / "model.nemo").read_bytes())
    rename(hf, old, new)
    hf_to_nemo(hf, tmp_path / "renamed.nemo")
    for kind in ("plain", "renamed"):
        nemo_to_hf(tmp_path / f"{kind}.nemo", tmp_path / kind)
    assert_same_tensors(tmp_path / "plain", tmp_path / "renamed")


def test_a_parameter_under_two_names_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    hf, _ = make(tmp_path, "pythia")
    tensors = hf_tensors(hf)
    save_file({**tensors, "lm_head.weight": tensors["embed_out.weight"] + 1}, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match="are two names of one parameter"):
        hf_to_nemo(hf, tmp_path / "refused.nemo")


def test_the_document_lists_every_family() -> None:
    assert (ROOT / DOCUMENT).read_text(encoding="utf-8") == overview(), (
        f"{DOCUMENT} is out of date; write it anew with python tools/convert/list_families.py {DOCUMENT}"
    )
    assert all(f"`{name}`" in overview() for name in (*FAMILIES, *REFUSED))

"""Deliberate bugs in the tables of model families and in what computes them."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

FAMILIES = "nemo_dpo/convert/families/"
RULES = "nemo_dpo/convert/rules.py"
ARCHITECTURE = "nemo_dpo/model/architecture.py"
LAYERS = "nemo_dpo/model/layers.py"

LOGITS = "tests/model/test_logits.py::test_logits_equal_hugging_faces[1 process-"
BACK = "tests/convert/test_families.py::test_it_comes_back_bit_for_bit"
PEFT = "tests/convert/test_adapters_families.py::"

FAMILY_MUTATIONS = (
    Mutation(
        "norm of the attention taken for that of the MLP",
        f"{FAMILIES}common.py",
        'ATTENTION_NORM = f"{QKV}.layer_norm_"\nMLP_NORM = f"{FC1}.layer_norm_"',
        'ATTENTION_NORM = f"{FC1}.layer_norm_"\nMLP_NORM = f"{QKV}.layer_norm_"',
        f"{LOGITS}gpt2]",
    ),
    Mutation(
        "norms of the next layer",
        "nemo_dpo/convert/engine.py",
        "    parts = [\n        param.turned(",
        "    if 'norm' in rule.nemo and layer is not None:\n"
        "        layer = (layer + 1) % dims.layers\n"
        "    parts = [\n        param.turned(",
        f"{BACK}[nemotron]",
    ),
    Mutation(
        "Conv1D not transposed",
        f"{FAMILIES}gpt2.py",
        '*linear(PROJ, f"{LAYER}.attn.c_proj", "hidden q", transposed=True)',
        '*linear(PROJ, f"{LAYER}.attn.c_proj", "hidden q")',
        f"{LOGITS}gpt2]",
    ),
    Mutation(
        "query, key and value of GPT-2 taken for interleaved",
        RULES,
        "        return interleave(parts[0].split(self._rows(dims)), dims.query_groups)",
        "        return parts[0]",
        f"{BACK}[gpt2]",
    ),
    Mutation(
        "query, key and value of GPT-NeoX taken for stacked",
        f"{FAMILIES}gpt_neox.py",
        '    *linear(QKV, f"{LAYER}.attention.query_key_value", "qkv hidden"),',
        '    *(__import__("nemo_dpo.convert.rules", fromlist=["rules"]).StackedQkv(r.nemo, r.hf)\n'
        '      for r in linear(QKV, f"{LAYER}.attention.query_key_value", "qkv hidden")),',
        f"{LOGITS}gpt_neox]",
    ),
    Mutation(
        "rows of an adapter of GPT-NeoX stacked",
        "nemo_dpo/convert/adapter_peft.py",
        "self._rules[linear].unpack(interleave(rows, self._linears[linear].groups), self.dimensions)[0]",
        "torch.cat(rows)",
        f"{PEFT}test_imported_and_exported_back_it_is_the_same[gpt_neox-target3]",
    ),
    Mutation(
        "norms of query and key swapped",
        f"{FAMILIES}qwen3.py",
        'q_layernorm.weight", (Param(f"{llama.ATTENTION}.q_norm.weight", "head"),)),\n'
        '    Copy("decoder.layers.self_attention.k_layernorm.weight", (Param(f"{llama.ATTENTION}.k_norm.weight"',
        'q_layernorm.weight", (Param(f"{llama.ATTENTION}.k_norm.weight", "head"),)),\n'
        '    Copy("decoder.layers.self_attention.k_layernorm.weight", (Param(f"{llama.ATTENTION}.q_norm.weight"',
        f"{LOGITS}qwen3]",
    ),
    Mutation(
        "vocabulary off by one row",
        RULES,
        "padded[: dims.vocab] = parts[0]",
        "padded[1 : dims.vocab + 1] = parts[0]",
        "tests/convert/test_rules.py::test_vocabulary_is_padded_with_zeros_and_cut",
    ),
    Mutation(
        "GELU of NeMo's fused kernels taken for the exact one",
        ARCHITECTURE,
        'or (activation == "gelu" and fused)',
        "",
        "tests/model/test_architecture.py::test_the_fused_kernels_have_another_formula_of_gelu[keys0-gelu_tanh-stated0]",
    ),
    Mutation(
        "written archives leave the fusion to NeMo's default",
        f"{FAMILIES}common.py",
        '    "bias_activation_fusion": False,\n',
        "",
        "tests/convert/test_families.py::test_nemo_builds_what_is_written[qwen3]",
    ),
    Mutation(
        "RoPE turns every channel",
        ARCHITECTURE,
        'rotary_percent=float(config["rotary_percentage"])',
        "rotary_percent=1.0",
        f"{LOGITS}nemotron]",
    ),
    Mutation(
        "RoPE pairs neighbouring channels",
        ARCHITECTURE,
        'rotary_interleaved=bool(config.get("rotary_interleaved"))',
        'rotary_interleaved=not config.get("rotary_interleaved")',
        f"{LOGITS}gqa_tied]",
    ),
    Mutation(
        "sliding window one token too wide",
        f"{FAMILIES}common.py",
        "[window - 1, 0]",
        "[window, 0]",
        "tests/convert/test_families.py::test_model_config_has_nemos_keys[mistral with a window]",
    ),
    Mutation(
        "the MLP of a parallel layer reads attention's sum",
        LAYERS,
        "self.mlp(self._forward_pre_mlp_layernorm(hidden_states))",
        "self.mlp(self._forward_pre_mlp_layernorm(attended))",
        f"{LOGITS}gpt_neox]",
    ),
    Mutation(
        "gradients of the norms of query and key not summed over the tensor-parallel ranks",
        "nemo_dpo/model/build.py",
        "qk_layernorm=arch.qk_norm,\n",
        "qk_layernorm=False,\n",
        "tests/model/test_training_step.py::test_gradients[TP 2-qwen3]",
    ),
    Mutation(
        "embedding not scaled",
        "nemo_dpo/model/build.py",
        "math.sqrt(arch.hidden_size) if arch.scaled_embedding else None",
        "None",
        f"{LOGITS}gemma]",
    ),
    Mutation(
        "scale of the embedding not rounded",
        "nemo_dpo/model/gpt.py",
        "start * torch.tensor(self.embedding_scale, dtype=start.dtype)",
        "start * self.embedding_scale",
        "tests/model/test_gpt.py::test_the_scale_of_the_embedding_is_rounded_as_gemma_does",
    ),
)

"""Loading: composition, strictness, legacy keys, types, speed."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_dpo.config import Config, ConfigError, describe, load_config, to_yaml
from nemo_dpo.config.keys import field_docs, schema_keys
from nemo_dpo.config.legacy import RULES, VALUES, Mapped, Mirror, Refused, Renamed, rule_for

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


def load(*overrides: str) -> Config:
    return load_config(CONF, "gpt_dpo", overrides)


def error(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def test_every_yaml_under_conf_composes() -> None:
    yamls = sorted(CONF.rglob("*.yaml"))
    assert [path.stem for path in yamls] == [
        "gpt_dpo", "gpt_dpo_lora", "gpt_dpo_qlora", "quickstart", "quickstart_lora"
    ]  # fmt: skip
    for path in yamls:
        assert isinstance(load_config(path.parent, path.stem), Config)


def test_qlora_loads_the_sft_adapter_twice() -> None:
    peft = load_config(CONF, "gpt_dpo_qlora", ["model.peft.restore_from_path=sft.nemo"]).model.peft
    assert (peft.restore_from_path, peft.frozen_adapters) == ("sft.nemo", {"reference": "sft.nemo"})


def test_repository_yaml_repeats_the_schemas_defaults() -> None:
    """The yaml is for reading and editing; the defaults have one home."""
    assert load() == Config_with_schema_defaults()


def Config_with_schema_defaults() -> Config:
    return load_config(Path(__file__).parent, "empty")


def test_every_key_is_documented() -> None:
    for key in schema_keys().values():
        assert field_docs(key.owner).get(key.path.rpartition(".")[2]), key.path


def test_description_has_every_key_with_default() -> None:
    text = describe()
    for path, key in schema_keys().items():
        assert f"{path}:" in text if key.section else f"{path} = " in text, path
    assert "model.dpo.ref_policy_kl_penalty = 0.2" in text
    assert all(path in text for path in RULES)


@pytest.mark.parametrize("form", ["", "+", "++"])
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.global_batch_sise", "model.global_batch_size"),
        ("trainer.dpo.max_epoch", "trainer.dpo.max_epochs"),
        ("model.dpo.default_chosen_reward", "model.data.default_chosen_reward"),
        ("modle.dpo.sft_loss_weight", "model.dpo.sft_loss_weight"),
        ("exp_manager.checkpoint_callback_params.save_topk", "exp_manager.checkpoint_callback_params.save_top_k"),
        ("lr", "model.optim.lr"),
        ("model.optim.bucket_cap_bm", "model.optim.bucket_cap_mb"),
    ],
)
def test_unknown_key_names_the_nearest(form: str, typed: str, meant: str) -> None:
    assert error(f"{form}{typed}=1") == f"unknown key {typed}; did you mean {meant}?"


def test_unknown_key_that_resembles_none_lists_the_section() -> None:
    assert "keys of model.dpo.reference are kind" in error("model.dpo.reference.xyzzy=1")
    assert "keys of the top level are trainer, exp_manager" in error("xyzzy=1")


def test_all_unknown_and_refused_keys_are_in_one_error() -> None:
    lines = error("model.seeed=1", "++model.optim.lrr=1", "model.fsdp=true").splitlines()
    assert {line.split("=")[0].split(";")[0] for line in lines} == {
        "unknown key model.seeed", "unknown key model.optim.lrr", "model.fsdp"
    }  # fmt: skip


def test_unknown_key_in_a_users_yaml(tmp_path: Path) -> None:
    for defaults in ("", "defaults: [gpt_dpo_schema, _self_]\n"):
        (tmp_path / "mine.yaml").write_text(defaults + "model: {dpo: {prefrence_loss: ipo}}\n")
        with pytest.raises(
            ConfigError, match=r"unknown key model\.dpo\.prefrence_loss; did you mean .*preference_loss"
        ):
            load_config(tmp_path, "mine")


def test_free_dictionaries_take_any_key() -> None:
    cfg = load("++exp_manager.wandb_logger_kwargs.group=g", "exp_manager.summary_writer_kwargs={max_queue: 3}")
    assert cfg.exp_manager.wandb_logger_kwargs == {"project": "nemo_aligner_dpo", "name": "rlhf_gpt3_dpo", "group": "g"}
    assert cfg.exp_manager.summary_writer_kwargs == {"max_queue": 3}


@pytest.mark.parametrize("form", ["", "+", "++"])
def test_known_key_in_any_form_also_if_the_yaml_does_not_list_it(form: str) -> None:
    assert load(f"{form}model.data.apply_ftfy=true").model.data.apply_ftfy is True
    assert load(f"{form}model.global_batch_size=8").model.global_batch_size == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.micro_batch_size=two", "model.micro_batch_size='two' has the wrong type: expected int"),
        ("model.micro_batch_size=1.5", "model.micro_batch_size=1.5 has the wrong type: expected int"),
        ("model.micro_batch_size=true", "model.micro_batch_size=True has the wrong type: expected int"),
        ("model.micro_batch_size=null", "model.micro_batch_size=None has the wrong type: expected int"),
        ("model.optim.betas=0.9", "model.optim.betas=0.9 has the wrong type: expected list[float]"),
        ("model.deterministic=maybe", "model.deterministic='maybe' has the wrong type: expected bool"),
        ("trainer.dpo.val_check_interval=often", "val_check_interval='often' has the wrong type: expected int | float"),
        ("trainer.dpo=1", "trainer.dpo=1: trainer.dpo is a section; set its keys, trainer.dpo.<key>=<value>"),
        ("model.optim.sched=null", "model.optim.sched is a section"),
        ("model.seed={a: 1}", "model.seed={'a': 1} has the wrong type: expected int"),
    ],
)
def test_wrong_type_names_key_value_and_type(override: str, expected: str) -> None:
    assert expected in error(override)


def test_text_hydra_cannot_read() -> None:
    assert "model.seed=1=2" in (text := error("model.seed=1=2")) and "quotes" in text
    assert "model.seed=1,2 is a sweep, which is not offered" in error("model.seed=1,2")
    assert "cannot be deleted" in error("~model.optim.sched")
    assert "nowhere" in error("model.seed=${nowhere}")
    assert "model.seed: ??? asks for a value; add model.seed=<value>" in error("model.seed=???")


def test_missing_folder_and_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-path=.*absent is not a folder"):
        load_config(tmp_path / "absent", "gpt_dpo")
    with pytest.raises(ConfigError, match="other"):
        load_config(tmp_path, "other")
    (tmp_path / "bad.yaml").write_text("model: [1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(tmp_path, "bad")


def test_interpolations_of_a_users_yaml(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "model:\n  tensor_model_parallel_size: 2\n  pipeline_model_parallel_size: 3\n  micro_batch_size: 4\n"
        "  global_batch_size: ${multiply:${model.micro_batch_size}, 6}\n  seed: ${sum:1, ${.micro_batch_size}}\n"
        "  dpo: {preference_average_log_probs: true}\n"
        "exp_manager: {checkpoint_callback_params: {monitor: val_acc}}\n"
        "trainer: {max_time: '00:01:00:00'}\n"
    )
    cfg = load_config(tmp_path, "mine.yaml")
    assert (cfg.model.global_batch_size, cfg.model.seed) == (24, 5)
    # Defaults that follow another key.
    assert cfg.model.dpo.log_prob_forward_micro_batch_size == 4
    assert cfg.model.dpo.sft_average_log_probs is True
    assert cfg.exp_manager.max_time_per_run == "00:01:00:00"
    assert cfg.exp_manager.checkpoint_callback_params.filename.startswith("megatron_gpt--{val_acc:.3f}-{step}")


def test_config_groups_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [_self_, optional size: null]\n")
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "big.yaml").write_text("# @package model\nglobal_batch_size: 512\n")
    assert load_config(tmp_path, "mine").model.global_batch_size == 64
    assert load_config(tmp_path, "mine", ["size=big"]).model.global_batch_size == 512


def test_hydras_own_keys_are_accepted_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load("hydra.run.dir=.", "hydra.job.name=x")
    assert caplog.messages[0].startswith("hydra.run.dir=., hydra.job.name=x: ")
    (tmp_path / "mine.yaml").write_text("hydra: {run: {dir: .}}\n")
    assert load_config(tmp_path, "mine") == load_config(Path(__file__).parent, "empty")


def test_to_yaml_round_trip(tmp_path: Path) -> None:
    cfg = load(
        "model.data.data_prefix={train: [a], validation: [0.5, b, 0.5, c]}", "trainer.devices=3", "model.optim.lr=1e-5"
    )
    (tmp_path / "effective.yaml").write_text(to_yaml(cfg))
    assert load_config(tmp_path, "effective") == cfg


def test_full_aligner_yaml_loads_and_says_what_is_mapped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cfg = load_config(Path(__file__).parent, "aligner_gpt_dpo")
    assert (cfg.trainer.num_nodes, cfg.trainer.devices, cfg.trainer.accelerator) == (8, 8, "gpu")
    assert cfg.exp_manager.checkpoint_callback_params.model_parallel_size == 1
    assert cfg.model.optim.name == "mcore_distributed_optim"
    assert cfg.model.optim.lr == 9e-6
    mapped = "\n".join(caplog.messages)
    for key in (
        "model.optim.name=distributed_fused_adam", "model.optim.bucket_cap_mb, model.optim.contiguous_grad_buffer",
        "model.megatron_amp_O2", "model.data.skip_warmup",
        "model.overwrite_base_config: ",
    ):  # fmt: skip
        assert key in mapped
    # One line per reason, each key once; none about the section peft, which asks for nothing that is not here.
    assert len(caplog.messages) == len(set(caplog.messages)) == 5


def test_aligner_keys_that_its_yaml_does_not_list() -> None:
    cfg = load(
        "+model.data.apply_ftfy=true", "++model.data.append_eod=true", "+model.data.validation_drop_last=true",
        "++model.encoder_seq_length=512", "++model.dist_ckpt_load_strictness=log_all",
        "+model.data.chat_prompt_tokens=null",
    )  # fmt: skip
    assert cfg.model.data.apply_ftfy and cfg.model.data.append_eod
    assert cfg.model.data.seq_length == 512


MODEL_CONFIG_KEYS = [
    "mcore_gpt", "micro_batch_size", "global_batch_size", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "encoder_seq_length",
    "max_position_embeddings", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
    "num_query_groups", "kv_channels", "init_method_std", "hidden_dropout", "attention_dropout", "ffn_dropout",
    "normalization", "layernorm_epsilon", "bias", "activation", "position_embedding_type", "rotary_percentage",
    "rotary_base", "seq_len_interpolation_factor", "scale_positional_embedding",
    "share_embeddings_and_output_weights", "make_vocab_size_divisible_by", "tokenizer.library",
    "tokenizer.type", "tokenizer.model", "tokenizer.vocab_file", "tokenizer.merge_file", "tokenizer.use_fast",
    "megatron_amp_O2", "bias_activation_fusion", "bias_dropout_add_fusion", "masked_softmax_fusion",
    "gradient_accumulation_fusion", "apply_rope_fusion", "activations_checkpoint_granularity",
    "activations_checkpoint_method", "activations_checkpoint_num_layers", "sequence_parallel",
    "transformer_engine", "fp8", "fp8_e4m3", "fp8_hybrid", "fp8_margin", "fp8_interval", "fp8_amax_history_len",
    "fp8_amax_compute_algo", "data.data_impl", "optim.name", "target", "nemo_version",
    "dist_ckpt_load_strictness", "context_parallel_size", "fsdp",
]  # fmt: skip


def test_keys_of_model_config_yaml_are_known() -> None:
    for key in MODEL_CONFIG_KEYS:
        path = f"model.{key}"
        assert path in schema_keys() or path.startswith("model.tokenizer.") or rule_for(path)[1], path


REFUSED = {path: rule for path, rule in RULES.items() if isinstance(rule, Refused)}
MAPPED = {path: rule for path, rule in RULES.items() if isinstance(rule, Mapped)}
MIRRORS = {path: rule for path, rule in RULES.items() if isinstance(rule, Mirror)}


# The rules are tried all at once: an error and the log have a line for each. A parent is left out where its child has a
# rule of its own, since a key cannot be a value and a section.
PARENTS = {path for path in RULES if any(other.startswith(path + ".") for other in RULES)}


def yaml_value(value: object) -> str:
    return "null" if value is None else str(value)


def rounds(values: dict[str, tuple[object, ...]]) -> list[list[str]]:
    """Overrides that give every key each of its values, one value of each key at a time."""
    longest = max(map(len, values.values()))
    return [[f"{key}={yaml_value(all_[n])}" for key, all_ in values.items() if n < len(all_)] for n in range(longest)]


def test_refused_keys_say_why() -> None:
    lines = error(*(f"{path}=[7, 8]" for path in REFUSED)).splitlines()
    assert len(lines) == len(REFUSED) > 50
    by_key = {line.partition("=")[0]: line for line in lines}
    for path, rule in REFUSED.items():
        assert by_key[path].startswith(f"{path}=[7, 8] is refused: {rule.reason}. Leave it out, or set it to ")


def test_refused_keys_pass_at_values_that_ask_for_nothing() -> None:
    for overrides in rounds({path: rule.allowed for path, rule in REFUSED.items()}):
        assert load(*overrides) == load()


@pytest.mark.parametrize(
    "override",
    [
        "model.peft.lora_tuning.weight_tying=true", "model.peft.lora_tuning.position_embedding_strategy=add",
        "model.peft.restore_from_ckpt.checkpoint_name=x",
        "model.context_parallel_size=2", "model.expert_tensor_parallel_size=2",
        "model.fsdp=true", "model.data.data_impl=packed_jsonl", "model.data.data_impl=mmap", "model.mcore_gpt=false",
        "exp_manager.ema.enable=true",
        "exp_manager.create_early_stopping_callback=true", "model.data.chat_prompt_tokens.turn_start=x",
        "trainer.logger=true", "model.fp8=true", "trainer.strategy=fsdp", "trainer.strategy._target_=lightning.FSDP",
        "exp_manager.create_fault_tolerance_callback=true", "trainer.accumulate_grad_batches=2",
    ],
)  # fmt: skip
def test_what_is_refused_by_value(override: str) -> None:
    key, _, value = override.partition("=")
    assert (
        f"{key}=" in (text := error(override))
        and "is refused: " in text
        and value in text.replace("True", "true").replace("False", "false")
    )


def test_mapped_keys_log_a_notice_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    paths = [path for path in MAPPED if path not in PARENTS]
    assert load(*(f"{path}=77" for path in paths)) == load()
    said = dict(line.split(": ", 1)[::-1] for line in caplog.messages)
    assert said.keys() == {MAPPED[path].notice for path in paths}
    for path in paths:
        assert path in said[MAPPED[path].notice].split(", ")


def test_mapped_sections_log_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sections = [path for path in MAPPED if path in PARENTS]
    assert sections == ["exp_manager.ema", "model.nsys_profile"]
    load(*(f"{path}.other=77" for path in sections))
    assert caplog.messages == [f"{path}: {MAPPED[path].notice}" for path in sections]


def test_mapped_keys_are_silent_at_values_that_ask_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for overrides in rounds({path: rule.silent for path, rule in MAPPED.items() if path not in PARENTS}):
        load(*overrides)
    assert caplog.messages == []


def test_mirrored_keys_must_agree() -> None:
    assert load(*(f"{path}=${{{rule.of}}}" for path, rule in MIRRORS.items())) == load()
    lines = error(*(f"{path}=99" for path in MIRRORS)).splitlines()
    assert len(lines) == len(MIRRORS)
    for line in lines:
        of = MIRRORS[line.partition("=")[0]].of
        assert f"=99 differs from {of}=" in line and line.endswith(f"set {of} alone")


def test_renamed_keys(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert {path for path, rule in RULES.items() if isinstance(rule, Renamed)} == {
        "model.dpo.average_log_probs", "model.data.index_mapping_dir", "model.bias_gelu_fusion"
    }  # fmt: skip
    cfg = load("++model.dpo.average_log_probs=true", "model.data.index_mapping_dir=idx")
    assert cfg.model.dpo.preference_average_log_probs and cfg.model.dpo.sft_average_log_probs
    assert cfg.model.data.cache_dir == "idx"
    assert len(caplog.messages) == 2
    assert load("model.data.index_mapping_dir=null", "model.data.cache_dir=here").model.data.cache_dir == "here"


@pytest.mark.parametrize(("path", "old"), [(path, old) for path, values in VALUES.items() for old in values])
def test_values_of_nemo_are_translated(path: str, old: object, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    new, notice = VALUES[path][old]
    assert load(f"{path}={old}") == load(f"{path}={new}")
    assert caplog.messages == [f"{path}={old}: {notice}"]


def test_no_rule_is_shadowed_by_the_schema() -> None:
    """A rule for a key of the schema would never be looked up."""
    assert not RULES.keys() & schema_keys().keys()
    assert VALUES.keys() <= schema_keys().keys()


def test_sequence_parallel_without_tensor_parallel_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert load("model.sequence_parallel=true").model.sequence_parallel is False
    assert caplog.messages == [
        "model.sequence_parallel: switched off, for it needs model.tensor_model_parallel_size of at least 2"
    ]
    assert load("model.sequence_parallel=true", "model.tensor_model_parallel_size=2").model.sequence_parallel is True


OF_SGD = "not used by model.optim.name=sgd"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, []),
        ({"name": "sgd"}, []),
        ({"name": "sgd", "betas": "[0.9, 0.95]"}, [f"model.optim.betas: {OF_SGD}"]),
        ({"name": "sgd", "betas": "[0.9, 0.95]", "eps": 1e-5}, [f"model.optim.betas, model.optim.eps: {OF_SGD}"]),
        ({"betas": "[0.9, 0.95]", "eps": 1e-5}, []),
        ({"sched.name": "linear"}, ["model.optim.sched.constant_steps: not used by model.optim.sched.name=linear"]),
        ({"sched.name": "linear", "sched.constant_steps": 0}, []),
        (
            {"sched.name": "constant"},
            ["model.optim.sched.constant_steps, model.optim.sched.min_lr: not used by model.optim.sched.name=constant"],
        ),
        ({"sched.name": "constant", "sched.constant_steps": 0, "sched.min_lr": 0}, []),
    ],
)
def test_what_the_optimizer_or_the_schedule_does_not_use_is_said(
    overrides: dict[str, object], expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load(*(f"model.optim.{key}={value}" for key, value in overrides.items()))
    assert caplog.messages == expected


def test_a_limit_on_skips_that_are_not_made_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load("trainer.dpo.max_consecutive_skips=3")
    load("trainer.dpo.max_consecutive_skips=3", "trainer.dpo.on_nonfinite=skip")
    assert caplog.messages == ["trainer.dpo.max_consecutive_skips: not used by trainer.dpo.on_nonfinite=stop"]


STOCK = ["target_modules=[attention_qkv]", "adapter_dim=32", "adapter_dropout=0.0", "layer_selection=null"]
TUNING = "model.peft.lora_tuning."


@pytest.mark.parametrize(
    ("scheme", "overrides", "expected"),
    [
        ("none", STOCK, ""),
        ("null", [*STOCK, "alpha=32"], ""),
        ("none", ["adapter_dim=16", "alpha=32", "target_modules=[all]"], "target_modules, adapter_dim"),
        ("null", ["layer_selection=[1]"], "layer_selection"),
        ("lora", ["adapter_dim=16", "column_init_method=normal"], ""),
    ],
)
def test_adapter_keys_without_adapter_are_said_unless_they_are_nemos_stock_values(
    scheme: str, overrides: list[str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load(f"model.peft.peft_scheme={scheme}", *(TUNING + override for override in overrides))
    keys = ", ".join(TUNING + name for name in expected.split(", "))
    assert caplog.messages == ([f"{keys}: not used by model.peft.peft_scheme=none"] if expected else [])


def test_start_values_beside_an_adapter_file_are_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    restored = ["model.peft.peft_scheme=lora", "model.peft.restore_from_path=a.nemo", TUNING + "adapter_dropout=0.1"]
    load(*restored)
    assert caplog.messages == []
    load(*restored, TUNING + "row_init_method=normal")
    assert caplog.messages == [f"{TUNING}row_init_method: not used by model.peft.restore_from_path=a.nemo"]


def test_mistyped_key_is_refused_fast_and_without_torch() -> None:
    program = (
        "import sys\nfrom nemo_dpo.config import ConfigError, load_config\n"
        f"try:\n    load_config({str(CONF)!r}, 'gpt_dpo', ['++model.dpo.ref_policy_kl_penaltyy=0.1'])\n"
        "except ConfigError as error:\n    print(error)\n"
        "print([name for name in ('torch', 'numpy', 'megatron', 'lightning') if name in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert run.stdout.splitlines() == [
        "unknown key model.dpo.ref_policy_kl_penaltyy; did you mean model.dpo.ref_policy_kl_penalty?", "[]"
    ]  # fmt: skip
    # Of the processor, so that a busy host does not matter: about 0.35; importing torch alone takes over 1.
    assert seconds < 1


def test_exp_manager_section_has_the_keys_of_nemos() -> None:
    from dataclasses import fields

    from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig

    from nemo_dpo.config.exp_manager import OWN_KEYS, nemo_options

    def known(section: str) -> set[str]:
        paths = [path.removeprefix(section) for path in [*schema_keys(), *RULES] if path.startswith(section)]
        return {path.partition(".")[0] for path in paths}

    assert known("exp_manager.") - set(OWN_KEYS) == {item.name for item in fields(ExpManagerConfig)}
    assert known("exp_manager.checkpoint_callback_params.") == {item.name for item in fields(CallbackParams)}
    options = nemo_options(load().exp_manager)
    assert options.keys() <= {item.name for item in fields(ExpManagerConfig)}
    assert options["create_preemption_callback"] is False
    assert options["create_checkpoint_callback"] is False and "checkpoint_callback_params" not in options

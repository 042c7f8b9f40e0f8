"""Checks of values against each other, the ranks and the checkpoint; the parsed data_prefix; the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.config import (
    CommandLine,
    Config,
    ConfigError,
    Source,
    check,
    check_layout,
    check_model,
    checks,
    data_sources,
    layout_notice,
    load_config,
    parse_cli,
    show_config,
)
from nemo_dpo.config.keys import schema_keys
from nemo_dpo.config.limits import LIMITS

CONF = Path(__file__).parents[2] / "conf"
Load = Callable[..., Config]
LORA = "model.peft.peft_scheme=lora"

# SmolLM2-135M's shapes.
MODEL = {
    "num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 9, "num_query_groups": 3,
    "max_position_embeddings": 8192, "encoder_seq_length": 8192, "tokenizer": {"library": "huggingface", "type": "x"},
}  # fmt: skip


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """``load(*overrides, name=…)``: a yaml of the repository with a checkpoint and data that exist."""
    for name in ("model.nemo", "train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text("")
    data = f"{{train: [{tmp_path}/train.jsonl], validation: [{tmp_path}/valid.jsonl]}}"
    files = [f"pretrained_checkpoint.restore_from_path={tmp_path}/model.nemo", f"model.data.data_prefix={data}"]
    return lambda *overrides, name="gpt_dpo": load_config(CONF, name, [*files, *overrides])


def error(judge: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        judge()
    return str(caught.value)


def test_a_complete_configuration_passes(load: Load) -> None:
    check(load())
    check(load("trainer.num_nodes=1", "trainer.devices=8", "++model.global_batch_size=512", "trainer.accelerator=gpu"))
    check_layout(load(), 1)
    check_model(load(), MODEL)


def test_bare_command_names_all_that_is_missing_and_the_override() -> None:
    bare = load_config(CONF, "gpt_dpo", ["++model.dpo.ref_policy_kl_penalty=0.1"])
    assert error(lambda: check(bare)) == (
        "missing: a checkpoint to start from and preference pairs. Add to the command, or to the yaml: "
        "pretrained_checkpoint.restore_from_path=/path/model.nemo "
        '"model.data.data_prefix={train: [/path/train.jsonl], validation: [/path/valid.jsonl]}"'
    )


def test_only_what_is_missing_is_named(load: Load) -> None:
    text = error(lambda: check(load("model.data.data_prefix=null")))
    assert text.startswith("missing: preference pairs. ") and "restore_from_path" not in text


BEYOND = [
    ("trainer.num_nodes", 0), ("trainer.devices", 0), ("trainer.devices", "many"), ("trainer.accelerator", "tpu"),
    ("trainer.precision", "fp16"), ("trainer.max_time", "1h"), ("trainer.log_every_n_steps", 0),
    ("trainer.dpo.max_epochs", 0), ("trainer.dpo.max_steps", 0), ("trainer.dpo.max_steps", -2),
    ("trainer.dpo.val_check_interval", 0), ("trainer.dpo.val_check_interval", 1.5),
    ("trainer.dpo.val_check_interval", 0.0),
    ("trainer.dpo.save_interval", 0), ("trainer.dpo.limit_train_batches", 0), ("trainer.dpo.limit_val_batches", 1.1),
    ("trainer.distributed_timeout_minutes", 0.0), ("trainer.dpo.on_nonfinite", "ignore"),
    ("trainer.dpo.max_consecutive_skips", 0),
    ("trainer.dpo.gradient_clip_val", -1.0), ("exp_manager.max_time_per_run", "10:00"),
    ("exp_manager.checkpoint_callback_params.mode", "best"), ("exp_manager.checkpoint_callback_params.save_top_k", -2),
    ("model.micro_batch_size", 0), ("model.global_batch_size", 0), ("model.tensor_model_parallel_size", 0),
    ("model.pipeline_model_parallel_size", 0), ("model.virtual_pipeline_model_parallel_size", 0),
    ("model.activations_checkpoint_granularity", "some"), ("model.activations_checkpoint_method", "all"),
    ("model.expert_model_parallel_size", 0), ("model.moe_router_load_balancing_type", "sinkhorn"),
    ("model.moe_aux_loss_coeff", -0.1),
    ("model.activations_checkpoint_num_layers", 0), ("model.hidden_dropout", 1.0), ("model.attention_dropout", -0.1),
    ("model.seed", -1), ("model.encoder_seq_length", 0),
    ("model.dpo.ref_policy_kl_penalty", 0.0), ("model.dpo.ref_policy_kl_penalty", -0.1),
    ("model.dpo.ref_policy_kl_penalty", "nan"), ("model.dpo.ref_policy_kl_penalty", "inf"),
    ("model.dpo.preference_loss", "hinge"), ("model.dpo.preference_loss_weight", -1.0),
    ("model.dpo.sft_loss_weight", -1.0),
    ("model.dpo.gt_reward_scale", 0.0), ("model.dpo.log_prob_forward_micro_batch_size", 0),
    ("model.dpo.reference.kind", "disk"), ("model.dpo.reference.kind", "adapter:"),
    ("model.dpo.reference.kind", "adapter:a-b"), ("model.dpo.reference.kind", "cached:cached"),
    ("model.peft.peft_scheme", "ia3"), ("model.peft.base_quantization", "int8"),
    ("model.peft.frozen_adapters", "{policy: a.nemo}"), ("model.peft.frozen_adapters", "{a-b: a.nemo}"),
    ("model.peft.lora_tuning.target_modules", "[]"), ("model.peft.lora_tuning.target_modules", "[mlp, q_proj]"),
    ("model.peft.lora_tuning.adapter_dim", 0), ("model.peft.lora_tuning.alpha", 0.0),
    ("model.peft.lora_tuning.variant", "peft"), ("model.peft.lora_tuning.layer_selection", "[]"),
    ("model.peft.lora_tuning.layer_selection", "[0, 1]"), ("model.peft.lora_tuning.layer_selection", "[2, 2]"),
    ("model.peft.lora_tuning.adapter_dropout", 1.0), ("model.peft.lora_tuning.dropout_position", "both"),
    ("model.peft.lora_tuning.column_init_method", "ones"), ("model.peft.lora_tuning.row_init_method", "ones"),
    ("model.optim.name", "lion"), ("model.optim.lr", 0.0),
    ("model.optim.weight_decay", -0.1), ("model.optim.betas", "[0.9]"), ("model.optim.betas", "[0.9, 1.0]"),
    ("model.optim.eps", 0.0), ("model.optim.momentum", 1.0), ("model.optim.sched.name", "cosine"),
    ("model.optim.sched.warmup_steps", -1), ("model.optim.sched.warmup_ratio", 1.0),
    ("model.optim.sched.constant_steps", -1), ("model.optim.sched.min_lr", -1e-7), ("model.data.seq_length", 1),
    ("model.data.overlong", "cut"), ("model.data.invalid", "ignore"), ("model.data.default_chosen_reward", "inf"),
    ("model.data.default_rejected_reward", "nan"), ("model.data.pad_length_to_multiple_of", 0),
]  # fmt: skip


def test_values_beyond_their_limits(load: Load) -> None:
    # All keys at once, for an error has a line for each; keys with several bad values take several rounds.
    values: dict[str, list[object]] = {}
    for key, value in BEYOND:
        values.setdefault(key, []).append(value)
    for n in range(max(map(len, values.values()))):
        tried = {key: bad[n] for key, bad in values.items() if n < len(bad)}
        lines = error(lambda tried=tried: check(load(*(f"{key}={bad}" for key, bad in tried.items())))).splitlines()
        assert {line.partition("=")[0]: line.endswith(LIMITS[line.partition("=")[0]].text) for line in lines} == (
            dict.fromkeys(tried, True)
        )


def test_every_limit_is_tried_and_belongs_to_a_key() -> None:
    assert {key for key, _ in BEYOND} == LIMITS.keys()
    assert LIMITS.keys() <= schema_keys().keys()


@pytest.fixture
def sft(tmp_path: Path) -> list[str]:
    """LoRA from an adapter that exists, the same as the frozen adapter `sft`."""
    (tmp_path / "sft.nemo").write_text("")
    file = tmp_path / "sft.nemo"
    return [LORA, f"model.peft.restore_from_path={file}", f"+model.peft.frozen_adapters.sft={file}"]


def test_the_files_for_adapters(load: Load, sft: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    check(load(name="gpt_dpo_lora"))
    check(load(sft[1], name="gpt_dpo_qlora"))
    lines = error(lambda: check(load(name="gpt_dpo_qlora"))).splitlines()
    assert [line.partition("=")[0] for line in lines] == [
        "model.peft.restore_from_path", "model.peft.frozen_adapters.reference"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["frozen", "cached", "cached:frozen"])
def test_references_of_a_run_without_adapter(kind: str, load: Load) -> None:
    check(load(f"model.dpo.reference.kind={kind}"))


@pytest.mark.parametrize(
    "kind", ["frozen", "adapter_off", "adapter:sft", "cached", "cached:adapter_off", "cached:adapter:sft"]
)
def test_references_of_a_run_with_adapters(kind: str, load: Load, sft: list[str]) -> None:
    check(load(*sft, f"model.dpo.reference.kind={kind}"))


def test_default_of_the_reference(load: Load) -> None:
    def kind_of(scheme: str, kind: str) -> str:
        return load(f"model.peft.peft_scheme={scheme}", f"model.dpo.reference.kind={kind}").model.reference_kind

    plain = {"null": "frozen", "cached": "cached:frozen", "frozen": "frozen"}
    lora = {"null": "adapter_off", "cached": "cached:adapter_off", "frozen": "frozen"}
    for scheme, expected in {"null": plain, "none": plain, "lora": lora}.items():
        assert {kind: kind_of(scheme, kind) for kind in expected} == expected, scheme


def test_four_bits_need_bitsandbytes(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(LORA, "model.peft.base_quantization=nf4")
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    assert error(lambda: check(cfg)) == (
        "model.peft.base_quantization=nf4 needs bitsandbytes, which is not installed; pip install bitsandbytes"
    )
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    check(cfg)


@pytest.mark.parametrize(("interval", "save"), [("0.1", 100), ("1.0", 3), ("7", 3), ("3", 7), ("1", 1)])
def test_any_combination_of_intervals_is_legal(interval: str, save: int, load: Load) -> None:
    check(load(f"trainer.dpo.val_check_interval={interval}", f"trainer.dpo.save_interval={save}"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["model.dpo.preference_loss_weight=0"],
            ["preference_loss_weight=0", "sft_loss_weight=0", "greater than 0"],
        ),
        (["model.optim.sched.warmup_ratio=0.1"], ["warmup_steps=10", "warmup_ratio=0.1", "null"]),
        (["model.optim.lr=1e-7"], ["sched.min_lr=9e-07", "optim.lr=1e-07", "lower"]),
        (
            ["model.dpo.reference.cache_dir=x", "model.dpo.reference.kind=frozen"],
            ["cache_dir=x", "kind=frozen", "to cached or leave cache_dir out"],
        ),
        (["model.dpo.reference.kind=adapter_off"], ["kind=adapter_off needs an adapter", "peft_scheme=lora, or kind="]),
        (["model.dpo.reference.kind=cached:adapter:x"], ["kind=cached:adapter:x needs an adapter"]),
        (
            [LORA, "model.dpo.reference.kind=cached:adapter:x"],
            ["frozen_adapters has no 'x' (known: none)", "add +model.peft.frozen_adapters.x="],
        ),
        (
            [LORA, "model.dpo.reference.kind=adapter:x", "+model.peft.frozen_adapters={a: /no/a.nemo, b: /no/b.nemo}"],
            [
                "has no 'x' (known: a, b)",
                "model.peft.frozen_adapters.a=/no/a.nemo does not exist",
                "model.peft.frozen_adapters.b=/no/b.nemo does not exist; give an adapter .nemo",
            ],
        ),
        (["model.peft.restore_from_path=/no/a.nemo", LORA], ["model.peft.restore_from_path=/no/a.nemo does not exist"]),
        (
            [
                "model.peft.restore_from_path=a.nemo",
                "+model.peft.frozen_adapters.sft=a.nemo",
                "model.peft.base_quantization=nf4",
            ],
            [
                "model.peft.restore_from_path=a.nemo has no effect",
                "model.peft.frozen_adapters={'sft': 'a.nemo'} has no effect",
                "model.peft.base_quantization=nf4 has no effect; set model.peft.peft_scheme=lora or leave it out",
            ],
        ),
        (["model.transformer_engine=true", LORA], ["model.transformer_engine=true: adapters are not offered", "null"]),
        (["model.optim.momentum=0.9"], ["momentum=0.9", "mcore_distributed_optim", "betas"]),
        (["exp_manager.exp_dir=exps"], ["exp_dir=exps", "explicit_log_dir=results", "null"]),
        (["exp_manager.version=1"], ["version=1", "explicit_log_dir=results", "null"]),
        (
            ["exp_manager.checkpoint_callback_params.model_parallel_size=4"],
            ["model_parallel_size=4", "= 1", "leave it out"],
        ),
        (
            ["model.virtual_pipeline_model_parallel_size=2"],
            ["virtual_pipeline_model_parallel_size=2", "of at least 2, not 1", "null"],
        ),
        (["exp_manager.checkpoint_callback_params.monitor=val_los"], ["monitor=val_los is no figure", "val_loss?"]),
        (["exp_manager.checkpoint_callback_params.filename='a/{step}'"], ["filename=a/{step} gives", "without a /"]),
        (["exp_manager.resume_from_checkpoint=/no/c"], ["resume_from_checkpoint=/no/c is not a folder"]),
        (
            [
                "exp_manager.hf_export_on_train_end=true",
                "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false",
            ],
            ["hf_export_on_train_end=true", "save_nemo_on_train_end=false", "set that to true"],
        ),
        (
            [
                "exp_manager.create_checkpoint_callback=false",
                "exp_manager.checkpoint_callback_params.always_save_nemo=true",
            ],
            ["always_save_nemo=true", "create_checkpoint_callback=false", "no saves"],
        ),
        (["pretrained_checkpoint.restore_from_path=/no/x.nemo"], ["restore_from_path=/no/x.nemo", "does not exist"]),
        (
            ["model.data.data_prefix={train: [/no/t.jsonl], validation: [/no/v.jsonl]}"],
            ["train file /no/t.jsonl", "validation file /no/v.jsonl"],
        ),
        (
            ["trainer.devices=6", "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"],
            ["tensor_model_parallel_size=2 × model.pipeline_model_parallel_size=2 = 4", "ranks, 6", "trainer.devices"],
        ),
        (
            ["trainer.devices=4", "trainer.num_nodes=2", "model.global_batch_size=20", "model.micro_batch_size=2"],
            [
                "global_batch_size=20",
                "micro_batch_size=2 × 8 data-parallel ranks = 16",
                "set model.global_batch_size=16",
            ],
        ),
        (
            ["trainer.devices=2", "model.global_batch_size=8", "model.dpo.log_prob_forward_micro_batch_size=3"],
            ["log_prob_forward_micro_batch_size=3 must be model.micro_batch_size=1", "leave it out"],
        ),
    ],
)
def test_cross_checks(overrides: list[str], parts: list[str], load: Load) -> None:
    text = error(lambda: check(load(*overrides)))
    for part in parts:
        assert part in text


def test_all_problems_are_in_one_error(load: Load) -> None:
    text = error(
        lambda: check(load("model.seed=-1", "model.optim.lr=0", "pretrained_checkpoint.restore_from_path=null"))
    )
    assert [line.split("=")[0] for line in text.splitlines()[:2]] == ["model.seed", "model.optim.lr"]
    assert text.splitlines()[2].startswith("missing: a checkpoint")


def test_layout_counts_data_parallel_ranks_after_model_parallel(load: Load) -> None:
    cfg = load(
        "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", "model.global_batch_size=3"
    )
    check_layout(cfg, 4)
    check_layout(cfg, 12)
    assert "4 data-parallel ranks" in error(lambda: check_layout(cfg, 16))
    assert "ranks, 2;" in error(lambda: check_layout(cfg, 2))


def test_experts_are_shared_by_data_parallel_ranks(load: Load) -> None:
    cfg = load("model.tensor_model_parallel_size=2", "model.expert_model_parallel_size=4")
    check_layout(cfg, 8)
    text = error(lambda: check_layout(cfg, 4))
    assert "expert_model_parallel_size=4 must divide" in text and "= 2;" in text


EXPERTS = {"num_moe_experts": 6, "bias": False}


@pytest.mark.parametrize(
    ("overrides", "model", "parts"),
    [
        (["model.expert_model_parallel_size=2"], {}, ["expert_model_parallel_size=2 needs a model with experts"]),
        (["model.moe_aux_loss_coeff=0.1"], {}, ["moe_aux_loss_coeff=0.1 has no effect", "no experts"]),
        (["model.moe_router_load_balancing_type=none"], {}, ["balancing_type=none has no effect", "no experts"]),
        (["model.expert_model_parallel_size=4"], EXPERTS, ["=4 must divide", "num_moe_experts=6", "1, 2, 3, 6"]),
        (["model.tensor_model_parallel_size=3"], EXPERTS, ["=3 with experts needs model.sequence_parallel=true"]),
        (["model.transformer_engine=true"], EXPERTS, ["experts are not offered in Transformer Engine's", "null"]),
        (
            [LORA, "model.peft.lora_tuning.target_modules=[attention, mlp_fc2]"],
            EXPERTS,
            ["mlp_fc2 names experts", "use attention,"],
        ),
        ([LORA, "model.peft.lora_tuning.target_modules=[all]"], EXPERTS, ["all names experts"]),
        ([LORA, "model.peft.base_quantization=nf4"], EXPERTS, ["base_quantization=nf4 is not offered", "null"]),
    ],
)
def test_experts(overrides: list[str], model: dict[str, Any], parts: list[str], load: Load) -> None:
    text = error(lambda: check_model(load(*overrides), {**MODEL, **model}))
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text


def test_what_goes_with_experts(load: Load) -> None:
    model = {**MODEL, **EXPERTS}
    check_model(load("model.expert_model_parallel_size=3", "model.moe_aux_loss_coeff=0"), model)
    check_model(load("model.tensor_model_parallel_size=3", "model.sequence_parallel=true"), model)
    check_model(load(LORA, "model.peft.lora_tuning.target_modules=[attention_dense]"), model)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.tensor_model_parallel_size=2"], ["tensor_model_parallel_size=2", "num_attention_heads=9", "1, 3, 9"]),
        (["model.pipeline_model_parallel_size=4"], ["pipeline_model_parallel_size=4", "num_layers=30", "5, 6, 10"]),
        (
            ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=4"],
            ["pipeline_model_parallel_size=2 × model.virtual_pipeline_model_parallel_size=4 = 8", "num_layers=30"],
        ),
        (["model.data.seq_length=9000"], ["seq_length=9000", "max_position_embeddings=8192", "or less"]),
        (["model.hidden_size=577"], ["model.hidden_size=577", "576", "leave model.hidden_size out"]),
        (["++model.rotary_base=1e5"], ["model.rotary_base=100000.0", "None"]),
        (["model.tokenizer={library: sentencepiece}"], ["model.tokenizer", "sentencepiece", "huggingface"]),
        (["model.activations_checkpoint_granularity=full"], ["activations_checkpoint_method=…", "num_layers=…"]),
        (["model.activations_checkpoint_method=uniform"], ["method=uniform has no effect", "granularity=full"]),
        (["model.activations_checkpoint_num_layers=2"], ["num_layers=2 has no effect", "granularity=full"]),
        (
            ["model.peft.lora_tuning.layer_selection=[30, 31, 2]"],
            ["layer_selection names layer 31", "the model has layers 1 to 30"],
        ),
        (
            [LORA, "model.peft.lora_tuning.layer_selection=[1, 15]", "model.pipeline_model_parallel_size=2"],
            ["layer_selection=[1, 15]: layers 16 to 30 have no adapter"],
        ),
        (
            [
                LORA,
                "model.peft.lora_tuning.layer_selection=[2, 6, 7, 8]",
                "model.pipeline_model_parallel_size=2",
                "model.virtual_pipeline_model_parallel_size=3",
            ],
            ["layers 11 to 15 have no adapter", "virtual_pipeline_model_parallel_size"],
        ),
        (
            [LORA, "model.tensor_model_parallel_size=9"],
            ["tensor_model_parallel_size=9 must divide the model's num_query_groups=3 with LoRA"],
        ),
    ],
)
def test_checks_against_the_checkpoint(overrides: list[str], parts: list[str], load: Load) -> None:
    text = error(lambda: check_model(load(*overrides), MODEL))
    for part in parts:
        assert part in text


def test_what_fits_the_checkpoint(load: Load) -> None:
    check_model(load("model.tensor_model_parallel_size=3", "model.pipeline_model_parallel_size=5"), MODEL)
    check_model(load("model.pipeline_model_parallel_size=5", "model.virtual_pipeline_model_parallel_size=3"), MODEL)
    # Nine ranks share three groups: megatron-core repeats them.
    assert "ffn_hidden_size=1536" in error(lambda: check_model(load("model.tensor_model_parallel_size=9"), MODEL))
    check_model(load("model.tensor_model_parallel_size=9"), {**MODEL, "ffn_hidden_size": 1539})
    check_model(load(LORA, "model.tensor_model_parallel_size=3"), MODEL)
    selected = "model.peft.lora_tuning.layer_selection=[15, 16]"
    check_model(load(LORA, selected, "model.pipeline_model_parallel_size=2"), MODEL)
    # Repeating the checkpoint's shapes is no change, and the checkpoint may say how to recompute.
    check_model(load("model.hidden_size=576", "model.tokenizer={library: huggingface}"), MODEL)
    recompute = {"activations_checkpoint_method": "uniform", "activations_checkpoint_num_layers": 1}
    check_model(load("model.activations_checkpoint_granularity=full"), {**MODEL, **recompute})


def test_another_layout_of_the_checkpoint_is_said_once(load: Load) -> None:
    held = {"tensor_model_parallel_size": 8, "sequence_parallel": True, "pipeline_model_parallel_size": 1}
    assert layout_notice(load(), {**MODEL, **held}) == (
        "layout: the checkpoint's configuration has tensor_model_parallel_size=8, sequence_parallel=True; this run has "
        "tensor_model_parallel_size=1, sequence_parallel=False, for only model.* keys set it"
    )
    same = ["model.tensor_model_parallel_size=8", "model.sequence_parallel=true"]
    assert layout_notice(load(*same), {**MODEL, **held}) == ""
    assert layout_notice(load(), {**MODEL, "virtual_pipeline_model_parallel_size": None}) == ""
    assert layout_notice(load(), {}) == ""
    assert "pipeline_model_parallel_size=1; this run has pipeline_model_parallel_size=5" in layout_notice(
        load("model.pipeline_model_parallel_size=5"), {}
    )


def test_groups_that_neither_divide_nor_are_divided(load: Load) -> None:
    shapes = {**MODEL, "num_attention_heads": 12, "num_query_groups": 6}
    text = error(lambda: check_model(load("model.tensor_model_parallel_size=4"), shapes))
    assert "num_query_groups=6" in text and "tensor_model_parallel_size=4" in text


def sources(prefix: object, splits: str | None = None) -> dict[str, list[Source]]:
    cfg = load_config(CONF, "gpt_dpo")
    data = replace(cfg.model.data, data_prefix=prefix, splits_string=splits)
    return data_sources(replace(cfg, model=replace(cfg.model, data=data)))


def test_data_prefix_by_split() -> None:
    assert sources({"train": ["a", "b"], "validation": "c"}) == {
        "train": [Source(Path("a")), Source(Path("b"))],
        "validation": [Source(Path("c"))],
    }
    weighted = sources({"train": [0.3, "a", "0.7", "b"], "validation": ["c"], "test": [1, "d"]})
    assert weighted["train"] == [Source(Path("a"), 0.3), Source(Path("b"), 0.7)]
    assert weighted["test"] == [Source(Path("d"), 1.0)]
    assert "test" not in sources({"train": ["a"], "validation": ["c"], "test": None})


def test_data_prefix_as_one_list_with_shares() -> None:
    split = sources(["a", "b"], "98,1,1")
    assert [source.span for source in split["train"]] == [(0.0, 0.98)] * 2
    assert [source.path.name for source in split["validation"]] == ["a", "b"]
    assert split["validation"][0].span == (0.98, 0.99) and split["test"][0].span == (0.99, 1.0)
    assert sources([2, "a"], "3,1") == {
        "train": [Source(Path("a"), 2.0, (0.0, 0.75))],
        "validation": [Source(Path("a"), 2.0, (0.75, 1.0))],
    }


@pytest.mark.parametrize(
    ("prefix", "splits", "part"),
    [
        (["a.jsonl"], None, "does not say which files are for validation"),
        ({"train": ["a"]}, None, "model.data.data_prefix.validation names no file"),
        ({"train": [], "validation": ["b"]}, None, "model.data.data_prefix.train names no file"),
        ({"train": ["a"], "valid": ["b"]}, None, "has no split 'valid'; did you mean validation?"),
        ({"train": ["a"], "validation": ["b"], "zzz": []}, None, "it has train, validation, test"),
        ({"train": [0.5, "a", "b"], "validation": ["b"]}, None, "every file needs one"),
        ({"train": [-1, "a"], "validation": ["b"]}, None, "positive"),
        ({"train": ["a", 1.0], "validation": ["b"]}, None, "before it"),
        ({"train": 5, "validation": ["b"]}, None, "is not a list of files"),
        ({"train": ["a"], "validation": ["b"]}, "98,1,1", "set model.data.splits_string=null"),
        (["a"], "98", "two or three shares"),
        (["a"], "98,x,1", "two or three shares"),
        (["a"], "98,0,2", "both positive"),
        ([], "98,1,1", "is not a list of files"),
    ],
)
def test_malformed_data_prefix(prefix: object, splits: str | None, part: str) -> None:
    text = error(lambda: sources(prefix, splits))
    assert part in text and "model.data." in text


def cli(*argv: str, script: str = "/x/train_gpt_dpo.py") -> CommandLine:
    return parse_cli(argv, CONF, "gpt_dpo", script)


def test_command_line_of_overrides() -> None:
    assert cli("a.b=1", "++c={x: [1, 2]}") == CommandLine(CONF, "gpt_dpo", ("a.b=1", "++c={x: [1, 2]}"))


@pytest.mark.parametrize(
    "argv",
    [["--config-path=/c", "--config-name", "mine.yaml"], ["-cp", "/c", "-cn=mine"], ["-cd", "/c", "-cn", "mine"]],
)
def test_flags_of_hydra(argv: list[str]) -> None:
    assert cli(*argv, "a=1") == CommandLine(Path("/c"), "mine", ("a=1",))


def test_relative_config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = str(tmp_path / "examples" / "train.py")
    # As hydra has it, beside the script; a folder of that name right here comes first.
    assert cli("--config-path=conf", script=script).config_dir == tmp_path / "examples" / "conf"
    (tmp_path / "conf").mkdir()
    assert cli("--config-path=conf", script=script).config_dir == Path("conf")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--multirun", "a=1"], "--multirun is not an option here; there are --config-path"),
        (["-m"], "-m is not an option here"),
        (["--info=all"], "--info=all is not an option here"),
        (["--cfg", "hydra"], "--cfg=hydra must be job"),
        (["--config-name"], "--config-name needs a value"),
        (["model.seed"], "'model.seed' is neither an option nor key=value"),
    ],
)
def test_other_flags_are_refused(argv: list[str], part: str) -> None:
    assert part in error(lambda: cli(*argv))


def test_help_lists_keys_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli("--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: train_gpt_dpo.py ") and "model.dpo.ref_policy_kl_penalty = 0.2" in text


def test_cfg_job_prints_the_effective_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = cli("--cfg", "job", "model.seed=7")
    assert command.show_config
    with pytest.raises(SystemExit):
        show_config(load_config(command.config_dir, command.config_name, command.overrides))
    (tmp_path / "out.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path, "out").model.seed == 7

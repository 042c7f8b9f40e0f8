"""A Mixtral through the command line: every layout trains the same model, or the same adapter of its attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest

from nemo_dpo.checkpoint import archive
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.convert import nemo_to_hf
from nemo_dpo.convert.adapter_nemo import dimensions_of, read_adapter
from nemo_dpo.convert.adapter_peft import export_peft, import_peft, nemo_to_peft
from tests.cli.conftest import Inputs
from tests.cli.test_equivalence import OPTIMIZERS, PP, RECOMPUTE, SCHEDULE, TP, Weights, keys, relative_error
from tests.model.expert_cases import MIXTRAL
from tests.model.model_cases import make_case
from tests.support.cli import Run, run_cli
from tests.support.tiny import VOCABULARY

STEPS = 4  # the last of 3 pairs, so that a micro-batch is half full
EP = "expert_model_parallel_size"
SP = "model.sequence_parallel=true"
# The auxiliary loss is as large as the preference loss, so that its scale shows.
PER_SEQUENCE = keys(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.3)
# Of a micro-batch it is the same in all layouts where these are the same everywhere: of one pair.
PER_MICRO_BATCH = keys(moe_aux_loss_coeff=0.3, micro_batch_size=1)
LORA = [
    *keys(**{"peft.peft_scheme": "lora", "peft.lora_tuning.adapter_dim": 8, "optim.lr": 0.003, "optim.eps": 0.0001}),
    "model.peft.lora_tuning.variant=canonical",
    "model.peft.lora_tuning.target_modules=[attention]",
]


TRAININGS = {
    "SGD": [*OPTIMIZERS["sgd"], *PER_SEQUENCE],
    "distributed Adam": [*OPTIMIZERS["mcore_distributed_optim"], *PER_SEQUENCE, "model.optim.sched.name=constant"],
    "one pair a micro-batch": [*OPTIMIZERS["sgd"], *PER_MICRO_BATCH],
    "LoRA": [*LORA, *PER_SEQUENCE],
}
REFERENCE = "one process"


@dataclass(frozen=True)
class Case:
    ranks: int = 1
    arguments: list[str] = field(default_factory=list)


FULL = {RECOMPUTE: "full", "activations_checkpoint_method": "uniform", "activations_checkpoint_num_layers": 1}
CASES = {
    REFERENCE: Case(),
    "DP 2": Case(2),
    "EP 2": Case(2, keys(**{EP: 2})),
    "EP 2 × TP 2 + SP": Case(4, [*keys(**{EP: 2, TP: 2}), SP]),
    "PP 2 × VPP 2": Case(2, keys(**{PP: 2, "virtual_pipeline_model_parallel_size": 2})),
    "EP 2, recompute full": Case(2, keys(**{EP: 2, **FULL})),
}
STAGES = "PP 2 × VPP 2"
RUNS = [
    *(("SGD", name) for name in CASES if name not in (REFERENCE, STAGES)),
    pytest.param("SGD", STAGES, marks=pytest.mark.slow),
    ("distributed Adam", "EP 2"),
    ("one pair a micro-batch", "EP 2"),
    ("LoRA", "EP 2"),
]


@pytest.fixture(scope="module")
def mixtral(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("mixtral")
    make_case(folder, "mixtral", MIXTRAL)
    return replace(inputs, nemo=folder / "model.nemo")


def run(inputs: Inputs, log_dir: Path, training: str, name: str, *more: str, check: bool = True) -> Run:
    case = CASES[name]
    return run_cli(
        [
            *inputs.arguments(),
            *SCHEDULE,
            f"trainer.dpo.max_steps={STEPS}",
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
            f"trainer.devices={case.ranks}",
            *TRAININGS[training],
            *case.arguments,
            *more,
        ],
        log_dir,
        check=check,
    )


Train = Callable[[str, str], Run]


@pytest.fixture(scope="module")
def train(mixtral: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """(training, case) → the run, made once."""
    return cache(lambda training, name: run(mixtral, tmp_path_factory.mktemp("run"), training, name))


def nemo_of(done: Run) -> Path:
    return done.log_dir / "checkpoints" / "megatron_gpt.nemo"


def weights_of(nemo: Path) -> Weights:
    """All parameters, of the vocabulary the real rows."""
    with archive.open_folder(nemo) as folder:
        weights = dict(read_weights(folder / archive.MODEL_WEIGHTS))
    padded = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: tensor[:VOCABULARY] if name.endswith(padded) else tensor for name, tensor in weights.items()}


def update(done: Run, training: str, start: Path) -> Weights:
    """What training has changed: every parameter, or the adapter's B's, which start at zero."""
    if training == "LoRA":
        adapter = read_adapter(nemo_of(done), dimensions_of(archive.read_model_config(start))).tensors
        return {name: tensor for name, tensor in adapter.items() if ".b." in name}
    before = weights_of(start)
    return {name: tensor.double() - before[name].double() for name, tensor in weights_of(nemo_of(done)).items()}


def assert_same(found: Run, expected: Run, *metrics: str) -> None:
    """fp32 in another order of summation, as in test_equivalence.py."""
    for metric in metrics or ("loss", "grad_norm", "load_balancing_loss"):
        series = expected.series("train", metric)
        assert len(series) == STEPS and found.series("train", metric) == pytest.approx(series, rel=1e-5), metric
    assert found.series("val", "loss") == pytest.approx(expected.series("val", "loss"), rel=1e-5)


@pytest.mark.parametrize("training", TRAININGS)
def test_the_reference_run_learns(train: Train, training: str) -> None:
    losses = train(training, REFERENCE).series("train", "loss")
    assert losses[0] == pytest.approx(math.log(2), rel=2e-7)
    assert sum(abs(loss - math.log(2)) >= 0.01 for loss in losses) >= 2


@pytest.mark.parametrize(("training", "name"), RUNS)
def test_same_training_in_every_layout(train: Train, mixtral: Inputs, training: str, name: str) -> None:
    expected, found = train(training, REFERENCE), train(training, name)
    assert_same(found, expected)
    ours, theirs = (update(done, training, mixtral.nemo) for done in (found, expected))
    assert relative_error(ours, theirs) <= 1e-4


@pytest.mark.parametrize("off", ["model.moe_aux_loss_coeff=0", "model.moe_router_load_balancing_type=none"])
def test_the_auxiliary_loss_is_trained_or_off(train: Train, mixtral: Inputs, tmp_path: Path, off: str) -> None:
    with_it = train("SGD", REFERENCE)
    without = run(mixtral, tmp_path / "off", "SGD", REFERENCE, off, "trainer.dpo.max_steps=1")
    first, other = (done.series("train", "grad_norm")[0] for done in (with_it, without))
    assert abs(first - other) > 0.01 * other
    assert "load_balancing_loss" in with_it.rows("train")[0] and "load_balancing_loss" not in without.rows("train")[0]


def test_experts_are_clipped_too(mixtral: Inputs, tmp_path: Path) -> None:
    """The norm is 12 or so, the limit 1: a first step of plain SGD is as long as the learning rate."""
    words = ["trainer.dpo.gradient_clip_val=1", "model.optim.weight_decay=0", "trainer.dpo.max_steps=1"]
    done = run(mixtral, tmp_path / "clipped", "SGD", "EP 2", *words)
    assert done.series("train", "grad_norm")[0] > 5
    squares = sum(float(change.square().sum()) for change in update(done, "SGD", mixtral.nemo).values())
    # Weights of size 0.2 in fp32 hold a change of 1e-3 spread over 200,000 of them to about 1e-3 of its length.
    assert math.sqrt(squares) == pytest.approx(0.001, rel=0.01)


def test_bf16_starts_where_the_reference_is(train: Train, mixtral: Inputs, tmp_path: Path) -> None:
    """Policy and reference choose the same experts, to the bit; the gradient is fp32's within bf16's 8 bits."""
    done = run(mixtral, tmp_path / "bf16", "SGD", "EP 2", "trainer.precision=bf16", "trainer.dpo.max_steps=1")
    exact = train("SGD", REFERENCE)
    assert done.series("train", "loss") == pytest.approx([math.log(2)], rel=2e-7)
    for metric in ("grad_norm", "load_balancing_loss"):
        assert done.series("train", metric)[0] == pytest.approx(exact.series("train", metric)[0], rel=0.05)


def test_a_cached_reference_under_expert_parallelism(train: Train, mixtral: Inputs, tmp_path: Path) -> None:
    """Every rank of an expert group takes part in every pass of the others."""
    cached = run(mixtral, tmp_path / "cached", "SGD", "EP 2", "model.dpo.reference.kind=cached")
    assert_same(cached, train("SGD", "EP 2"))


@pytest.mark.parametrize(("first", "then"), [("EP 2", REFERENCE), (REFERENCE, "EP 2")])
def test_a_run_goes_on_under_another_layout(
    train: Train, mixtral: Inputs, tmp_path: Path, first: str, then: str
) -> None:
    """Moments of experts and of all else; two steps before the resume, two behind it."""
    saving = ["exp_manager.create_checkpoint_callback=true", "trainer.dpo.save_interval=2"]
    run(mixtral, tmp_path / "run", "distributed Adam", first, *saving, "trainer.dpo.max_steps=2")
    other = run(mixtral, tmp_path / "run", "distributed Adam", then, "model.moe_aux_loss_coeff=0.2", check=False)
    assert other.status == 2 and "cannot resume: the routers' auxiliary loss was 0.3 × seq_aux_loss" in other.output
    done = run(mixtral, tmp_path / "run", "distributed Adam", then, *saving)
    assert "resuming from" in done.output
    expected = train("distributed Adam", REFERENCE)
    for metric in ("loss", "grad_norm"):
        assert done.series("train", metric) == pytest.approx(expected.series("train", metric), rel=1e-5), metric
    ours, theirs = (update(one, "distributed Adam", mixtral.nemo) for one in (done, expected))
    assert relative_error(ours, theirs) <= 1e-4


def test_the_trained_model_goes_back_to_transformers(train: Train, tmp_path: Path) -> None:
    """What four ranks have written loads without a missing expert."""
    from transformers import AutoModelForCausalLM

    nemo_to_hf(nemo_of(train("SGD", "EP 2 × TP 2 + SP")), tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert model.config.model_type == "mixtral" and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))


def test_the_trained_adapter_goes_to_peft_and_back(train: Train, mixtral: Inputs, tmp_path: Path) -> None:
    config = archive.read_model_config(mixtral.nemo)
    file = read_adapter(nemo_of(train("LoRA", "EP 2")), dimensions_of(config))
    peft, _ = export_peft(file, config)
    assert set(peft["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    nemo_to_peft(nemo_of(train("LoRA", "EP 2")), tmp_path / "peft")
    again = import_peft(tmp_path / "peft", config)
    assert again.spec == file.spec and all(again.tensors[name].equal(tensor) for name, tensor in file.tensors.items())


def test_adapters_of_experts_are_refused_before_any_work(mixtral: Inputs, tmp_path: Path) -> None:
    words = [*mixtral.arguments(), "model.peft.peft_scheme=lora", "model.peft.lora_tuning.target_modules=[all]"]
    done = run_cli([*words, "trainer.devices=1"], tmp_path / "run", check=False)
    assert done.status == 2 and "all names experts, which can have no adapters" in done.output
    assert not (tmp_path / "run" / "data_train.json").exists()

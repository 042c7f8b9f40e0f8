"""LoRA through the command line: all layouts train the same adapter, all kinds of reference give the same numbers."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_dpo.checkpoint import archive
from nemo_dpo.checkpoint.weights import Chunk, read_weights, write_weights
from nemo_dpo.convert.adapter_nemo import read_adapter
from nemo_dpo.convert.adapter_peft import import_peft
from nemo_dpo.lora.adapters import initial
from nemo_dpo.lora.spec import Dimensions, LoraSpec, linears_of
from tests.cli import lora_probes
from tests.cli.conftest import Inputs
from tests.cli.probes import Facts, read_facts
from tests.cli.test_equivalence import SCHEDULE, keys
from tests.support.cli import Run, run_cli

STEPS, SEED = 8, 1234
DIMENSIONS = Dimensions(layers=4, hidden=64, ffn=128, heads=4, query_groups=2, head_channels=16, gated=True)
SPEC = LoraSpec(linears_of(["all"]), rank=8, alpha=8.0)
TP, PP, VPP = (f"model.{kind}_model_parallel_size=2" for kind in ("tensor", "pipeline", "virtual_pipeline"))
LORA = keys(**{"peft.peft_scheme": "lora", "peft.lora_tuning.adapter_dim": 8})
ALL = [*LORA, "model.peft.lora_tuning.target_modules=[all]"]
REFERENCE = "one process"


@dataclass(frozen=True)
class Case:
    arguments: list[str] = field(default_factory=list)
    ranks: int = 1
    tp: int = 1
    chunks: tuple[int, ...] = (4,)


CASES = {
    REFERENCE: Case(),
    "TP 2": Case([TP], 2, tp=2),
    "TP 2 + SP": Case([TP, "model.sequence_parallel=true"], 2, tp=2),
    "PP 2": Case([PP], 2, chunks=(2,)),
    "PP 2 × VPP 2": Case([PP, VPP], 2, chunks=(1, 1)),
    "DP 2": Case([], 2),
    "recompute full": Case(
        keys(
            activations_checkpoint_granularity="full",
            activations_checkpoint_method="uniform",
            activations_checkpoint_num_layers=1,
        )
    ),
}
# B starts at zero, so that A's first gradient is zero and B's is far from Adam's ε; see test_equivalence.
TRAININGS = {
    "nemo, distributed Adam": [*ALL, *keys(**{"optim.lr": 0.003, "optim.eps": 0.0001})],
    "canonical, SGD": [
        *ALL,
        *keys(**{"peft.lora_tuning.variant": "canonical", "peft.lora_tuning.alpha": 32}),
        *keys(**{"optim.name": "sgd", "optim.lr": 0.01, "optim.momentum": 0.9}),
        "trainer.dpo.gradient_clip_val=0",
    ],
}


@dataclass(frozen=True)
class Trained:
    run: Run
    tensors: dict[str, Tensor]
    start: dict[str, Tensor]
    facts: list[Facts]


Train = Callable[[str, str], Trained]


def adapter_path(run: Run) -> Path:
    return run.log_dir / "checkpoints" / "megatron_gpt.nemo"


def lora_run(inputs: Inputs, log_dir: Path, *arguments: str, ranks: int = 1, **options: object) -> Run:
    save = "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true"
    words = [*inputs.arguments(), *SCHEDULE, save, f"trainer.devices={ranks}", *arguments]
    return run_cli(words, log_dir, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def train(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """(training, case) → the run, made once."""
    done: dict[tuple[str, str], Trained] = {}

    def once(training: str, name: str) -> Trained:
        if (training, name) not in done:
            case, log_dir = CASES[name], tmp_path_factory.mktemp("run")
            arguments = [*TRAININGS[training], *case.arguments]
            run = lora_run(inputs, log_dir, *arguments, ranks=case.ranks, patches=["tests.cli.lora_probes:watch"])
            file = read_adapter(adapter_path(run), DIMENSIONS)
            start = initial(file.spec, DIMENSIONS, SEED)
            tensors = dict(file.tensors)
            done[training, name] = Trained(
                run, tensors, {key: start(key) for key in tensors}, lora_probes.read(log_dir)
            )
        return done[training, name]

    return once


def update(trained: Trained) -> Tensor:
    return torch.cat([(trained.tensors[n].double() - start.double()).flatten() for n, start in trained.start.items()])


@pytest.mark.parametrize("training", TRAININGS)
def test_the_reference_run_learns(train: Train, training: str) -> None:
    losses = train(training, REFERENCE).run.series("train", "loss")
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(2), rel=2e-7)
    assert sum(abs(loss - math.log(2)) >= 0.05 for loss in losses) >= 4


@pytest.mark.parametrize("name", [name for name in CASES if name != REFERENCE])
@pytest.mark.parametrize("training", TRAININGS)
def test_same_training_in_every_layout(train: Train, training: str, name: str) -> None:
    expected, found = train(training, REFERENCE), train(training, name)
    for metric in ("loss", "grad_norm"):
        reference = expected.run.series("train", metric)
        assert found.run.series("train", metric) == pytest.approx(reference, rel=1e-5), metric
    assert found.tensors.keys() == expected.tensors.keys()
    assert (update(found) - update(expected)).norm() <= 1e-4 * update(expected).norm()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", TRAININGS)
def test_adapters_are_trained_and_nothing_else(train: Train, training: str, name: str) -> None:
    case, ranks = CASES[name], train(training, name).facts
    assert len(ranks) == case.ranks
    for facts in ranks:
        assert facts["chunks"] == list(case.chunks)
        assert facts["trained"] and all(".adapters.policy." in key for key in facts["trained"])
        assert facts["with_gradient"] == facts["trained"]
        assert facts["adapter"]["b.q"] == [64 // case.tp, 8]
        assert len(set(facts["base"])) == 1 and len(facts["base"]) == 2, "the frozen weights have changed"
        assert len(set(facts["off"])) == 1 and len(facts["off"]) == 2, "the model without adapter has changed"
    assert update(train(training, name)).norm() > 0.1


def test_hf_export_of_an_adapter_is_pefts_folder(inputs: Inputs, tmp_path: Path) -> None:
    words = ["exp_manager.hf_export_on_train_end=true", "trainer.dpo.max_steps=2"]
    run = lora_run(inputs, tmp_path, *TRAININGS["canonical, SGD"], *words)
    exported = import_peft(tmp_path / "checkpoints" / "megatron_gpt_peft", archive.read_model_config(inputs.nemo))
    written = read_adapter(adapter_path(run), DIMENSIONS)
    assert exported.spec == written.spec and exported.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(exported.tensors[name], tensor) for name, tensor in written.tensors.items())


@pytest.fixture(scope="module")
def sft(train: Train) -> Path:
    """An adapter as supervised fine-tuning might leave it: B is not zero."""
    return adapter_path(train("nemo, distributed Adam", REFERENCE).run)


def logged(run: Run) -> list[float]:
    return [*run.series("train", "loss"), *run.series("train", "grad_norm"), *run.series("val", "loss")]


def reference(kind: str) -> str:
    return f"model.dpo.reference.kind={kind}"


@pytest.fixture(scope="module")
def new_adapter(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return lora_run(inputs, tmp_path_factory.mktemp("run"), *TRAININGS["nemo, distributed Adam"])


@pytest.mark.parametrize("kind", ["frozen", "adapter_off", "cached", "cached:frozen"])
def test_references_of_a_new_adapter_agree(new_adapter: Run, inputs: Inputs, tmp_path: Path, kind: str) -> None:
    run = lora_run(inputs, tmp_path, *TRAININGS["nemo, distributed Adam"], reference(kind))
    if kind.startswith("cached"):  # kept in fp32 as the others are, but computed in other micro-batches
        assert logged(run) == pytest.approx(logged(new_adapter), rel=1e-5)
    else:
        assert logged(run) == logged(new_adapter)
    assert run.series("train", "rewards_all_std")[0] == pytest.approx(0, abs=1e-4 if "cached" in kind else 0)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_named_reference_is_a_frozen_copy_of_it(sft: Path, inputs: Inputs, tmp_path: Path, tp: int) -> None:
    """Seed of two adapters: the SFT adapter once trained on, once frozen beside it as the reference."""
    start = ["model.peft.peft_scheme=lora", f"model.peft.restore_from_path={sft}", "model.optim.lr=0.001"]
    named = [f"+model.peft.frozen_adapters.sft={sft}"]
    layout = [f"model.tensor_model_parallel_size={tp}"]
    runs = {
        kind: lora_run(inputs, tmp_path / str(number), *start, *named, *layout, reference(kind), ranks=tp)
        for number, kind in enumerate(["frozen", "adapter:sft", "cached:adapter:sft", "adapter_off"])
    }
    assert logged(runs["adapter:sft"]) == logged(runs["frozen"])
    assert runs["frozen"].series("train", "loss")[0] == pytest.approx(math.log(2), rel=2e-7)
    assert logged(runs["cached:adapter:sft"]) == pytest.approx(logged(runs["frozen"]), rel=1e-5)
    assert abs(runs["adapter_off"].series("train", "loss")[0] - math.log(2)) > 0.05


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("kind", ["frozen", "adapter_off"])
@pytest.mark.parametrize("layout", [[], [TP], [TP, "model.sequence_parallel=true"], [PP]])
def test_policy_is_the_reference_before_the_first_update(
    inputs: Inputs, tmp_path: Path, layout: list[str], kind: str, precision: str
) -> None:
    # A learning rate that is seen in bf16 log-probs after one step.
    changes = [reference(kind), f"trainer.precision={precision}", "model.optim.lr=1"]
    arguments = [*TRAININGS["canonical, SGD"], *layout, *changes]
    ranks, patches = 2 if layout else 1, ["tests.cli.probes:watch"]
    run = lora_run(inputs, tmp_path, *arguments, "trainer.dpo.max_steps=2", ranks=ranks, patches=patches)
    compared = [entry for facts in read_facts(tmp_path) for entry in facts["logps"]]
    assert compared and all(own == ref for steps, own, ref in compared if steps <= 1)
    assert any(own != ref for steps, own, ref in compared if steps == 2)
    assert run.series("train", "rewards_all_std")[0] == 0


SAVED = ["exp_manager.create_checkpoint_callback=true", "trainer.dpo.save_interval=4"]


@pytest.fixture(scope="module")
def stopped(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 8 steps that ended after 4, with dropout in the adapter."""
    arguments = [*DROPOUT, *SAVED, "trainer.dpo.max_steps=4", "model.optim.sched.name=constant"]
    return lora_run(inputs, tmp_path_factory.mktemp("run"), *arguments)


DROPOUT = [*TRAININGS["nemo, distributed Adam"], "model.peft.lora_tuning.adapter_dropout=0.1"]


def resume(inputs: Inputs, stopped: Run, log_dir: Path, *arguments: str, **options: object) -> Run:
    shutil.copytree(stopped.log_dir, log_dir, symlinks=True)
    words = [*SAVED, "model.optim.sched.name=constant", *arguments]
    return lora_run(inputs, log_dir, *words, **options)  # type: ignore[arg-type]


def test_a_resumed_run_is_the_one_that_went_through(inputs: Inputs, stopped: Run, tmp_path: Path) -> None:
    whole = lora_run(inputs, tmp_path / "whole", *DROPOUT, *SAVED, "model.optim.sched.name=constant")
    resumed = resume(inputs, stopped, tmp_path / "resumed", *DROPOUT)
    assert [row["step"] for row in resumed.rows("train")] == list(range(STEPS))
    for metric in ("loss", "grad_norm", "rewards/margins"):
        assert resumed.series("train", metric) == whole.series("train", metric)
    left, right = (read_adapter(adapter_path(run), DIMENSIONS).tensors for run in (resumed, whole))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_checkpoint_is_of_the_adapter_alone(stopped: Run) -> None:
    """The tensors themselves, Adam's two moments and the copies that it updates."""
    (folder,) = (stopped.log_dir / "checkpoints").glob("*step=4*")
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    numbers = [entry.size.numel() for entry in stored.values() if isinstance(entry, TensorStorageMetadata)]
    assert sum(numbers) == 4 * sum(math.prod(shape) for shape in SPEC.shapes(DIMENSIONS).values())


@pytest.mark.parametrize("layout", [[TP], [PP]])
def test_an_adapter_goes_on_in_another_layout(inputs: Inputs, stopped: Run, tmp_path: Path, layout: list[str]) -> None:
    no_dropout = [*TRAININGS["nemo, distributed Adam"], "trainer.dpo.max_steps=7"]
    expected = resume(inputs, stopped, tmp_path / "one", *no_dropout)
    found = resume(inputs, stopped, tmp_path / "two", *no_dropout, *layout, ranks=2)
    assert len(found.series("train", "loss")) == 7
    assert found.series("train", "loss") == pytest.approx(expected.series("train", "loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.peft.lora_tuning.adapter_dim=4", "cannot resume: the adapter's adapter_dim was 8"),
        (
            "model.peft.lora_tuning.target_modules=[mlp]",
            "cannot resume: the adapter's target_modules was ['attention_qkv', ",
        ),
        ("model.peft.lora_tuning.variant=canonical", "cannot resume: the adapter's variant was nemo"),
        ("model.peft.base_quantization=nf4", "cannot resume: the base's quantization was none"),
    ],
)
def test_another_adapter_does_not_resume(
    inputs: Inputs, stopped: Run, tmp_path: Path, change: str, message: str
) -> None:
    run = resume(inputs, stopped, tmp_path / "run", *DROPOUT, change, check=False)
    assert run.status == 2 and message in run.output
    assert "Traceback" not in run.output


def test_killed_while_its_adapter_is_written_a_run_starts_clean(inputs: Inputs, tmp_path: Path) -> None:
    """What the kill left beside the adapter is gone after the next start, and what is none of ours is not."""
    words, checkpoints = [*LORA, "model.optim.lr=0.001", "trainer.dpo.max_steps=1"], tmp_path / "checkpoints"
    killed = lora_run(
        inputs, tmp_path, *words, check=False, patches=["tests.cli.broken_host:kill_while_packing_an_adapter"]
    )
    assert killed.status == -signal.SIGKILL, killed.output
    assert list(checkpoints.glob(".megatron_gpt.nemo.*/content"))
    (checkpoints / ".megatron_gpt_peft.0a1b2c3d" / "content").mkdir(parents=True)  # of the export as PEFT's folder
    (checkpoints / ".keep").touch()
    lora_run(inputs, tmp_path, *words)
    assert sorted(path.name for path in checkpoints.iterdir()) == [".keep", "megatron_gpt.nemo"]


def base_with(inputs: Inputs, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The model extracted to `folder`, its weights changed in place."""
    with archive.open_folder(inputs.nemo) as base:
        shutil.copytree(base, folder, dirs_exist_ok=True)
    weights = dict(read_weights(folder / archive.MODEL_WEIGHTS))
    change(weights)
    shutil.rmtree(folder / archive.MODEL_WEIGHTS)
    write_weights(folder / archive.MODEL_WEIGHTS, (Chunk(name, tensor) for name, tensor in weights.items()))
    return folder


def test_an_adapter_of_another_base_is_refused(inputs: Inputs, sft: Path, stopped: Run, tmp_path: Path) -> None:
    norm = "model.decoder.final_layernorm.weight"
    other = base_with(inputs, tmp_path / "base", lambda weights: weights[norm][3].add_(1))
    base = f"pretrained_checkpoint.restore_from_path={other}"
    restored = [*LORA[:1], f"model.peft.restore_from_path={sft}"]
    run = lora_run(inputs, tmp_path / "run", *restored, "model.optim.lr=0.001", base, check=False)
    assert run.status == 2 and "was trained on base weights" in run.output
    run = resume(inputs, stopped, tmp_path / "resumed", *DROPOUT, base, check=False)
    assert run.status == 2 and "cannot resume" in run.output


def test_an_adapter_that_leaves_a_stage_bare_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """megatron-core cannot save or resume a stage that trains nothing."""
    training = TRAININGS["canonical, SGD"]
    words = [*training, "model.peft.lora_tuning.layer_selection=[1]", "trainer.dpo.max_steps=1"]
    restored = [*LORA[:1], *training[-4:], f"model.peft.restore_from_path={tmp_path / 'one.nemo'}"]
    adapter_path(lora_run(inputs, tmp_path / "first", *words)).rename(tmp_path / "one.nemo")
    run = lora_run(inputs, tmp_path / "second", *restored, PP, ranks=2, check=False)
    assert run.status == 2 and run.output.count("layers 3 to 4 have no adapter") == 1 and "Traceback" not in run.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.peft.restore_from_path={sft}", "model.peft.lora_tuning.adapter_dim=4"], "has adapter_dim=8,"),
        (
            ["model.peft.restore_from_path={sft}", "model.peft.lora_tuning.target_modules=[mlp]"],
            "this adapter has target_modules=[attention_qkv, attention_dense, mlp_fc1, mlp_fc2],",
        ),
        (["model.peft.restore_from_path={cut}"], "cut.nemo"),
        (["model.peft.restore_from_path={base}"], "is no LoRA adapter"),
        (["model.peft.restore_from_path=/nowhere/adapter.nemo"], "does not exist"),
        (["model.dpo.reference.kind=adapter:sft"], "model.peft.frozen_adapters has no 'sft'"),
        (["model.peft.peft_scheme=none", "model.dpo.reference.kind=adapter_off"], "needs an adapter"),
        (["model.peft.lora_tuning.layer_selection=[9]"], "the model has layers 1 to 4"),
        (["model.peft.lora_tuning.target_modules=[attention_kqv]"], "must be a list of attention_qkv"),
        ([TP.replace("=2", "=4")], "must divide the model's num_query_groups=2 with LoRA"),
    ],
)
def test_bad_input(inputs: Inputs, sft: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    cut = tmp_path / "cut.nemo"
    cut.write_bytes(sft.read_bytes()[: sft.stat().st_size // 2])
    words = [word.format(sft=sft, cut=cut, base=inputs.nemo) for word in arguments]
    ranks = 4 if "tensor" in words[0] else 1
    run = lora_run(inputs, tmp_path / "run", *LORA[:1], "model.optim.lr=0.001", *words, ranks=ranks, check=False)
    assert run.status == 2 and message in run.output, run.output
    assert "Traceback" not in run.output

"""Whatever a user gives: one line that says what to change, or a counted skip; and the last good checkpoint loads."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.checkpoint import manifest
from nemo_dpo.checkpoint.folders import UNFINISHED, read_progress
from tests.cli.launch_support import QUICK, Inputs, data, error_line, losses, make_inputs
from tests.support.cli import Run, run_cli
from tests.support.layouts import write_one_file, write_zarr

PATCHES = "tests.cli.broken_host"
PAIR = {"prompt": "Say it: ", "chosen_response": "yes.", "rejected_response": "no."}
# 12 steps of 2 pairs, in two epochs; saves after steps 4, 8 and 12 and validates before them.
LONG = ("model.global_batch_size=4", "trainer.dpo.max_epochs=2", "trainer.dpo.save_interval=4")
LONG += ("trainer.dpo.val_check_interval=4", "exp_manager.checkpoint_callback_params.save_top_k=0")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("bad_input"))


@pytest.fixture(scope="session")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run of LONG that nothing interrupts."""
    run = run_cli([*inputs.arguments, *LONG], tmp_path_factory.mktemp("whole"))
    return losses(run.log_dir)


def refused(arguments: list[str], folder: Path, *fragments: object, status: int = 2, patch: str = "") -> Run:
    """The command ends with `status` and one error line that holds all `fragments`."""
    run = run_cli(arguments, folder / "log", check=False, patches=[f"{PATCHES}:{patch}"] if patch else [])
    assert run.status == status, run.output
    message = error_line(run.output)
    assert [part for part in fragments if str(part) not in message] == [], message
    return run


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "+", "++"])
def test_a_mistyped_key_names_the_nearest_one(inputs: Inputs, tmp_path: Path, form: str) -> None:
    arguments = [*inputs.arguments, f"{form}model.global_batch_sise=4"]
    refused(arguments, tmp_path, "model.global_batch_sise", "did you mean model.global_batch_size?")


KEYS = {
    "unknown": (["++model.dpo.banana=1"], "unknown key model.dpo.banana; keys of model.dpo are ref_policy_kl_penalty"),
    "wrong_type": (["model.micro_batch_size=two"], "model.micro_batch_size='two' has the wrong type: expected"),
    "out_of_range": (["model.dpo.ref_policy_kl_penalty=-1"], "model.dpo.ref_policy_kl_penalty=-1.0 must be greater"),
    "not_here": (["trainer.strategy=fsdp"], "trainer.strategy='fsdp' is refused: FSDP and ZeRO are not offered"),
    "batch": (
        ["model.global_batch_size=6", "model.micro_batch_size=4"],
        "model.global_batch_size=6 must be a multiple of model.micro_batch_size=4 × 1 data-parallel ranks = 4; "
        "set model.global_batch_size=",
    ),
    "batch_of_two_ranks": (
        ["model.global_batch_size=6", "trainer.devices=2"],
        "model.global_batch_size=6 must be a multiple of model.micro_batch_size=2 × 2 data-parallel ranks = 4; ",
    ),
    "heads": (
        ["model.tensor_model_parallel_size=3", "trainer.devices=3"],
        "model.tensor_model_parallel_size=3 must divide the model's num_attention_heads=4; "
        "model.tensor_model_parallel_size may be 1, 2, 4",
    ),
    "layers": (
        ["model.pipeline_model_parallel_size=3", "trainer.devices=3"],
        "model.pipeline_model_parallel_size=3 must divide the model's num_layers=4, that is be one of 1, 2, 4",
    ),
    "ranks": (
        ["model.tensor_model_parallel_size=2"],
        "must divide the number of ranks, 1; change trainer.devices",
    ),
    "shape": (
        ["model.hidden_size=128"],
        "model.hidden_size=128 differs from the checkpoint's 64; the checkpoint decides",
    ),
    "recompute": (
        ["model.activations_checkpoint_granularity=full"],
        "model.activations_checkpoint_granularity=full also needs model.activations_checkpoint_method=",
    ),
    "ffn_dropout": (["model.ffn_dropout=0.1"], "model.ffn_dropout=0.1 is refused: megatron-core has no dropout inside"),
    "gpu": (["trainer.accelerator=gpu"], "trainer.accelerator=gpu but this host has no NVIDIA device; use"),
    "transformer_engine": (["model.transformer_engine=true"], "transformer_engine is not installed; use null or false"),
    "nodes": (["trainer.num_nodes=2"], "trainer.num_nodes=2 but this process was started alone; start one process per"),
    "time": (["exp_manager.max_time_per_run=5h"], "exp_manager.max_time_per_run='5h' must be DD:HH:MM:SS"),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_configuration_that_cannot_run(inputs: Inputs, tmp_path: Path, name: str) -> None:
    overrides, message = KEYS[name]
    refused([*inputs.arguments, *overrides], tmp_path, message)


HOSTS = {
    "no_ftfy": (
        ["model.data.apply_ftfy=true"],
        "model.data.apply_ftfy=true but ftfy is not installed; pip install",
    ),
    "one_accelerator": ([], "training on an accelerator has not been run yet (docs/gpu.md); add allow_unverified=true"),
    "two_ranks_started": (
        ["trainer.devices=4"],
        "trainer.devices=4 × trainer.num_nodes=1 is 4 ranks, but 2 were started; make the two agree",
    ),
    "half_a_torchrun": ([], "LOCAL_RANK='' in the environment is not the number that torchrun or srun sets"),
    "no_wandb_account": (
        ["exp_manager.create_wandb_logger=true"],
        "exp_manager.create_wandb_logger=true: No API key configured. Use `wandb login` to log in. "
        "Or export WANDB_API_KEY, or WANDB_MODE=offline",
    ),
}


@pytest.mark.parametrize("patch", HOSTS)
def test_a_host_that_lacks_what_is_asked_for(inputs: Inputs, tmp_path: Path, patch: str) -> None:
    overrides, message = HOSTS[patch]
    refused([*inputs.arguments, *overrides], tmp_path, message, patch=patch)


def test_results_that_cannot_be_written(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "results"
    arguments = [*inputs.arguments, f"exp_manager.explicit_log_dir={place}"]
    refused(arguments, tmp_path, f"the results folder {place} cannot be made", "set exp_manager.explicit_log_dir")


@pytest.mark.parametrize("name", ["file", "file/cache"])
def test_log_probs_that_cannot_be_written(inputs: Inputs, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / name
    arguments = [*inputs.arguments, "model.dpo.reference.kind=cached", f"model.dpo.reference.cache_dir={place}"]
    refused(arguments, tmp_path, f"the folder of log-probs {place} cannot be made", "set model.dpo.reference.cache_dir")


def test_wandb_offline_needs_no_account(inputs: Inputs, tmp_path: Path) -> None:
    options = ["exp_manager.create_wandb_logger=true", "++exp_manager.wandb_logger_kwargs.offline=true"]
    run = run_cli(
        [*inputs.arguments, *options, "trainer.dpo.max_steps=1"],
        tmp_path / "log",
        patches=[f"{PATCHES}:no_wandb_account"],
    )
    kept = (tmp_path / "log" / "wandb_run_id").read_text()
    assert [file for file in run.log_dir.rglob("*.wandb") if kept in file.name]


# --- the checkpoint to start from ----------------------------------------------------------------------------------


def with_checkpoint(inputs: Inputs, path: Path) -> list[str]:
    return [f"pretrained_checkpoint.restore_from_path={path}", data(inputs.train, inputs.valid), *QUICK]


def test_no_checkpoint_at_the_path(inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "none.nemo"
    refused(with_checkpoint(inputs, path), tmp_path, f"restore_from_path={path} does not exist; give a .nemo")


@pytest.mark.parametrize("keep", [0, 100, 5000, 0.5, 0.98], ids=str)
def test_a_truncated_checkpoint(inputs: Inputs, tmp_path: Path, keep: float) -> None:
    raw = inputs.nemo.read_bytes()
    path = tmp_path / "cut.nemo"
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(keep * len(raw))])
    run = refused(with_checkpoint(inputs, path), tmp_path, path, "truncated", "copy it again")
    assert not (run.log_dir / "checkpoints").exists()


def test_a_text_file_is_no_checkpoint(inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "text.nemo"
    path.write_text("this is the model\n" * 1000)
    refused(with_checkpoint(inputs, path), tmp_path, path, "not a .nemo archive")


@pytest.mark.parametrize("name", ["../escaped", "/tmp/nemo_dpo_escaped", "./model_weights/../../../escaped"])
def test_a_checkpoint_that_writes_elsewhere(inputs: Inputs, tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.nemo"
    shutil.copy(inputs.nemo, path)
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    refused(with_checkpoint(inputs, path), tmp_path, path, repr(name), "outside the target folder; not trusted")
    assert not Path("/tmp/nemo_dpo_escaped").exists()
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", None, "model_config.yaml lacks num_layers"),
        ("activation", "mish", "model_config.yaml: activation='mish' is not supported; known: fast-swiglu"),
        ("hidden_size", 128, "model_weights cannot be loaded into this model: "),
        ("num_layers", 6, "model_weights cannot be loaded into this model: "),
    ],
)
def test_a_checkpoint_whose_config_does_not_fit(
    inputs: Inputs, tmp_path: Path, key: str, value: object, message: str
) -> None:
    import yaml

    folder = tmp_path / "extracted"
    with tarfile.open(inputs.nemo) as tar:
        tar.extractall(folder, filter="data")
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    (folder / "model_config.yaml").write_text(yaml.safe_dump({**config, key: value}))
    refused(with_checkpoint(inputs, folder), tmp_path, message)


@pytest.mark.parametrize("layout", [write_one_file, write_zarr])
def test_a_checkpoint_of_an_older_layout_names_its_converter(
    inputs: Inputs, tmp_path: Path, layout: Callable[[Path, Mapping[str, Any]], None]
) -> None:
    from nemo_dpo.checkpoint import archive
    from nemo_dpo.checkpoint.weights import read_weights

    folder = tmp_path / "extracted"
    archive.extract(inputs.nemo, folder)
    tensors = dict(read_weights(folder / "model_weights"))
    shutil.rmtree(folder / "model_weights")
    layout(folder / "model_weights" if layout is write_zarr else folder, tensors)
    run = refused(with_checkpoint(inputs, folder), tmp_path, "tools/convert/convert_gpt_nemo_to_mcore.py")
    assert "shared prompts" not in run.output  # of the report on the data


# --- data ----------------------------------------------------------------------------------------------------------


def line(**changes: object) -> bytes:
    return json.dumps({name: value for name, value in {**PAIR, **changes}.items() if value is not None}).encode()


BAD_LINES = {
    "not_json": (b'{"prompt": "a"', ":2:15: not JSON", "each line must be one JSON object"),
    "no_object": (b'["a", "b"]', ":2: a list, not a JSON object with the fields prompt, chosen_response"),
    "missing_field": (line(rejected_response=None), ":2: the field rejected_response is missing; the line has chosen_"),
    "wrong_type": (line(chosen_response=3), ":2: chosen_response is a number, not a text"),
    "null": (line(prompt=None)[:-1] + b', "prompt": null}', ":2: prompt is null, not a text"),
    "wrong_reward": (line(chosen_reward="high"), ":2: chosen_reward is a text, not a number"),
    "infinite_reward": (line(chosen_reward=math.inf), ":2: chosen_reward is inf; a reward must be a finite number"),
    "messages": (line(prompt=[{"role": "user", "content": "a"}]), ":2: prompt is a list of messages, which is not"),
    "nul": (line().replace(b"yes", b"y\0s"), ":2: a NUL byte at byte "),
    "latin_1": (line().replace(b"yes", b"caf\xe9"), ":2: byte ", "is not UTF-8; convert the file to UTF-8"),
    "surrogate": (line(prompt="\ud800"), ":2: prompt has half a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_not_the_format(inputs: Inputs, tmp_path: Path, name: str) -> None:
    bad, *fragments = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line() + b"\n" + bad + b"\n")
    place, *rest = fragments
    run = refused([*inputs.start, data(path, inputs.valid), *QUICK], tmp_path, f"{path}{place}", *rest)
    assert not list((run.log_dir / "data_cache").glob("pairs-*")), "half a cache is left"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no line with a pair; is it the right file?"),
        (b"\n\r\n  \n", "holds no line with a pair; is it the right file?"),
        (line(chosen_response="no."), "no pair is left to train on (1 × chosen equals rejected)"),
    ],
    ids=["empty", "blank", "nothing_left"],
)
def test_a_file_without_pairs(inputs: Inputs, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "none.jsonl"
    path.write_bytes(content)
    refused([*inputs.start, data(path, inputs.valid), *QUICK], tmp_path, f"{path}: {message}")


@pytest.mark.parametrize(
    ("key", "bad", "message"),
    [
        ("invalid", line(chosen_response=""), ":2: empty response; mend the line, or leave such pairs out by invalid="),
        ("invalid", line(chosen_response="no."), ":2: chosen equals rejected; mend the line"),
        ("overlong", line(prompt="x" * 300), ":2: prompt + response have 304 tokens, more than seq_length=256"),
    ],
    ids=["empty", "equal", "long"],
)
def test_a_pair_that_is_an_error_by_key(inputs: Inputs, tmp_path: Path, key: str, bad: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line() + b"\n" + bad + b"\n")
    arguments = [*inputs.start, data(path, inputs.valid), *QUICK, f"model.data.{key}=error"]
    refused(arguments, tmp_path, f"{path}{message}")


def test_an_absent_data_file(inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    refused([*inputs.start, data(path, inputs.valid), *QUICK], tmp_path, f"train file {path} does not exist")


def test_odd_lines_are_counted_and_the_rest_is_trained_on(inputs: Inputs, tmp_path: Path) -> None:
    """A byte-order mark, CRLF, a blank line, unknown fields, and pairs without contrast; 5 MB in one line."""
    path = tmp_path / "odd.jsonl"
    lines = [b"\xef\xbb\xbf" + line(), b"", line(chosen_response=" "), line(rejected_response="yes.")]
    lines += [line(prompt="x" * 300), line(note="x" * 5_000_000), line(prompt="And now: ")]
    path.write_bytes(b"\r\n".join(lines))
    run = run_cli([*inputs.start, data(path, inputs.valid), *QUICK], tmp_path / "log")
    for reason, number in [("empty response", 3), ("chosen equals rejected", 4), ("longer than seq_length", 5)]:
        assert [row for row in run.output.splitlines() if reason in row and f"odd.jsonl:{number}" in row], run.output
    report = json.loads((run.log_dir / "data_train.json").read_text())
    assert report["pairs"] == 3
    assert run.series("train", "consumed_samples") == [0]
    assert run.series("train", "loss") == [pytest.approx(math.log(2), abs=1e-6)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_data_smaller_than_a_batch(inputs: Inputs, tmp_path: Path, ranks: int) -> None:
    """One pair, batches of 8: with two ranks one of them has nothing to do and must still take part."""
    path = tmp_path / "one.jsonl"
    path.write_bytes(line() + b"\n")
    options = [*QUICK, f"trainer.devices={ranks}", "trainer.dpo.max_epochs=3"]
    run = run_cli([*inputs.start, data(path, path), *options], tmp_path / "log")
    trained = run.series("train", "loss")
    assert len(trained) == 3
    assert trained[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trained[2] < trained[0] - 0.05, "the pair is learnt"


# --- failures in the middle ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number(inputs: Inputs, tmp_path: Path) -> None:
    arguments = [*inputs.arguments, "model.optim.lr=1e30", "trainer.devices=2"]
    refused(arguments, tmp_path, "is nan; no parameter was changed", "lower model.optim.lr", status=1)


def test_a_gradient_that_is_not_finite_names_its_step(inputs: Inputs, tmp_path: Path) -> None:
    message = "step 1: gradient norm is inf; no parameter was changed"
    run = refused(inputs.arguments, tmp_path, message, "lower model.optim.lr", status=1, patch="break_a_gradient")
    assert list(losses(run.log_dir)) == [0]


def test_a_refusal_of_one_rank_alone_is_heard(inputs: Inputs, tmp_path: Path) -> None:
    run = run_cli(
        [*inputs.arguments, "trainer.devices=2"],
        tmp_path / "log",
        check=False,
        timeout=60,
        patches=[f"{PATCHES}:refuse_on_rank_one"],
    )
    assert [line for line in run.output.splitlines() if line.startswith("error: ")] == ["error: the cache is gone"]
    assert run.status in (1, 2), "2, or 1 where rank 0 noticed first that its partner is gone"


def test_a_killed_rank_is_named_and_the_others_end(inputs: Inputs, tmp_path: Path) -> None:
    run = run_cli(
        [*inputs.arguments, "trainer.devices=2"],
        tmp_path / "log",
        check=False,
        timeout=60,
        patches=[f"{PATCHES}:kill_rank_one"],
    )
    assert run.status == 137, run.output
    assert "error: rank 1 was ended by SIGKILL; the others cannot go on" in run.output


def check_what_is_left(log_dir: Path, step: int) -> None:
    """All under a final name is whole, and the newest is that of `step`."""
    folder = log_dir / "checkpoints"
    final = [path for path in folder.iterdir() if path.suffix != UNFINISHED and not path.name.startswith(".")]
    folders = [path for path in final if path.is_dir() and not path.is_symlink()]
    assert [path.name for path in final if path.suffix == ".nemo"] == []
    for path in folders:
        files = manifest.read(path)
        assert {"progress.json", "metadata.json", "common.pt", ".metadata"} < files.keys()
        manifest.check(path, files)
    assert max(read_progress(path)["step"] for path in folders) == step
    assert (folder / "last" / "progress.json").is_file()


def check_goes_on(inputs: Inputs, log_dir: Path, whole: dict[int, float]) -> None:
    """The next start finishes the run with the losses of the uninterrupted one, bit for bit, each step once."""
    again = run_cli([*inputs.arguments, *LONG], log_dir)
    assert "resuming from" in again.output
    assert losses(log_dir) == whole
    names = {path.name for path in (log_dir / "checkpoints").iterdir()}
    assert "megatron_gpt.nemo" in names
    assert [name for name in names if name.endswith((UNFINISHED, ".tmp"))] == []


@pytest.mark.parametrize(
    ("patch", "step"),
    [
        ("kill_after_the_shards", 4),
        ("kill_before_the_rename", 4),
        ("kill_while_pruning", 8),
        ("kill_while_packing", 12),
    ],
)
def test_killed_while_writing(inputs: Inputs, whole: dict[int, float], tmp_path: Path, patch: str, step: int) -> None:
    run = run_cli([*inputs.arguments, *LONG], tmp_path, check=False, patches=[f"{PATCHES}:{patch}"])
    assert run.status == -9, run.output
    check_what_is_left(tmp_path, step)
    check_goes_on(inputs, tmp_path, whole)


@pytest.mark.parametrize(("patch", "step"), [("fill_disk_while_saving", 4), ("fill_disk_while_packing", 12)])
def test_disk_full_while_writing(
    inputs: Inputs, whole: dict[int, float], tmp_path: Path, patch: str, step: int
) -> None:
    run = run_cli([*inputs.arguments, *LONG], tmp_path, check=False, patches=[f"{PATCHES}:{patch}"])
    assert run.status == 1, run.output
    message = error_line(run.output)
    assert "No space left on device" in message
    assert str(tmp_path / "checkpoints") in message
    check_what_is_left(tmp_path, step)
    check_goes_on(inputs, tmp_path, whole)

"""Killed again and again, at every kind of moment, a run loses nothing: each start goes on from a checkpoint that the
uninterrupted run had at that step, and the end is the uninterrupted run's."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_dpo.convert import hf_to_nemo
from tests.cli.conftest import Inputs
from tests.cli.test_resume import figures
from tests.support.checkpoints import state_hash, whole_checkpoints
from tests.support.cli import Run, run_cli
from tests.support.tiny import write_hf_model

KILLED = -9
SEED = 11
RANKS = 2
CALLBACK = "exp_manager.checkpoint_callback_params"
# Saves after every step; what is killed keeps the newest checkpoint only, so that every save also deletes one.
ARGUMENTS = (
    f"trainer.devices={RANKS}",
    "trainer.dpo.max_epochs=100",
    "trainer.dpo.val_check_interval=1000",
    "trainer.dpo.save_interval=1",
    "exp_manager.create_checkpoint_callback=true",
    f'{CALLBACK}.filename="{{step}}"',
    "model.hidden_dropout=0.1",
    "model.data.shuffle=true",
)
WRITERS = {"sync": [], "async": [f"{CALLBACK}.async_save=true"]}
Moment = dict[str, Any]


@pytest.fixture(scope="module")
def small(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A model of one layer: checkpoints are files, whatever is in them."""
    folder = tmp_path_factory.mktemp("small")
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    hf = write_hf_model(folder / "hf", **{**shape, "num_key_value_heads": 2})
    hf_to_nemo(hf, folder / "small.nemo", precision="32")
    return replace(inputs, nemo=folder / "small.nemo")


@dataclass(frozen=True)
class Whole:
    """The run that nothing interrupts."""

    arguments: list[str]
    run: Run
    hashes: dict[int, str]
    """Of all tensors of its checkpoints, optimizer included, by step."""
    events: list[dict[str, Any]]


Uninterrupted = Callable[[str, int], Whole]


@pytest.fixture(scope="module")
def uninterrupted(small: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """(writer, steps) → the run; it keeps all its checkpoints, to compare with."""

    def once(writer: str, steps: int) -> Whole:
        arguments = [*small.arguments(), *ARGUMENTS, f"trainer.dpo.max_steps={steps}", *WRITERS[writer]]
        run = started([*arguments, f"{CALLBACK}.save_top_k=-1"], tmp_path_factory.mktemp("whole"), {})
        events = [json.loads(line) for line in (run.log_dir / "events.txt").read_text().splitlines()]
        hashes = {step: state_hash(folder) for step, folder in whole_checkpoints(run.log_dir).items()}
        shutil.rmtree(run.log_dir / "checkpoints")
        assert list(hashes) == list(range(1, steps + 1))
        assert len(set(hashes.values())) == steps
        return Whole([*arguments, f"{CALLBACK}.save_top_k=0"], run, hashes, events)

    return once


def started(arguments: list[str], log_dir: Path, moment: Moment, *, check: bool = True) -> Run:
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / "kill.json").write_text(json.dumps(moment))
    return run_cli(arguments, log_dir, patches=["tests.cli.kill_points:arm"], check=check)


def moments(whole: Whole, count: dict[tuple[int, bool], int]) -> list[Moment]:
    """Evenly over what each process does to the folder from its second save on, for two saves."""
    found = []
    for (rank, writer), number in count.items():
        own = [event["event"] for event in whole.events if (event["rank"], event["writer"]) == (rank, writer)]
        per_save = len(own) // len(whole.hashes)
        places = [per_save + round(k * 2 * per_save / number) for k in range(number)]
        found += [{"rank": rank, "writer": writer, "event": own[place]} for place in places]
    return found


def survive(whole: Whole, log_dir: Path, wanted: list[Moment], interval_lost: int) -> int:
    """Start, be killed at each moment, check what is left; then finish. Returns how often it was killed."""
    newest = kills = 0
    for moment in wanted:
        run = started(whole.arguments, log_dir, moment, check=False)
        assert run.status in (KILLED, 0), run.output[-4000:]
        kills += run.status == KILLED
        left = whole_checkpoints(log_dir)
        assert all(state_hash(checkpoint) == whole.hashes[step] for step, checkpoint in left.items()), moment
        assert max(left, default=0) >= newest, "a kill costs no checkpoint"
        newest = max(left, default=0)
        begun = max((row["step"] + 1 for row in run.rows("train")), default=0)
        assert begun - newest <= interval_lost, (moment, begun, newest)
    last = started(whole.arguments, log_dir, {})
    assert figures(last) == figures(whole.run)
    assert "DAMAGED" not in last.output
    names = {path.name for path in (log_dir / "checkpoints").iterdir()}
    assert names == {"last", f"step={len(whole.hashes)}"}, "nothing of the interrupted ones"
    return kills


def test_a_few_kills_in_saves(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """In the middle of the files, of the completion, of the deletion: the short form of the test below."""
    whole = uninterrupted("async", 6)
    assert survive(whole, tmp_path, moments(whole, {(0, False): 3}), 2) == 3


LONG, AT_RANDOM = 64, 8
# Moments in rank 0, rank 1 and, where they exist, the forks that write for them.
CHOSEN = {
    "sync": {(0, False): 16, (1, False): 6},
    "async": {(0, False): 14, (1, False): 2, (0, True): 4, (1, True): 4},
}


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("writer", "lost"), [("sync", 1), ("async", 2)])
def test_thirty_kills(uninterrupted: Uninterrupted, tmp_path: Path, writer: str, lost: int) -> None:
    """With both kinds of writer over sixty: at chosen moments of saves, and at random ones of everything."""
    whole, chance = uninterrupted(writer, LONG), random.Random(SEED)
    wanted = [*moments(whole, CHOSEN[writer]), *({"after": chance.uniform(0.001, 0.6)} for _ in range(AT_RANDOM))]
    chance.shuffle(wanted)
    assert survive(whole, tmp_path, wanted, lost) >= 26
    kinds = {json.loads(line).split()[0] for line in (tmp_path / "kills.txt").read_text().splitlines()}
    assert kinds >= {"open", "fsync", "os.rename", "os.remove"}, kinds

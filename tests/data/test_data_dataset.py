"""Files → cache → pairs: the same tokens as a slow reading gives, made once, never half."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from letters import EOS, Letters, row, write_rows

from nemo_dpo.data import DataError, DataOptions, PairDataset, TokenPair, open_split, prepare_split
from nemo_dpo.data import dataset as dataset_module

OPTIONS = DataOptions(seq_length=64)
A, B, C = b"abc"


def numbered(n: int, first: int = 0) -> list[dict[str, object]]:
    return [row(f"p{i}", f"c{i}", f"r{i}") for i in range(first, first + n)]


def load(
    cache: Path, *files: Path, weights: Sequence[float] | None = None, tokenizer: Letters | None = None, **changes: Any
) -> PairDataset:
    options = replace(OPTIONS, **changes)
    return open_split(prepare_split(files, weights, tokenizer or Letters(), options, cache))


def values(pair: TokenPair) -> tuple[object, ...]:
    ids = (pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist())
    return (pair.index, *ids, pair.chosen_reward, pair.rejected_reward)


def prompts(dataset: PairDataset) -> list[str]:
    return [bytes(pair.prompt_ids.tolist()).decode() for pair in dataset]


def test_one_pair_by_hand(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [row("ab", "c", "aa", chosen_reward=0.1, rejected_reward=-7)])
    dataset = load(tmp_path / "cache", file, append_eod=True)
    assert len(dataset) == 1
    # 0.1 comes back as it was: rewards are stored as float64.
    assert values(dataset[0]) == (0, [A, B], [C, EOS], [A, A, EOS], 0.1, -7.0)
    assert {array.dtype.name for array in (dataset[0].prompt_ids, dataset[0].chosen_ids)} == {"int32"}


texts = st.text("abth é漢🙂", min_size=1, max_size=8)
rows = st.lists(st.tuples(texts, texts, texts, st.floats(-9, 9)), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=rows, chunk=st.integers(1, 5))
def test_against_a_slow_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[tuple[str, str, str, float]], chunk: int
) -> None:
    monkeypatch.setattr(dataset_module, "CHUNK_PAIRS", chunk)
    file = write_rows(tmp_path / "x.jsonl", [row("p", "x", "y"), *(row(*it[:3], chosen_reward=it[3]) for it in lines)])
    tokenizer = Letters()
    expected = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        it = json.loads(line)
        prompt = tokenizer.encode(it["prompt"])
        chosen, rejected = (
            tokenizer.encode(it["prompt"] + it[name]) for name in ("chosen_response", "rejected_response")
        )
        responses = [chosen[len(prompt) :], rejected[len(prompt) :]]
        prefix = prompt + responses[0] == chosen and prompt + responses[1] == rejected
        real = it["chosen_response"].strip() and it["rejected_response"].strip() and all(responses)
        if prefix and real and responses[0] != responses[1]:
            pair = (len(expected), prompt, *responses, it.get("chosen_reward", 1.0), 0.0)
            expected.append((pair, f"{file}:{number}"))
    dataset = load(tmp_path / "cache", file)
    assert [(values(pair), str(dataset.source(pair.index))) for pair in dataset] == expected
    dropped = sum(dataset.tallies()[0][1].dropped.number.values())
    assert dropped + len(dataset) == len(lines) + 1


def test_several_files_follow_one_another(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", numbered(3))
    b = write_rows(tmp_path / "b.jsonl", [row("", "x", "y"), *numbered(2, first=3)])
    dataset = load(tmp_path / "cache", a, b)
    assert prompts(dataset) == ["p0", "p1", "p2", "p3", "p4"]
    assert [str(dataset.source(i)) for i in (2, 3)] == [f"{a}:3", f"{b}:2"]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            dataset[index]


def test_weights_blend_and_repeat(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", numbered(4))
    b = write_rows(tmp_path / "b.jsonl", numbered(2, first=4))
    dataset = load(tmp_path / "cache", a, b, weights=[1, 1])
    assert prompts(dataset) == ["p0", "p4", "p1", "p5", "p2", "p4"]
    assert [pair.index for pair in dataset] == list(range(6)), "a repeated pair has an index of its own"
    assert dataset.prepared.pairs_per_shard == [3, 3]
    assert dataset.last_tokens()[:, 0].tolist() == [pair.chosen_ids[-1] for pair in dataset]
    long = write_rows(tmp_path / "c.jsonl", [row("pppp", "cc", "r")])
    assert load(tmp_path / "cache", a, long, weights=[3, 2]).lengths()[:, 0].tolist() == [2, 4, 2, 4, 2]
    assert str(dataset.source(5)) == f"{b}:1"
    with pytest.raises(DataError, match="each file needs one positive number"):
        prepare_split([a, b], [1.0, 0.0], Letters(), OPTIONS, tmp_path / "cache")


def test_spans_cut_each_file_without_gap_or_overlap(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", numbered(7))
    b = write_rows(tmp_path / "b.jsonl", numbered(4, first=7))
    cuts = [0.0, 0.5, 0.8, 1.0]  # 7: 0 4 6 7 (3.5 and 5.6 rounded); 4: 0 2 3 4
    parts = []
    for span in pairwise(cuts):
        prepared = prepare_split([a, b], None, Letters(), OPTIONS, tmp_path / "cache", spans=[span, span])
        parts.append(open_split(prepared))
    assert [prompts(part) for part in parts] == [
        ["p0", "p1", "p2", "p3", "p7", "p8"],
        ["p4", "p5", "p9"],
        ["p6", "p10"],
    ]
    assert str(parts[1].source(2)) == f"{b}:3"
    assert parts[1].lengths().tolist() == [[2, 2, 2]] * 3
    assert len({part.fingerprint for part in parts}) == 3
    with pytest.raises(DataError, match=r"b\.jsonl: a share of 0\.05 leaves none of its 4 pairs"):
        prepare_split([a, b], None, Letters(), OPTIONS, tmp_path / "cache", spans=[(0.0, 1.0), (0.95, 1.0)])


def test_tokenised_once_by_content(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(3))
    cache = tmp_path / "cache"
    first = load(cache, file)
    again = Letters()
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    assert load(cache, file, copy, tokenizer=again).lengths().shape == (6, 3)
    assert again.calls == 0, "neither the file nor its copy is tokenised again"
    assert str(load(cache, copy).source(0)) == f"{copy}:1", "the report names the file given, not the first of its kind"
    # Same size and date, other content.
    stamp = file.stat()
    file.write_bytes(file.read_bytes().replace(b"p1", b"q1"))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    other = load(cache, file, tokenizer=again)
    assert again.calls == 1 and prompts(other) == ["p0", "q1", "p2"]
    assert prompts(first) == ["p0", "p1", "p2"]


CHANGES: list[dict[str, object]] = [
    {"seq_length": 63},
    {"append_eod": True},
    {"apply_ftfy": True},
    {"overlong": "truncate_prompt"},
    {"invalid": "error"},
    {"default_chosen_reward": 2.0},
    {"default_rejected_reward": 2.0},
    {"tokenizer": Letters("another")},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_whatever_decides_the_tokens_makes_another_cache(tmp_path: Path, change: dict[str, Any]) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(2))
    folders = {load(tmp_path / "cache", file, **it).prepared.shards[0].folder for it in ({}, change, {}, change)}
    assert len(folders) == 2


def test_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(5))
    other = write_rows(tmp_path / "b.jsonl", [*numbered(4), row("p4", "c4", "R4")])
    # Same letters, another border between prompt and response.
    border = write_rows(tmp_path / "c.jsonl", [*numbered(4), row("p", "4c4", "r4")])
    reward = write_rows(tmp_path / "d.jsonl", [{**it, "chosen_reward": 9, "id": 0} for it in numbered(5)])
    cache = tmp_path / "cache"
    fingerprint = load(cache, file).fingerprint
    assert load(tmp_path / "elsewhere", file).fingerprint == fingerprint
    assert load(cache, file, seq_length=32).fingerprint == fingerprint, "an option that changes no token"
    assert load(cache, reward).fingerprint == fingerprint
    changed = [load(cache, other), load(cache, border), load(cache, file, append_eod=True), load(cache, file, file)]
    blended = load(cache, file, other, weights=[1, 2]), load(cache, file, other, weights=[2, 1])
    assert len({fingerprint, *(it.fingerprint for it in (*changed, *blended))}) == 7


class Interrupted(Letters):
    """Fails in its second call, as Ctrl-C or a full disk would; or is killed there."""

    def __init__(self, kill: bool = False) -> None:
        super().__init__()
        self.kill = kill

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self.calls == 1 and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == 1:
            raise KeyboardInterrupt
        return super().encode_batch(texts)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "CHUNK_PAIRS", 2)
    file = write_rows(tmp_path / "a.jsonl", numbered(5))
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "cache", file, tokenizer=Interrupted())
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load(tmp_path / "cache", file)) == 5


def test_a_killed_run_leaves_nothing_that_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "CHUNK_PAIRS", 2)
    file = write_rows(tmp_path / "a.jsonl", numbered(5))
    child = multiprocessing.get_context("fork").Process(
        target=load, args=(tmp_path / "cache", file), kwargs={"tokenizer": Interrupted(kill=True)}
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    assert ".tmp-" in left.name and (left / "ids.bin").exists()
    assert len(load(tmp_path / "cache", file)) == 5


def test_two_runs_may_prepare_the_same_file_at_once(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(50))
    cache = tmp_path / "cache"

    class Rival(Letters):
        """While it tokenises, another run finishes the same cache."""

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            child = multiprocessing.get_context("fork").Process(target=load, args=(cache, file))
            child.start()
            child.join(60)
            assert child.exitcode == 0
            return super().encode_batch(texts)

    assert len(load(cache, file, tokenizer=Rival())) == 50
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("name", ["ids.bin", "pairs.bin", "meta.json"])
def test_a_damaged_cache_is_named(tmp_path: Path, name: str) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(5))
    prepared = prepare_split([file], None, Letters(), OPTIONS, tmp_path / "cache")
    damaged = Path(prepared.shards[0].folder) / name
    for break_it in (lambda: damaged.write_bytes(damaged.read_bytes()[:-3]), damaged.unlink):
        break_it()
        with pytest.raises(DataError, match=rf"{name}.*delete .* to tokenise again"):
            open_split(prepared)


def test_a_dataset_may_be_pickled_and_forked(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(5))
    dataset = load(tmp_path / "cache", file, file, weights=[1, 3])
    sent = pickle.dumps(dataset)
    assert len(sent) < 1000, "sent as a description, not as its content"
    assert [values(pair) for pair in pickle.loads(sent)] == [values(pair) for pair in dataset]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert values(pool.apply(dataset.__getitem__, (4,))) == values(dataset[4])


def test_a_pair_handed_out_may_be_written_to(tmp_path: Path) -> None:
    dataset = load(tmp_path / "cache", write_rows(tmp_path / "a.jsonl", numbered(2)))
    dataset[0].prompt_ids[:] = 0
    assert prompts(dataset)[0] == "p0"


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        load(cache, tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="no such file"):
        load(cache, tmp_path)
    with pytest.raises(DataError, match=r"/proc/self/mem: cannot be read"):
        load(cache, Path("/proc/self/mem"))  # opens, but cannot be read from its start
    with pytest.raises(DataError, match="no data file given"):
        load(cache)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no line with a pair"):
        load(cache, empty)
    useless = write_rows(tmp_path / "useless.jsonl", [row("a", "b", "b"), row("a", "", "b"), row("c", "d", "d")])
    with pytest.raises(DataError, match=r"no pair is left .*2 × chosen equals rejected, 1 × empty response"):
        load(cache, useless)
    with pytest.raises(DataError, match=r"cannot be written .* model\.data\.cache_dir"):
        load(empty, write_rows(tmp_path / "a.jsonl", numbered(1)))


def test_a_bad_line_leaves_no_cache(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*numbered(3), {"prompt": "p"}])
    with pytest.raises(DataError, match=r"a\.jsonl:4: the field chosen_response is missing"):
        load(tmp_path / "cache", file)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_grows_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", numbered(3))

    class Growing(Letters):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            with file.open("a") as stream:
                stream.write("{}\n")
            return super().encode_batch(texts)

    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        load(tmp_path / "cache", file, tokenizer=Growing())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_line_of_five_megabytes(tmp_path: Path) -> None:
    long = row("p", "x" * 5_000_000, "y")
    file = write_rows(tmp_path / "a.jsonl", [*numbered(2), long, *numbered(1, first=2)])
    dropped = load(tmp_path / "cache", file)
    assert prompts(dropped) == ["p0", "p1", "p2"]
    assert list(dropped.tallies()[0][1].dropped) == [("longer than seq_length", 1, [3])]
    kept = load(tmp_path / "cache", file, seq_length=6_000_000)
    assert len(kept[2].chosen_ids) == 5_000_000
    assert prompts(kept) == ["p0", "p1", "p", "p2"]


def test_errors_need_no_torch() -> None:
    code = "import sys, nemo_dpo.data; sys.exit('torch' in sys.modules)"
    root = Path(dataset_module.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "screen, least, shown", [(Terminal, 0, True), (Terminal, 10**9, False), (io.StringIO, 0, False)]
)
def test_a_progress_bar_on_a_terminal_for_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: type[io.StringIO], least: int, shown: bool
) -> None:
    stderr = screen()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(dataset_module, "BAR_FROM_BYTES", least)
    load(tmp_path / "cache", write_rows(tmp_path / "a.jsonl", numbered(3)))
    assert ("tokenising a.jsonl: 100%" in stderr.getvalue()) == shown

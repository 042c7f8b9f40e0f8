"""The data report, against figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from letters import Letters, row, write_rows

from nemo_dpo.data import DataOptions, DataReport, make_report, open_split, prepare_split

# tokens of prompt, chosen, rejected:   2 1 3      4 2 2          1 5 1      and one pair beyond seq_length = 8
ROWS = [row("pp", "a", "bb."), row("pppp", "c.", "d¶"), row("p", "eeee.", "f"), row("p" * 9, "g", "h")]
DROPPED = [row("p", "", "x"), row("p", "x", "x"), *[row("p", "x", "")] * 4]


@pytest.fixture
def report(tmp_path: Path) -> DataReport:
    (tmp_path / "one").mkdir()
    first = write_rows(tmp_path / "one" / "x.jsonl", ROWS)
    second = write_rows(tmp_path / "x.jsonl", [*DROPPED, row("pp", "a", "b", id=3)])
    prepared = prepare_split([first, second], None, Letters(), DataOptions(seq_length=8), tmp_path / "cache")
    return make_report("train", open_split(prepared), Letters(), micro_batch_size=2)


def test_figures_by_hand(report: DataReport, tmp_path: Path) -> None:
    # The fourth pair kept is pp/a/b: 2 1 1.
    assert report.pairs == 4
    assert report.files == [(str(tmp_path / "one" / "x.jsonl"), 3), (str(tmp_path / "x.jsonl"), 1)]
    cost = report.cost
    assert cost.response == (1 + 3) + (2 + 2) + (5 + 1) + (1 + 1)
    assert cost.shared == cost.response + 2 + 4 + 1 + 2
    assert cost.packed == report.tokens == cost.response + 2 * (2 + 4 + 1 + 2)
    # micro-batches {0, 1} and {2, 3}: four rows each; the longest sequences are 5, 6 and 6, 3.
    assert cost.padded == 4 * 6 + 4 * 6
    longest = report.lengths["longer sequence"]
    assert (longest.min, longest.median, longest.mean, longest.max) == (3, 5.5, 5.0, 6)
    assert longest.p95 == pytest.approx(6.0)
    assert [(lengths.min, lengths.max) for lengths in report.lengths.values()] == [(1, 4), (1, 5), (1, 3), (3, 6)]
    # Last letters: a . | . ¶ | . f | a b
    assert report.endings == [(".", 3 / 8), ("a", 2 / 8), ("b", 1 / 8), ("f", 1 / 8), ("¶", 1 / 8)]
    assert report.eos_share == 1 / 8


def test_a_ragged_last_micro_batch_has_fewer_rows(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", ROWS[:3])
    prepared = prepare_split([file], None, Letters(), DataOptions(seq_length=8), tmp_path / "cache")
    assert make_report("train", open_split(prepared), Letters(), micro_batch_size=2).cost.padded == 4 * 6 + 2 * 6


def test_what_was_left_out_is_named_with_file_and_line(report: DataReport, tmp_path: Path) -> None:
    found = {finding.reason: (finding.count, finding.examples) for finding in report.dropped}
    # Both files are called x.jsonl, so that the examples need the folder.
    first, second = tmp_path / "one" / "x.jsonl", tmp_path / "x.jsonl"
    assert found == {
        "empty response": (5, [f"{second}:1", f"{second}:3", f"{second}:4"]),
        "chosen equals rejected": (1, [f"{second}:2"]),
        "longer than seq_length": (1, [f"{first}:4"]),
    }
    assert [(f.reason, f.count) for f in report.noted] == [("unknown field 'id' ignored", 1)]
    assert report.changed == []


def test_findings_of_several_files_are_joined(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{n}.jsonl", [row("p", "", "x")] * n + [row("p", "a", "b")]) for n in (2, 3)]
    prepared = prepare_split([*files, files[0]], None, Letters(), DataOptions(seq_length=8), tmp_path / "cache")
    report = make_report("train", open_split(prepared), Letters(), micro_batch_size=1)
    (finding,) = report.dropped
    assert (finding.count, finding.examples) == (5, ["2.jsonl:1", "2.jsonl:2", "3.jsonl:1"])


def test_findings_of_a_part_say_that_they_are_of_whole_files(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [*[row("p", "a", "b")] * 4, row("p", "", "x")])
    reports = []
    for number, span in enumerate([(0.0, 0.75), (0.75, 1.0), (0.0, 1.0)]):
        prepared = prepare_split([file], None, Letters(), DataOptions(seq_length=8), tmp_path / "cache", [span])
        reports.append(make_report(str(number), open_split(prepared), Letters(), micro_batch_size=1))
    dropped = "  dropped        1  empty response  (x.jsonl:5)"
    for report in reports[:2]:
        assert report.part_of_files
        assert report.render().splitlines()[2:4] == ["  of the whole files, of which this split is a part:", dropped]
    assert not reports[2].part_of_files
    assert reports[2].render().splitlines()[2] == dropped


def test_a_part_without_findings_says_nothing_of_them(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [row("p", "a", "b")] * 4)
    prepared = prepare_split([file], None, Letters(), DataOptions(seq_length=8), tmp_path / "cache", [(0.0, 0.5)])
    assert "whole files" not in make_report("train", open_split(prepared), Letters(), micro_batch_size=1).render()


def test_rendered_table(report: DataReport, tmp_path: Path) -> None:
    text = report.render().replace(f"{tmp_path}/", "")
    assert text.splitlines() == [
        "train: 4 pairs, 34 tokens, 16 of them in responses",
        "  one/x.jsonl  3 pairs",
        "  x.jsonl  1 pairs",
        "  dropped        5  empty response  (x.jsonl:1, x.jsonl:3, x.jsonl:4, …)",
        "  dropped        1  chosen equals rejected  (x.jsonl:2)",
        "  dropped        1  longer than seq_length  (one/x.jsonl:4)",
        "  noted          1  unknown field 'id' ignored  (x.jsonl:7)",
        "  tokens                 min  median     mean     p95     max",
        "    prompt                 1       2      2.2       4       4",
        "    chosen                 1       2      2.2       5       5",
        "    rejected               1       2      1.8       3       3",
        "    longer sequence        3       6      5.0       6       6",
        '  responses end with  "." 37.5%, "a" 25.0%, "b" 12.5%, "f" 12.5%, "¶" 12.5%',
        "    12.5% end with the end-of-text token: the model is not taught where to stop, "
        "unless model.data.append_eod=true adds it",
        "  computed tokens per epoch in file order, micro_batch_size 2",
        "    padded                      48",
        "    packed                      34    -29%",
        "    shared prompts              25    -48%",
    ]


def test_no_advice_where_responses_end(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", ROWS)
    options = DataOptions(seq_length=8, append_eod=True, overlong="truncate_response")
    prepared = prepare_split([file], None, Letters(), options, tmp_path / "cache")
    report = make_report("validation", open_split(prepared), Letters(), micro_batch_size=2)
    assert report.eos_share == 1.0
    assert "append_eod" not in report.render()


def test_json_holds_what_the_table_says(report: DataReport) -> None:
    content = json.loads(report.to_json())
    assert content["name"] == "train"
    assert content["cost"]["shared"] == report.cost.shared
    assert content["dropped"][0]["count"] == 5
    assert content["lengths"]["prompt"]["max"] == 4

"""verify.py: what is a difference, what is none, and what it says; converters that check what they wrote."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.support.cli  # noqa: F401  tells the fork server what to import
from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.weights import Chunk, read_weights, write_weights
from nemo_dpo.convert import cli, hf_to_nemo, nemo_to_hf, run
from nemo_dpo.convert.compare import compare
from nemo_dpo.convert.logits import TOLERANCE, largest_difference
from nemo_dpo.convert.opened import open_checkpoint
from nemo_dpo.convert.summary import summarise
from tests.convert.conftest import LLAMAS, hf_tensors
from tests.support.layouts import write_ranks

EMBEDDING = "model.embedding.word_embeddings.weight"
main = cli.verify_script("Compare two checkpoints.")


@pytest.fixture
def pair(llama: Any) -> tuple[Path, Path]:
    """A tiny model as a Hugging Face folder and as its `.nemo`."""
    source = llama()
    hf_to_nemo(source, source.parent / "model.nemo")
    return source, source.parent / "model.nemo"


def edited(nemo: Path, change: Callable[[str, Tensor], Tensor] | None = None, **config: Any) -> Path:
    """An extracted copy with other weights or configuration."""
    folder, weights = nemo.parent / "edited", nemo.parent / "edited" / archive.MODEL_WEIGHTS
    archive.extract(nemo, folder)
    archive.write_model_config({**archive.read_model_config(folder), **config}, folder)
    if change:
        tensors = {name: change(name, tensor.clone()) for name, tensor in read_weights(weights).items()}
        shutil.rmtree(weights)
        write_weights(weights, (Chunk(name, tensor) for name, tensor in tensors.items()))
    return folder


def verdict(capsys: pytest.CaptureFixture[str], *words: Path | str) -> tuple[int, str]:
    """Status and output of verify.py, without logits."""
    status = main([*map(str, words), "--skip_logits"])
    return status, capsys.readouterr().out


def in_process(out: Path, *words: Path | str) -> tuple[int, str]:
    """The same with logits, in a process of its own: process groups are made there."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_child, args=(list(map(str, words)), str(out)))
    process.start()
    process.join(120)
    return int(process.exitcode or 0), out.read_text()


def _child(words: Sequence[str], out: str) -> None:
    with open(out, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = main(words)
    os.sys.stdout.flush()  # type: ignore[attr-defined]
    os._exit(status)


def one_value(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("mlp.linear_fc1.weight"):
        tensor[1, 100 + 7, 5] += 512.0  # [layer, gate above up, hidden]: row 7 of up
    return tensor


def padded_with_noise(name: str, tensor: Tensor) -> Tensor:
    """As a training run at another layout leaves them: more rows behind the vocabulary, with whatever in them."""
    return torch.cat([tensor[:301], torch.randn(211, 72)]) if tensor.shape[0] == 384 else tensor


def test_a_conversion_is_equal_to_the_bit_and_computes_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    status, output = in_process(tmp_path / "out", pair[0], edited(pair[1], padded_with_noise))
    assert status == 0, output
    assert "parameters: 30, equal to the bit" in output and output.endswith("\nequal\n")
    assert "tokenizer: the same, by 10 texts and 3 special tokens" in output and "; within the tolerance" in output


def test_one_changed_value_is_found_in_parameters_and_logits(pair: tuple[Path, Path], tmp_path: Path) -> None:
    status, output = in_process(tmp_path / "out", pair[0], edited(pair[1], one_value))
    assert status == 1, output
    name = "model.layers.1.mlp.up_proj.weight"
    value = float(hf_tensors(pair[0])[name][7, 5])
    assert f"largest difference: {name}: 1 of 7200 values, at most 512 at [7, 5]: {value:.9g} and" in output
    assert "; beyond the tolerance" in output and output.endswith("\ndifferent\n")


def test_rows_that_pad_the_vocabulary_are_no_difference(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(capsys, pair[0], edited(pair[1], padded_with_noise))[0] == 0


@pytest.mark.parametrize("row", [0, 300])
def test_the_first_and_the_last_row_of_the_vocabulary_count(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], row: int
) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        if name == EMBEDDING:
            tensor[row, 3] = 9.0
        return tensor

    status, output = verdict(capsys, pair[0], edited(pair[1], change))
    assert status == 1 and f"embed_tokens.weight: 1 of {301 * 72} values" in output and f"at [{row}, 3]" in output


def test_a_vocabulary_shifted_by_one_row(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, output = verdict(capsys, pair[0], edited(pair[1], lambda name, t: t.roll(1, 0) if name == EMBEDDING else t))
    assert status == 1 and "1 differ" in output and "embed_tokens" in output


@pytest.mark.parametrize(
    ("value", "other", "differ"),
    [(0.0, -0.0, True), (float("nan"), float("nan"), False), (float("nan"), 1.0, True), (1.0, 1.0 + 2**-23, True)],
    ids=["minus zero", "not a number", "not a number and one", "the last bit"],
)
def test_it_is_bits_that_count(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], value: float, other: float, differ: bool
) -> None:
    from safetensors.torch import save_file

    source = pair[0]
    for folder, number in (("a", value), ("b", other)):
        shutil.copytree(source, source.parent / folder)
        tensors = hf_tensors(source)
        tensors["model.norm.weight"][71] = number
        save_file(tensors, source.parent / folder / "model.safetensors")
    status, output = verdict(capsys, source.parent / "a", source.parent / "b")
    assert status == int(differ)
    assert ("model.norm.weight: 1 of 72 values" in output) == differ


def test_another_precision_is_a_difference_unless_asked_for(
    llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = llama()
    hf_to_nemo(source, tmp_path / "bf16.nemo", precision="bf16")
    status, output = verdict(capsys, source, tmp_path / "bf16.nemo")
    assert status == 1 and "30 differ" in output and "bfloat16 and float32, at most" in output
    assert "… and 20 more" in output
    assert verdict(capsys, source, tmp_path / "bf16.nemo", "--precision=bf16")[0] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rotary_base": 5000.0}, "rotary_base is 100000.0 in the first, 5000.0"),
        ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon is 1e-05"),
        ({"attention_dropout": 0.1}, None),
        ({"tensor_model_parallel_size": 8}, None),
    ],
    ids=["rope", "epsilon", "dropout", "layout"],
)
def test_configuration(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str | None
) -> None:
    status, output = verdict(capsys, pair[0], edited(pair[1], **changes))
    assert status == (1 if said else 0)
    assert said is None or f"configuration: {said}" in output


def test_models_of_other_sizes(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = llama("small"), llama("large", num_hidden_layers=4, intermediate_size=96)
    status, output = verdict(capsys, small, large)
    assert status == 1 and "num_layers is 3 in the first, 4 in the second" in output
    assert "shapes [100, 72] and [96, 72]" in output and "only in the second" in output
    tied = llama("tied", **LLAMAS["gqa_9_3_tied"])
    assert "lm_head.weight: only in the first" in verdict(capsys, small, tied)[1]


def test_tokenizers(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, nemo = pair
    other = source.parent / "other"
    shutil.copytree(source, other)
    text = json.loads((other / "tokenizer.json").read_text())
    text["pre_tokenizer"]["pretokenizers"] = text["pre_tokenizer"]["pretokenizers"][1:]  # digits in one
    text["model"]["merges"] = text["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(text))
    status, output = verdict(capsys, other, nemo)
    assert status == 1 and "equal to the bit" in output and "tokenizer: other ids for" in output
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / file).unlink()
    status, output = verdict(capsys, other, source)
    assert status == 0 and "tokenizer: not compared (" in output


def test_every_format_meets_every_other(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, nemo = pair
    from transformers import AutoModelForCausalLM

    sharded, extracted = source.parent / "sharded", source.parent / "extracted"
    shutil.copytree(source, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(sharded, max_shard_size="40KB")
    archive.extract(nemo, extracted)
    ranks = edited(nemo, pipeline_model_parallel_size=3)  # an older layout, to be joined
    write_ranks(ranks, dict(read_weights(ranks / archive.MODEL_WEIGHTS)), 1, 3, local_names=True)
    shutil.rmtree(ranks / archive.MODEL_WEIGHTS)
    formats = (source, sharded, nemo, extracted, ranks)
    assert [verdict(capsys, one, another)[0] for one in formats for another in formats] == [0] * 25
    layout = summarise(ranks, hashed=False)["trained parallel"]
    assert (layout["tensor"], layout["pipeline"]) == (1, 3)


def test_what_cannot_be_compared(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.nemo").write_bytes(b"noise" * 1000)
    for wrong in ("none", "empty", "noise.nemo"):
        assert main([str(pair[0]), str(tmp_path / wrong), "--skip_logits"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and wrong in error


def test_the_largest_difference_of_logits() -> None:
    left = [torch.zeros(3, 5), torch.full((2, 5), 40.0)]
    right = [tensor.clone() for tensor in left]
    right[0][2, 4] = 0.003
    found = largest_difference(left, right)
    assert (found.prompt, found.position, found.token) == (0, 2, 4) and found.amount == pytest.approx(0.003)
    assert found.scale == 40 and found.equal and TOLERANCE * 40 > 0.003
    right[1][0, 1] = float("nan")
    found = largest_difference(left, right)
    assert (found.prompt, found.position, found.token) == (1, 0, 1) and not found.equal


def test_a_difference_in_the_last_block_is_found_and_placed(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_dpo.convert.compare.BLOCK", 50)  # 7200 values in 144 blocks
    folder = edited(pair[1], one_value)
    with open_checkpoint(pair[0]) as a, open_checkpoint(folder) as b:
        found = compare(a, b)
    assert found.largest is not None and found.largest.place is not None and found.largest.place.at == (7, 5)
    assert len(found.parameters) == 1 and found.compared == 30


def test_a_weight_that_is_written_wrong_is_noticed(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair[0], tmp_path / "out" / "x.nemo"
    write = run.stream_weights

    def wrong(create: Any, chunks: Iterator[Chunk]) -> None:
        write(create, (Chunk(c.name, c.tensor + (c.layer == 2), c.layer, c.num_layers) for c in chunks))

    monkeypatch.setattr(run, "stream_weights", wrong)
    with pytest.raises(CheckpointError, match=r"layers\.2\.\S+ was read back different") as caught:
        hf_to_nemo(source, target)
    assert "\n" not in str(caught.value) and list(target.parent.iterdir()) == []
    hf_to_nemo(source, target, verify=False)
    assert target.is_file()


def test_an_export_that_is_written_wrong_is_noticed(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write = tmp_path / "out" / "back", run.write_safetensors

    def wrong(folder: Path, entries: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
        write(folder, entries, ((name, tensor + (name == "model.norm.weight")) for name, tensor in tensors))

    monkeypatch.setattr(run, "write_safetensors", wrong)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight was read back different"):
        nemo_to_hf(pair[1], target)
    assert list(target.parent.iterdir()) == []
    assert cli.nemo_to_hf_script("x")(
        ["--input_name_or_path", str(pair[1]), "--output_path", str(target), "--skip_verify"]
    ) == 0  # fmt: skip

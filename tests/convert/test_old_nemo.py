"""NeMo 1.x's GPT arrives at megatron-core's with the same logits, from one file or from the files of many ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.convert.legacy import LegacyWeights
from nemo_dpo.convert.to_mcore import nemo_to_mcore
from nemo_dpo.model.architecture import ArchitectureError
from tests.convert.conftest import CORPUS
from tests.convert.old_nemo_cases import (
    CASES,
    UNFUSED,
    VOCABULARY,
    logits,
    logits_of_rank,
    random_model,
    random_tokens,
    write,
)
from tests.convert.test_cli import tool
from tests.support.ranks import run_ranks

LAYOUTS = {"TP 1": (1, 1), "TP 2": (2, 1), "TP 2 × PP 2": (2, 2), "PP 4": (1, 4)}
# fp32 against float64 over 4 layers of 48 channels: 1e-6 is what is seen. A head, a half or a norm in the wrong
# place is off by the size of the logits.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(case, layout) → the extracted converted archive."""
    root = tmp_path_factory.mktemp("old")
    folders = {}
    for case in CASES:
        for number, (layout, sizes) in enumerate(LAYOUTS.items()):
            place = root / f"{case}_{number}"
            nemo_to_mcore(write(random_model(case), place / "old", *sizes), place / "new.nemo")
            archive.extract(place / "new.nemo", place / "new")
            folders[case, layout] = place / "new"
    return folders


# megatron-core's `.nemo`s of one model: keys of model_config.yaml, and whether they mean GELU's tanh approximation.
READINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing said": ({}, True),
    "fusion": ({"bias_activation_fusion": True}, True),
    "fusion, not OpenAI's": ({"bias_activation_fusion": True, "openai_gelu": False}, True),
    "no fusion": ({"bias_activation_fusion": False}, False),
    "null": ({"bias_activation_fusion": None}, False),
    "no fusion, OpenAI's": ({"bias_activation_fusion": False, "openai_gelu": True}, True),
}


def reading(name: str, source: Path, folder: Path) -> Path:
    """The extracted archive `source` with the keys of READINGS[name]."""
    shutil.copytree(source, folder)
    config = {
        k: v for k, v in archive.read_model_config(folder).items() if k not in ("bias_activation_fusion", "openai_gelu")
    }
    archive.write_model_config({**config, **READINGS[name][0]}, folder)
    return folder


@pytest.fixture(scope="module")
def computed(
    converted: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Tensor]:
    """What this package's model computes with them, and with READINGS of the first, at one process."""
    shown = {key: folder for key, folder in converted.items() if key[1] in ("TP 1", "TP 2 × PP 2")}
    root = tmp_path_factory.mktemp("readings")
    shown |= {("read", name): reading(name, converted["gpt3", "TP 1"], root / name) for name in READINGS}
    (found,) = run_ranks(1, logits_of_rank, tmp_path_factory.mktemp("ranks"), shown)
    return dict(found)


@pytest.mark.parametrize("layout", ["TP 1", "TP 2 × PP 2"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_an_independent_forward_of_the_old_model(
    computed: dict[tuple[str, str], Tensor], case: str, layout: str
) -> None:
    expected = logits(random_model(case), random_tokens())
    assert expected.dtype is torch.float64 and expected.abs().max() > 1
    assert (computed[case, layout] - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", READINGS)
def test_gelu_is_what_nemo_computes(computed: dict[tuple[str, str], Tensor], name: str) -> None:
    """The tanh approximation is ten times further away than the tolerance: 2e-4 of the largest logit."""
    model = random_model("gpt3")
    fused, plain = (logits(replace(model, config={**model.config, **keys}), random_tokens()) for keys in ({}, UNFUSED))
    assert (fused - plain).abs().max() > 10 * TOLERANCE * plain.abs().max()
    expected = fused if READINGS[name][1] else plain
    assert (computed["read", name] - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "TP 1"])
@pytest.mark.parametrize("case", CASES)
def test_every_layout_of_ranks_gives_the_same_bits(
    converted: dict[tuple[str, str], Path], case: str, layout: str
) -> None:
    one, many = (read_weights(converted[case, name] / archive.MODEL_WEIGHTS) for name in ("TP 1", layout))
    assert set(one) == set(many)
    for name in one:
        rows = VOCABULARY if "word_embeddings" in name or "output_layer" in name else None
        assert torch.equal(one[name][:rows], many[name][:rows]), name


@pytest.mark.parametrize("case", CASES)
def test_norms_are_named_as_in_transformer_engines_layers(converted: dict[tuple[str, str], Path], case: str) -> None:
    """NeMo's own converter once gave them the names of megatron-core's local layers; no other reader found them."""
    names = set(read_weights(converted[case, "TP 1"] / archive.MODEL_WEIGHTS))
    assert "model.decoder.layers.self_attention.linear_qkv.layer_norm_weight" in names
    assert "model.decoder.layers.mlp.linear_fc1.layer_norm_weight" in names
    assert not any("input_layernorm" in name or "pre_mlp_layernorm" in name for name in names)
    assert not any("inv_freq" in name or "language_model" in name or "module" in name for name in names)


def test_the_config_is_megatron_cores_and_the_rest_is_kept(converted: dict[tuple[str, str], Path]) -> None:
    config = archive.read_model_config(converted["gpt_2b_001", "TP 2 × PP 2"])
    assert {key: config[key] for key in ("mcore_gpt", "transformer_engine", "vocab_size", "rotary_percentage")} == {
        "mcore_gpt": True,
        "transformer_engine": True,
        "vocab_size": VOCABULARY,
        "rotary_percentage": 0.5,
    }
    assert (config["tensor_model_parallel_size"], config["pipeline_model_parallel_size"]) == (1, 1)
    assert config["tokenizer"]["library"] == "sentencepiece" and config["normalization"] == "layernorm1p"


@pytest.mark.parametrize(
    ("case", "tanh"), [("gpt3", True), ("gpt3_unfused", False), ("fused_gelu", True), ("gpt_2b_001", False)]
)
def test_the_config_states_the_formula_of_gelu(converted: dict[tuple[str, str], Path], case: str, tanh: bool) -> None:
    config = archive.read_model_config(converted[case, "TP 1"])
    assert (config["openai_gelu"], config["bias_activation_fusion"]) == (tanh, False)
    assert "bias_gelu_fusion" not in config


def test_the_tokenizer_decides_the_vocabulary_where_the_config_does_not(tmp_path: Path) -> None:
    import sentencepiece

    old = write(random_model("gpt_2b_001"), tmp_path / "old", 2, 1)
    edit(old, override_vocab_size=None)
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"), vocab_size=150, minloglevel=2,
        model_type="bpe", hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "m.model").rename(old / ("0" * 32 + "_tokenizer.model"))
    nemo_to_mcore(old, tmp_path / "new.nemo")
    size = archive.read_model_config(tmp_path / "new.nemo")["vocab_size"]
    processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(old / ("0" * 32 + "_tokenizer.model")))
    assert 100 < size == processor.get_piece_size() < VOCABULARY


def test_tensors_are_mapped_and_not_read(tmp_path: Path) -> None:
    old = write(random_model("gpt3"), tmp_path / "old", 1, 1)
    weights = LegacyWeights(old, {})
    address = weights["model.language_model.embedding.word_embeddings.weight"].data_ptr()
    lines = Path("/proc/self/maps").read_text().splitlines()
    (mapped,) = [line for line in lines if line.endswith("model_weights.ckpt")]
    start, end = (int(number, 16) for number in mapped.split()[0].split("-"))
    assert start <= address < end


def test_artefacts_are_kept_and_no_old_file_is(tmp_path: Path) -> None:
    old = write(random_model("gpt3"), tmp_path / "old", 2, 2)
    (old / ("0" * 32 + "_tokenizer.model")).write_bytes(b"tokens")
    nemo_to_mcore(old, tmp_path / "new.nemo")
    archive.extract(tmp_path / "new.nemo", tmp_path / "new")
    names = {entry.name for entry in (tmp_path / "new").iterdir()}
    assert names == {"model_config.yaml", "model_weights", "0" * 32 + "_tokenizer.model"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convert_nemo_gpt_to_mcore", ("--in-folder", "--out-file", "--cpu-only")),
        ("convert_gpt_nemo_to_mcore", ("--input_name_or_path", "--output_path", "--cpu_only")),
    ],
)
def test_both_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: tuple[str, str, str]
) -> None:
    source, target = write(random_model("gpt3"), tmp_path / "old", 1, 1), tmp_path / "out" / "new.nemo"
    line = [arguments[0], str(source), arguments[1], str(target), arguments[2]]
    main: Callable[[list[str]], int] = tool(name).main
    assert main(line) == 0 and target.is_file()
    assert main(line) == 2 and "exists already" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 0
    assert main([arguments[0], str(target), arguments[1], str(tmp_path / "again.nemo")]) == 2
    assert "nothing to convert" in capsys.readouterr().err


def edit(folder: Path, **changes: Any) -> None:
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    (folder / "model_config.yaml").write_text(yaml.safe_dump({**config, **changes}))


def state(folder: Path, change: Callable[[dict[str, Tensor]], object], rank: str = "mp_rank_01") -> None:
    file = folder / rank / "model_weights.ckpt"
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)


LAYER = "model.language_model.encoder.layers.1."
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "query groups": (lambda f: edit(f, num_query_groups=2), "num_query_groups=2"),
    "megatron legacy": (lambda f: edit(f, megatron_legacy=True), "megatron_legacy=True"),
    "an activation of no model here": (lambda f: edit(f, activation="reglu"), "activation='fast-reglu'"),
    "an old block": (lambda f: edit(f, transformer_block_type="normformer"), "transformer_block_type='normformer'"),
    "another position embedding": (lambda f: edit(f, position_embedding_type="alibi"), "'alibi'"),
    "a fusion that leaves out the activation": (
        lambda f: edit(f, activation="fast-swiglu"), "with bias_activation_fusion, which is true where it is missing"),
    "a fusion without biases": (lambda f: edit(f, bias=False), "NeMo 1.x builds no such model"),
    "a width in words": (lambda f: edit(f, hidden_size="wide", ffn_hidden_size=None), "hidden_size='wide'"),
    "layers in words": (lambda f: edit(f, num_layers="four"), "num_layers='four'"),
    "a layout in words": (lambda f: edit(f, tensor_model_parallel_size="two", hidden_size=32), "has shape"),
    "more layers": (lambda f: edit(f, num_layers=10**9), "holds 4 layers, model_config.yaml says 1000000000"),
    "more ranks": (lambda f: edit(f, tensor_model_parallel_size=4), "tensor_model_parallel_size is 4, but"),
    "more stages": (lambda f: edit(f, pipeline_model_parallel_size=2), "pipeline_model_parallel_size is 2, but"),
    "a larger vocabulary": (lambda f: edit(f, override_vocab_size=999), "fewer than the vocabulary of 999"),
    "another width": (lambda f: edit(f, ffn_hidden_size=80), "has shape"),
    "untied without a head": (lambda f: edit(f, share_embeddings_and_output_weights=False), "1 missing"),
    "a rank's file missing": (lambda f: (f / "mp_rank_00" / "model_weights.ckpt").unlink(), "mp_rank_00 is no folder"),
    "the first rank missing": (lambda f: (f / "mp_rank_00").rename(f / "mp_rank_02"), "holds 2 ranks of a layout of 3"),
    "an unknown parameter": (lambda f: [state(f, lambda s: s.update(x=s[LAYER + "mlp.dense_4h_to_h.bias"]), rank)
                                        for rank in ("mp_rank_00", "mp_rank_01")], r"1 unknown \['x'\]"),
    "a parameter of one rank": (lambda f: state(f, lambda s: s.update(x=torch.ones(1))), "different parameters"),
    "a norm that differs": (lambda f: state(f, lambda s: s[LAYER + "input_layernorm.weight"].add_(1)),
                            "differs between ranks that should all have it"),
    "a dtype that differs": (lambda f: state(f, lambda s: s.update({
        LAYER + "mlp.dense_4h_to_h.weight": s[LAYER + "mlp.dense_4h_to_h.weight"].half()})), "shape or dtype"),
    "a layer missing": (lambda f: [state(f, lambda s: [s.pop(name) for name in list(s) if name.startswith(LAYER)], rank)
                                   for rank in ("mp_rank_00", "mp_rank_01")], "not 0 and up"),
    "two layouts": (lambda f: (f / "model_weights.ckpt").write_bytes(b""), "model_weights.ckpt is no folder"),
    "a name with and without its wrapper": (
        lambda f: state(f, lambda s: s.update({"model.module." + next(iter(s))[6:]: torch.ones(1)})), "two names"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], object], match: str) -> None:
    old = write(random_model("gpt3"), tmp_path / "old", 2, 1)
    damage(old)
    with pytest.raises((CheckpointError, ArchitectureError), match=match) as caught:
        nemo_to_mcore(old, tmp_path / "new.nemo")
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"old"}


def interleaved(folder: Path) -> None:
    """As a training checkpoint has the chunks of a virtual pipeline of 2 × 2: layers 0 and 2, 1 and 3, from 0 each."""
    for stage in range(2):
        file = folder / f"tp_rank_00_pp_rank_00{stage}" / "model_weights.ckpt"
        tensors = torch.load(file)
        torch.save({"model0": tensors, "model1": tensors}, file)


@pytest.mark.parametrize("prefix", ["NeMo 1.x", "megatron-core"])
@pytest.mark.parametrize("change", [lambda folder: None, interleaved])
def test_stages_of_a_virtual_pipeline_are_refused(
    tmp_path: Path, change: Callable[[Path], object], prefix: str
) -> None:
    """NeMo writes no such `.nemo`: what the order of the layers in one is, nothing says."""
    old = write(random_model("gpt3"), tmp_path / "old", 1, 2)
    edit(old, virtual_pipeline_model_parallel_size=2, mcore_gpt=prefix == "megatron-core")
    change(old)
    with pytest.raises(
        CheckpointError, match="virtual_pipeline_model_parallel_size is 2 with files of 2 stages"
    ) as caught:
        nemo_to_mcore(old, tmp_path / "new.nemo")
    assert "\n" not in str(caught.value) and {entry.name for entry in tmp_path.iterdir()} == {"old"}


@pytest.mark.parametrize(("pp", "chunks"), [(1, 2), (2, 1), (2, None)])
def test_a_virtual_pipeline_that_is_none(tmp_path: Path, pp: int, chunks: int | None) -> None:
    """One stage, or one chunk a stage: the layers follow each other."""
    old = write(random_model("gpt3"), tmp_path / "old", 1, pp)
    edit(old, virtual_pipeline_model_parallel_size=chunks)
    nemo_to_mcore(old, tmp_path / "new.nemo")
    assert archive.read_model_config(tmp_path / "new.nemo")["virtual_pipeline_model_parallel_size"] is None


def test_a_tied_copy_on_the_last_stage_must_be_one(tmp_path: Path) -> None:
    old = write(random_model("gpt3"), tmp_path / "old", 1, 2)
    state(old, lambda s: s["model.word_embeddings.weight"][5, 5].add_(1), "tp_rank_00_pp_rank_001")
    with pytest.raises(CheckpointError, match=r"model\.word_embeddings\.weight differs"):
        nemo_to_mcore(old, tmp_path / "new.nemo")

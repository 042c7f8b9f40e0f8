"""Adapter `.nemo` archives: NeMo's names, row order and defaults; round trips; broken, foreign and mistaken files."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.convert.adapter_nemo import check_base, dimensions_of, read_adapter, write_adapter
from nemo_dpo.lora.file import AdapterFile
from nemo_dpo.lora.spec import LoraSpec
from tests.convert.adapter_cases import ALL, CONFIG, SPECS, assert_same, entries, random_adapter
from tests.support.disk import full_disk

DIMENSIONS = dimensions_of(CONFIG)
LAYER = "model.decoder.layers.1"
ATTENTION, MLP = f"{LAYER}.self_attention.adapter_layer", f"{LAYER}.mlp.adapter_layer"


def stored(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of an adapter archive, read without the package."""
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["./model_config.yaml", "./model_weights.ckpt"]
        config = yaml.safe_load(tar.extractfile("./model_config.yaml").read())  # type: ignore[union-attr]
        weights = torch.load(io.BytesIO(tar.extractfile("./model_weights.ckpt").read()))  # type: ignore[union-attr]
    return config, weights


def rewrite(path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Change an archive's config and weights in place; what `edit` returns, if anything, replaces the weights."""
    config, weights = stored(path)
    changed = edit(config, weights)
    data = io.BytesIO()
    torch.save(weights if changed is None else changed, data)
    write_tar(path, {"model_config.yaml": yaml.safe_dump(config).encode(), "model_weights.ckpt": data.getvalue()})


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An archive of the adapter `random_adapter(SPECS["nemo, all"])`."""
    write_adapter(tmp_path / "lora.nemo", random_adapter(SPECS["nemo, all"], base="a" * 64), CONFIG)
    return tmp_path / "lora.nemo"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_written_and_read_is_the_same(tmp_path: Path, spec: LoraSpec, dtype: torch.dtype) -> None:
    file = random_adapter(spec, dtype=dtype, base="5" * 64, peft={"r": 3, "target_modules": ["q_proj"]})
    write_adapter(tmp_path / "lora.nemo", file, CONFIG)
    back = read_adapter(tmp_path / "lora.nemo", DIMENSIONS)
    assert (back.spec, back.base, back.peft) == (file.spec, file.base, file.peft)
    assert_same(dict(back.tensors), dict(file.tensors))
    assert entries(tmp_path) == {"lora.nemo"}


def test_a_layer_without_a_gate_has_one_part(tmp_path: Path) -> None:
    config = {**CONFIG, "activation": "gelu"}
    file = random_adapter(LoraSpec(ALL, 2, 2.0, "canonical"), config)
    write_adapter(tmp_path / "lora.nemo", file, config)
    assert_same(dict(read_adapter(tmp_path / "lora.nemo", dimensions_of(config)).tensors), dict(file.tensors))
    assert stored(tmp_path / "lora.nemo")[1][f"{MLP}.lora_hto4h_adapter.linear_out.weight"].shape == (56, 2)


@pytest.mark.parametrize(
    ("variant", "adapters"),
    [
        (
            "nemo",
            {
                f"{ATTENTION}.lora_kqv_adapter": (40, (6 + 2 + 2) * 4),
                f"{ATTENTION}.lora_dense_attention_adapter": (24, 40),
                f"{MLP}.lora_hto4h_adapter": (40, 2 * 56),
                f"{MLP}.lora_4htoh_adapter": (56, 40),
            },
        ),
        (
            "canonical",
            {
                f"{ATTENTION}.lora_unfused_kqv_adapter.q_adapter": (40, 24),
                f"{ATTENTION}.lora_unfused_kqv_adapter.k_adapter": (40, 8),
                f"{ATTENTION}.lora_unfused_kqv_adapter.v_adapter": (40, 8),
                f"{ATTENTION}.lora_dense_attention_adapter": (24, 40),
                f"{MLP}.lora_unfused_hto4h_adapter.gate_adapter": (40, 56),
                f"{MLP}.lora_unfused_hto4h_adapter.up_adapter": (40, 56),
                f"{MLP}.lora_4htoh_adapter": (56, 40),
            },
        ),
    ],
)
def test_names_and_shapes_are_nemos(tmp_path: Path, variant: str, adapters: dict[str, tuple[int, int]]) -> None:
    write_adapter(tmp_path / "lora.nemo", random_adapter(LoraSpec(ALL, 4, 8.0, variant, (1,))), CONFIG)
    expected = {}
    for name, (inputs, outputs) in adapters.items():
        expected |= {f"{name}.linear_in.weight": (4, inputs), f"{name}.linear_out.weight": (outputs, 4)}
    weights = stored(tmp_path / "lora.nemo")[1]
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected


def test_rows_of_fused_layers_lie_as_in_the_weight(path: Path) -> None:
    """Row by row: 2 groups of 3 query heads, a key head and a value head, of 4 channels each; gate above up."""
    file, weights = random_adapter(SPECS["nemo, all"]), stored(path)[1]
    fused = iter(weights[f"{ATTENTION}.lora_kqv_adapter.linear_out.weight"])
    q, k, v = (file.tensors[f"layers.1.linear_qkv.b.{part}"] for part in "qkv")
    for group in range(2):
        for head in range(3):
            for channel in range(4):
                assert torch.equal(next(fused), q[(group * 3 + head) * 4 + channel])
        for part in (k, v):
            for channel in range(4):
                assert torch.equal(next(fused), part[group * 4 + channel])
    assert next(fused, None) is None
    stacked = weights[f"{MLP}.lora_hto4h_adapter.linear_out.weight"]
    for row in range(56):
        assert torch.equal(stacked[row], file.tensors["layers.1.linear_fc1.b.gate"][row])
        assert torch.equal(stacked[56 + row], file.tensors["layers.1.linear_fc1.b.up"][row])


def test_the_config_is_the_bases_with_nemos_section(tmp_path: Path) -> None:
    file = random_adapter(SPECS["nemo, qkv of some layers"], base="b" * 64)
    write_adapter(tmp_path / "lora.nemo", file, CONFIG)
    config = stored(tmp_path / "lora.nemo")[0]
    section = config.pop("peft")
    assert section["peft_scheme"] == "lora"
    tuning = section["lora_tuning"]
    assert (tuning["adapter_dim"], tuning["alpha"], tuning["variant"]) == (2, 3.5, "nemo")
    assert tuning["target_modules"] == ["attention_qkv"]
    assert tuning["layer_selection"] == [1, 3]  # NeMo counts from 1
    assert {"adapter_dropout", "weight_tying"} <= tuning.keys()  # NeMo has no defaults for them
    assert config.pop("nemo_dpo")["base_weights"] == "b" * 64
    one_rank = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}  # by which NeMo looks for files
    assert config == {**CONFIG, **one_rank, "virtual_pipeline_model_parallel_size": None, "sequence_parallel": False}


def drop(*keys: str) -> Callable[[dict[str, Any], Any], None]:
    def edit(config: dict[str, Any], _weights: Any) -> None:
        for key in keys:
            config["peft"]["lora_tuning"].pop(key)

    return edit


def tuning(**changes: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda config, _weights: config["peft"]["lora_tuning"].update(changes)


@pytest.mark.parametrize("edit", [drop("alpha"), tuning(alpha=None)], ids=["absent", "null"])
def test_alpha_is_the_rank_where_the_config_is_silent(path: Path, edit: Any) -> None:
    rewrite(path, edit)
    assert read_adapter(path, DIMENSIONS).spec.scale == 1.0


def test_a_file_of_nemos_own(tmp_path: Path) -> None:
    """No section of ours, groups of targets, Parameters in an OrderedDict in another order."""
    write_adapter(tmp_path / "lora.nemo", random_adapter(SPECS["nemo, all"]), CONFIG)

    def edit(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        del config["nemo_dpo"]
        config["peft"]["lora_tuning"] |= {"target_modules": ["mlp", "attention", "mlp_fc1"], "alpha": 8}
        del config["peft"]["lora_tuning"]["variant"]
        return OrderedDict((name, torch.nn.Parameter(weights[name])) for name in sorted(weights, reverse=True))

    rewrite(tmp_path / "lora.nemo", edit)
    back = read_adapter(tmp_path / "lora.nemo", DIMENSIONS)
    assert (back.spec, back.base, back.peft) == (SPECS["nemo, all"], None, None)
    assert_same(dict(back.tensors), dict(random_adapter(SPECS["nemo, all"]).tensors))


QKV_OUT = f"{ATTENTION}.lora_kqv_adapter.linear_out.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "a tensor missing": (lambda c, w: w.__delitem__(QKV_OUT), f"1 tensors missing.*{QKV_OUT}"),
    "a tensor more": (lambda c, w: w.update({"model.x": torch.zeros(2)}), r"1 unknown \['model.x'\]"),
    "another rank in the weights": (
        lambda c, w: w.update({QKV_OUT: torch.zeros(40, 8)}),
        rf"{QKV_OUT} is float32 \[40, 8\], expected floating point \[40, 4\]; its rank",
    ),
    "another rank in the config": (tuning(adapter_dim=8), r"is float32 \[4, 40\], expected floating point \[8, 40\]"),
    "whole numbers": (lambda c, w: w.update({QKV_OUT: torch.zeros(40, 4).int()}), "is int32"),
    "other targets": (tuning(target_modules=["attention"]), "0 tensors missing .*12 unknown"),
    "other layers": (tuning(layer_selection=[1, 2]), "8 unknown"),
    "the other variant": (tuning(variant="canonical"), "tensors missing .*unknown"),
    "no rank": (drop("adapter_dim"), "'adapter_dim': None"),
    "alpha is text": (tuning(alpha="much"), "'alpha': 'much'"),
    "unknown target": (tuning(target_modules=["attention_qkv", "router"]), r"'router'"),
    "a layer too many": (tuning(layer_selection=[1, 4]), r"'layer_selection': \[1, 4\]"),
    "unknown variant": (tuning(variant="dora"), "'variant': 'dora'"),
    "tied weights": (tuning(weight_tying=True), "'weight_tying': True"),
    "another scheme": (lambda c, w: c["peft"].update(peft_scheme="ptuning"), "is no LoRA adapter .*'ptuning'"),
    "no section": (lambda c, w: c.update(peft=None), "is no LoRA adapter .*None"),
    "a list": (lambda c, w: list(w.values()), "no flat dictionary of tensors"),
    "nested": (lambda c, w: {"state_dict": w}, "no flat dictionary of tensors"),
}


@pytest.mark.parametrize(("edit", "match"), BROKEN.values(), ids=BROKEN.keys())
def test_what_does_not_fit_is_named(path: Path, edit: Any, match: str) -> None:
    rewrite(path, edit)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_adapter(path, DIMENSIONS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_no_code_in_the_weights_is_run(path: Path, tmp_path: Path) -> None:
    rewrite(path, lambda c, w: {"model.x": Hostile(tmp_path / "evil")})
    with pytest.raises(CheckpointError, match="damaged or not trusted"):
        read_adapter(path, DIMENSIONS)
    assert entries(tmp_path) == {"lora.nemo"}


def test_truncation_is_noticed_wherever_it_falls(path: Path) -> None:
    whole = path.read_bytes()
    for size in (0, 300, 600, 2000, len(whole) // 2, len(whole) - 12_000):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"lora\.nemo") as caught:
            read_adapter(path, DIMENSIONS)
        assert "\n" not in str(caught.value)


def test_weights_truncated_inside_a_whole_archive(path: Path) -> None:
    with tarfile.open(path) as tar:
        files = {name[2:]: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    for size in (0, 100, len(files["model_weights.ckpt"]) - 50):
        write_tar(path, {**files, "model_weights.ckpt": files["model_weights.ckpt"][:size]})
        with pytest.raises(CheckpointError, match="damaged or not trusted") as caught:
            read_adapter(path, DIMENSIONS)
        assert "\n" not in str(caught.value)


def test_mistaken_archives(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_dump(stored(path)[0]).encode()
    cases = [
        ({"model_config.yaml": yaml.safe_dump(CONFIG).encode(), "model_weights/x": b""}, "give the adapter's .nemo"),
        ({"model_config.yaml": config, "model_weights/x": b""}, "holds a whole model"),
        ({"model_config.yaml": config, "mp_rank_00/model_weights.ckpt": b""}, "split over ranks"),
        ({"model_config.yaml": config}, "holds no model_weights.ckpt"),
    ]
    for files, match in cases:
        write_tar(tmp_path / "other.nemo", files)
        with pytest.raises(CheckpointError, match=match):
            read_adapter(tmp_path / "other.nemo", DIMENSIONS)
    with (
        pytest.raises(CheckpointError, match="holds an adapter, not a model"),
        archive.open_folder(path, scratch=tmp_path),
    ):
        pass


def test_another_base_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\[4, 40\], expected floating point \[4, 48\]"):
        read_adapter(path, dimensions_of({**CONFIG, "hidden_size": 48}))
    file = read_adapter(path, DIMENSIONS)
    check_base(file, "a" * 64, path)
    check_base(AdapterFile(file.spec, file.tensors), "c" * 64, path)  # says nothing: may be
    with pytest.raises(CheckpointError, match=r"base weights aaaaaaaaaaaa…, these are cccccccccccc…"):
        check_base(file, "c" * 64, path)


def test_tensors_that_are_not_those_of_the_specification_are_not_written(tmp_path: Path) -> None:
    file = random_adapter(SPECS["nemo, all"])
    short = AdapterFile(LoraSpec(ALL, 5, 8.0), file.tensors)
    with pytest.raises(CheckpointError, match=r"\[4, 40\], expected floating point \[5, 40\]"):
        write_adapter(tmp_path / "lora.nemo", short, CONFIG)
    assert entries(tmp_path) == set()


def test_nothing_is_replaced_unasked(path: Path) -> None:
    before = path.read_bytes()
    other = random_adapter(SPECS["canonical, all"])
    with pytest.raises(CheckpointError, match="exists already"):
        write_adapter(path, other, CONFIG)
    assert path.read_bytes() == before
    write_adapter(path, other, CONFIG, overwrite=True)
    assert read_adapter(path, DIMENSIONS).spec == other.spec


def test_a_full_disk_leaves_the_earlier_archive_and_no_rubbish(path: Path) -> None:
    before = path.read_bytes()
    with full_disk(10_000), pytest.raises(CheckpointError, match="cannot be written"):
        write_adapter(path, random_adapter(SPECS["canonical, all"]), CONFIG, overwrite=True)
    assert path.read_bytes() == before and entries(path.parent) == {"lora.nemo"}


KILLED = """
import os, signal, sys
from pathlib import Path
from nemo_dpo.convert.adapter_nemo import write_adapter
from tests.convert.adapter_cases import CONFIG, SPECS, random_adapter
os.fsync = lambda _descriptor: os.kill(os.getpid(), signal.SIGKILL)  # all bytes written, none renamed
write_adapter(Path(sys.argv[1]), random_adapter(SPECS["canonical, all"]), CONFIG, overwrite=True)
"""


def test_a_kill_leaves_the_earlier_archive(path: Path) -> None:
    before = path.read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert all(name == path.name or name.startswith(f".{path.name}.") for name in entries(path.parent))

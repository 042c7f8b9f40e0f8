"""Names and shapes of an adapter's tensors, by hand."""

from __future__ import annotations

from nemo_dpo.lora.spec import Dimensions, LoraSpec, layers_of, linears_of

DIMENSIONS = Dimensions(layers=3, hidden=64, ffn=96, heads=4, query_groups=2, head_channels=24, gated=True)


def test_targets() -> None:
    assert linears_of(["attention_qkv"]) == ("linear_qkv",)
    assert linears_of(["mlp", "attention_dense", "mlp_fc1"]) == ("linear_proj", "linear_fc1", "linear_fc2")
    assert linears_of(["attention", "mlp"]) == linears_of(["all"])


def test_layers() -> None:
    assert layers_of([3, 1], 3) == (0, 2)
    assert layers_of([2], 3) == (1,)
    # As many as there are, in any order, are what no selection is.
    assert layers_of(None, 3) is layers_of([], 3) is layers_of([2, 3, 1], 3) is None
    assert layers_of([3, 3, 1], 3) == (0, 2)


def test_parts_share_an_a_in_nemos_variant() -> None:
    spec = LoraSpec(("linear_qkv", "linear_fc1"), rank=8, alpha=16.0, layers=(1,))
    assert spec.scale == 2.0
    assert spec.shapes(DIMENSIONS) == {
        "layers.1.linear_qkv.a.q_k_v": (8, 64),
        "layers.1.linear_qkv.b.q": (96, 8),
        "layers.1.linear_qkv.b.k": (48, 8),
        "layers.1.linear_qkv.b.v": (48, 8),
        "layers.1.linear_fc1.a.gate_up": (8, 64),
        "layers.1.linear_fc1.b.gate": (96, 8),
        "layers.1.linear_fc1.b.up": (96, 8),
    }


def test_every_part_has_its_own_a_in_the_canonical_variant() -> None:
    spec = LoraSpec(("linear_qkv", "linear_proj", "linear_fc2"), rank=4, alpha=4.0, variant="canonical", layers=(0,))
    assert spec.shapes(DIMENSIONS) == {
        "layers.0.linear_qkv.a.q": (4, 64),
        "layers.0.linear_qkv.a.k": (4, 64),
        "layers.0.linear_qkv.a.v": (4, 64),
        "layers.0.linear_qkv.b.q": (96, 4),
        "layers.0.linear_qkv.b.k": (48, 4),
        "layers.0.linear_qkv.b.v": (48, 4),
        "layers.0.linear_proj.a.o": (4, 96),
        "layers.0.linear_proj.b.o": (64, 4),
        "layers.0.linear_fc2.a.down": (4, 96),
        "layers.0.linear_fc2.b.down": (64, 4),
    }


def test_every_layer_unless_some_are_selected() -> None:
    spec = LoraSpec(("linear_proj",), rank=4, alpha=4.0)
    assert {name.split(".")[1] for name in spec.shapes(DIMENSIONS)} == {"0", "1", "2"}

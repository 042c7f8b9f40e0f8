"""Adapters under every layout against W x + (alpha / rank) B A x written into Hugging Face's model, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_dpo.checkpoint import archive
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.convert.adapter_nemo import write_adapter
from nemo_dpo.convert.adapter_peft import nemo_to_peft
from nemo_dpo.logprobs import response_logps
from nemo_dpo.lora.adapters import initial
from nemo_dpo.lora.file import AdapterFile
from nemo_dpo.lora.spec import LoraSpec, linears_of
from nemo_dpo.parallel.groups import Layout
from tests.lora.lora_cases import SEED, dimensions, findings
from tests.model.model_cases import BETA, SIZES, Case, make_case, random_batches, reference_logps
from tests.support.ranks import run_ranks

LAYOUTS = {
    "1 process": Layout(1),
    "TP 2": Layout(2, tp=2),
    "TP 2 + SP": Layout(2, tp=2, sequence_parallel=True),
    "PP 2": Layout(2, pp=2),
}
SPECS = {
    "nemo, all": LoraSpec(linears_of(["all"]), rank=4, alpha=6.0),
    "canonical, all": LoraSpec(linears_of(["all"]), rank=4, alpha=6.0, variant="canonical"),
    # Under PP 2 the first stage has no adapter.
    "attention, one layer": LoraSpec(linears_of(["attention"]), rank=8, alpha=4.0, layers=(3,)),
}
HF = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
HF |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
GRADIENT = 1e-5  # fp32 against float64 through four layers


@dataclass(frozen=True)
class Expected:
    logps: list[Tensor]
    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=SPECS)
def spec(request: pytest.FixtureRequest) -> LoraSpec:
    return SPECS[request.param]


@pytest.fixture(scope="module")
def expected(case: Case, spec: LoraSpec) -> Expected:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.hf, dtype=torch.float64, attn_implementation="eager").eval()
    tensors = write_into(model, spec, case)
    batches, logps, margins = random_batches(SIZES), [], []
    for batch, reference in zip(batches, reference_logps(batches), strict=True):
        indices = (batch.response_positions, batch.targets, batch.response_segment, batch.num_responses)
        logps.append(response_logps(model(batch.tokens).logits, *indices))
        ratio = logps[-1] - reference
        margins.append(ratio[0::2] - ratio[1::2])
    loss = -F.logsigmoid(BETA * torch.cat(margins)).mean()
    loss.backward()
    return Expected([v.detach() for v in logps], loss.item(), {name: t.grad for name, t in tensors.items()})


def test_peft_computes_the_same(case: Case, spec: LoraSpec, expected: Expected, tmp_path: Path) -> None:
    """PEFT's own forward pass, on the adapter that the run starts from and as it would be exported."""
    from transformers import AutoModelForCausalLM

    config, sizes = archive.read_model_config(case.nemo), dimensions(case.nemo)
    start = initial(spec, sizes, SEED, b="xavier")
    file = AdapterFile(spec, {name: start(name) for name in spec.shapes(sizes)})
    write_adapter(tmp_path / "adapter.nemo", file, config)
    nemo_to_peft(tmp_path / "adapter.nemo", tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(case.hf, dtype=torch.float64, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "peft", autocast_adapter_dtype=False).double().eval()
    for batch, theirs in zip(random_batches(SIZES), expected.logps, strict=True):
        indices = (batch.response_positions, batch.targets, batch.response_segment, batch.num_responses)
        with torch.no_grad():
            found = response_logps(model(batch.tokens).logits, *indices)
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-10)


def write_into(model: Any, spec: LoraSpec, case: Case) -> dict[str, Tensor]:
    """Give the adapter's linear layers their update; returns its tensors, which ask for gradients."""
    sizes = dimensions(case.nemo)
    start = initial(spec, sizes, SEED, b="xavier")
    tensors = {name: start(name).double().requires_grad_() for name in spec.shapes(sizes)}
    for name, b in tensors.items():
        _, layer, linear, kind, part = name.split(".")
        if kind == "b":
            shared = [key for key in spec.a_parts(sizes.linears()[linear]) if part in key.split("_")]
            a = tensors[f"layers.{layer}.{linear}.a.{shared[0]}"]
            module = model.model.layers[int(layer)].get_submodule(HF[part])
            module.register_forward_hook(
                lambda _, args, output, a=a, b=b: output + spec.alpha / spec.rank * (args[0] @ a.T @ b.T)
            )
    return tensors


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def ranks(
    case: Case, spec: LoraSpec, layout: Layout, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What each rank found, and the gradients of all of them together."""
    folder = tmp_path_factory.mktemp("ranks")
    out = folder / "gradients"
    (folder / "meeting").mkdir()
    found = run_ranks(layout.world, findings, folder / "meeting", case.nemo, layout, spec, out)
    return found, {name.removeprefix("model."): tensor for name, tensor in read_weights(out).items()}


def test_log_probs_and_loss(ranks: Any, expected: Expected, layout: Layout) -> None:
    with_loss = [found for found in ranks[0] if found["loss"] is not None]
    assert len(with_loss) == layout.tp
    for found in with_loss:
        for ours, theirs in zip(found["logps policy"], expected.logps, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=2e-5)
        assert found["loss"] == pytest.approx(expected.loss, abs=2e-5)


def test_gradients_of_the_adapter_and_of_nothing_else(ranks: Any, expected: Expected, layout: Layout) -> None:
    found, gradients = ranks
    assert gradients.keys() == expected.gradients.keys()
    for name, theirs in expected.gradients.items():
        assert theirs.norm() > 0, name
        assert (gradients[name] - theirs).norm() <= GRADIENT * theirs.norm(), name
    assert all(rank["trained"] for rank in found)
    # Each tensor counted once, whichever ranks hold it.
    norm = sum(float(gradient.square().sum()) for gradient in expected.gradients.values()) ** 0.5
    assert [rank["grad_norm"] for rank in found] == pytest.approx([norm] * layout.world, rel=GRADIENT)


def test_only_the_active_adapter_takes_part(ranks: Any) -> None:
    for found in (rank for rank in ranks[0] if rank["loss"] is not None):
        policy, none, other = (torch.cat(found[f"logps {name}"]) for name in ("policy", None, "other"))
        for left, right in ((policy, none), (policy, other), (none, other)):
            assert (left - right).abs().min() > 1e-4


def test_without_an_active_adapter_it_is_the_model_that_was_built_without_any(ranks: Any, layout: Layout) -> None:
    """Bit by bit."""
    last = [found for found in ranks[0] if found["logits plain"]]
    assert len(last) == layout.tp
    for found in last:
        for what in ("logps", "logits"):
            assert len(found[f"{what} plain"]) == (2 if what == "logps" else 1)
            assert all(map(torch.equal, found[f"{what} None"], found[f"{what} plain"]))
            assert not any(map(torch.equal, found[f"{what} policy"], found[f"{what} plain"]))


def test_shares_follow_from_the_base_layer(ranks: Any, spec: LoraSpec, layout: Layout) -> None:
    """Heads of 16 channels, 4 of queries and 2 of keys: 64 and 32 rows; the output projection has 64 columns."""
    shapes, tp = ranks[0][0]["shapes"], layout.tp
    if not spec.adapts(0):
        assert shapes == {}
        return
    assert shapes["b.q"] == [64 // tp, spec.rank] and shapes["b.k"] == shapes["b.v"] == [32 // tp, spec.rank]
    assert shapes["a.o"] == [spec.rank, 64 // tp] and shapes["b.o"] == [64, spec.rank]
    assert all(shapes[f"a.{name}"] == [spec.rank, 64] for name in ("q", "q_k_v") if f"a.{name}" in shapes)

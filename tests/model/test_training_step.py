"""The whole DPO loss: log-probs against the dense oracle on Hugging Face's logits, gradients against its autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_dpo.checkpoint import archive
from nemo_dpo.checkpoint.weights import read_weights
from nemo_dpo.convert import hf_to_nemo
from nemo_dpo.data.batch import MicroBatch
from nemo_dpo.logprobs import response_logps
from tests.model.conftest import Findings
from tests.model.model_cases import BETA, CASES, SIZES, Case, random_batches, reference_logps
from tests.support.tiny import VOCABULARY, byte_tokenizer

GRADIENT = 1e-5  # fp32 against float64 through four layers; 2e-6 is what is seen
EMBEDDINGS = ("model.embedding.word_embeddings.weight", "model.output_layer.weight")


class Expected(NamedTuple):
    """Computed by transformers, in float64."""

    logps: list[Tensor]
    loss: float
    more: float  # what else is minimised
    gradients: dict[str, Tensor]  # in the names and layout of a `.nemo`


def by_hugging_face(
    case: Case, folder: Path, sizes: Sequence[int] = SIZES, more: Callable[[Any, MicroBatch], Tensor] | None = None
) -> Expected:
    """Loss and gradients of −log σ(β · margin), averaged over the pairs.

    Args:
        sizes: pairs of each micro-batch.
        more: (transformers' output, micro-batch) → what else is minimised.
    """
    from transformers import AutoModelForCausalLM

    plain = {"attn_implementation": "eager", **({"experts_implementation": "eager"} if more else {})}
    model = AutoModelForCausalLM.from_pretrained(case.hf, dtype=torch.float64, **plain).eval()
    batches, logps, margins, terms = random_batches(sizes), [], [], []
    options = {"output_router_logits": True} if more else {}
    for batch, reference in zip(batches, reference_logps(batches), strict=True):
        output = model(batch.tokens, **options)
        terms += [more(output, batch)] if more else []
        indices = (batch.response_positions, batch.targets, batch.response_segment, batch.num_responses)
        logps.append(response_logps(output.logits, *indices))
        ratio = logps[-1] - reference
        margins.append(ratio[0::2] - ratio[1::2])
    loss = -F.logsigmoid(BETA * torch.cat(margins)).mean()
    also = sum(terms, torch.zeros(()))
    (loss + also).backward()
    # The converter, which has tests of its own, brings the gradients into the form of a checkpoint.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.float().save_pretrained(folder / "hf")
    byte_tokenizer().save_pretrained(folder / "hf")
    hf_to_nemo(folder / "hf", folder / "gradients.nemo")
    with archive.open_folder(folder / "gradients.nemo") as extracted:
        gradients = dict(read_weights(extracted / archive.MODEL_WEIGHTS))
    return Expected([values.detach() for values in logps], loss.item(), also.item(), gradients)


@pytest.fixture(scope="module")
def expected(cases: dict[str, Case], names: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expected]:
    return {name: by_hugging_face(cases[name], tmp_path_factory.mktemp("expected")) for name in names}


@pytest.mark.parametrize("name", CASES)
def test_log_probs(findings: Findings, expected: dict[str, Expected], name: str) -> None:
    """Sums of up to 20 tokens' log-probs of about −6: 1e-5 is what fp32 leaves of 100."""
    holders = findings.each(name, "logps")
    assert len(holders) == findings.layout.tp
    for logps in holders:
        for ours, theirs in zip(logps, expected[name].logps, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_loss(findings: Findings, expected: dict[str, Expected], name: str) -> None:
    """Errors of a margin of four such sums, times β."""
    losses = findings.each(name, "loss")
    assert losses == pytest.approx([expected[name].loss] * findings.layout.tp, abs=2e-5)
    assert abs(expected[name].loss - math.log(2)) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_gradients(findings: Findings, expected: dict[str, Expected], name: str) -> None:
    """Every parameter's, relative to its norm."""
    check_gradients(findings.gradients / name, expected[name])


def check_gradients(folder: Path, expected: Expected) -> None:
    """What a run has left in `folder` is, parameter by parameter, what is expected."""
    gradients = dict(read_weights(folder))
    assert gradients.keys() == expected.gradients.keys()
    for parameter, theirs in expected.gradients.items():
        ours = gradients[parameter]
        if parameter in EMBEDDINGS:
            assert torch.count_nonzero(ours[VOCABULARY:]) == 0, "rows that pad the vocabulary"
            ours, theirs = ours[:VOCABULARY], theirs[:VOCABULARY]
        assert theirs.norm() > 0, parameter
        assert (ours - theirs).norm() <= GRADIENT * theirs.norm(), parameter


@pytest.mark.parametrize("name", CASES)
def test_gradient_norm(findings: Findings, expected: dict[str, Expected], name: str) -> None:
    """Each parameter counted once, whichever ranks hold it: tied embeddings and norms are on several."""
    norm = norm_of(expected[name])
    assert findings.each(name, "grad_norm") == pytest.approx([norm] * findings.layout.world, rel=GRADIENT)


def norm_of(expected: Expected) -> float:
    """Of all gradients together."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected.gradients.values()))

"""One rank of test_oracle.py: adapters whose B is not zero, their log-probs and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_dpo.lora.spec import LoraSpec
from tests.model.model_cases import (
    SIZES,
    build,
    logits_step,
    random_batches,
    random_tokens,
    tokens_only,
    training_step,
)

SEED = 3


def dimensions(nemo: Path) -> Any:
    from nemo_dpo.checkpoint import archive
    from nemo_dpo.model.architecture import Architecture

    return Architecture.parse(archive.read_model_config(nemo)).dimensions


def findings(_rank: int, nemo: Path, layout: Any, spec: LoraSpec, out: Path) -> dict[str, Any]:
    """Log-probs and logits by active adapter, and of a plain model, built without any; loss, gradients in `out`."""
    from nemo_dpo.lora.adapters import activate, active, attach, initial
    from nemo_dpo.lora.spec import POLICY
    from nemo_dpo.parallel.response import collect_logps

    sizes = dimensions(nemo)

    def prepare(chunks: list[Any]) -> None:
        attach(chunks, "other", spec, sizes, initial(spec, sizes, SEED + 1, b="xavier"))
        for chunk in chunks:
            chunk.freeze_base()
        attach(chunks, POLICY, spec, sizes, initial(spec, sizes, SEED, b="xavier"))
        activate(chunks, POLICY)

    engine = build(nemo, layout, prepare)
    plain = build(nemo, layout)
    batches, tokens = random_batches(SIZES, multiple=layout.tp), [tokens_only(random_tokens(2, 24))]
    found: dict[str, Any] = {}
    for name in (None, "other", POLICY):
        with active(engine.chunks, name):
            found[f"logps {name}"] = engine.forward_only(batches, collect_logps)
            found[f"logits {name}"] = engine.forward_only(tokens, logits_step)
    found["logps plain"] = plain.forward_only(batches, collect_logps)
    found["logits plain"] = plain.forward_only(tokens, logits_step)
    names = [name for chunk in engine.chunks for name, p in chunk.named_parameters() if p.requires_grad]
    found["trained"] = all(".adapters.policy." in name for name in names)
    found["shapes"] = {
        name.split("adapters.policy.")[1]: list(p.shape)
        for name, p in engine.chunks[0].named_parameters()
        if name.startswith("decoder.layers.0.self_attention") and ".adapters.policy." in name
    }
    return found | training_step(engine, out)


def logps_of_rank(_rank: int, nemos: dict[str, Path], layout: Any, spec: LoraSpec) -> dict[str, Any]:
    """Model → log-probs with an adapter; empty where this rank has no output layer."""
    from nemo_dpo.lora.adapters import activate, attach, initial
    from nemo_dpo.lora.spec import POLICY
    from nemo_dpo.parallel.response import collect_logps

    found = {}
    for name, nemo in nemos.items():
        sizes = dimensions(nemo)

        def prepare(chunks: list[Any], sizes: Any = sizes) -> None:
            attach(chunks, POLICY, spec, sizes, initial(spec, sizes, SEED, b="xavier"))
            activate(chunks, POLICY)

        found[name] = build(nemo, layout, prepare).forward_only(random_batches(SIZES, layout.tp), collect_logps)
    return found

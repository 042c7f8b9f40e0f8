"""Logits of a checkpoint in fp32: by transformers in Hugging Face's names, of a `.nemo` by our model code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert.old_nemo import open_modern
from nemo_dpo.convert.opened import GgufFile, HfFolder, Opened
from nemo_dpo.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is Paris, and the Eiffel Tower was finished there in 1889.",
    "def add(a, b):\n    return a + b  # 12 + 34 == 46\n",
    "naïve café, Ελληνικά, кириллица, 東京タワー, العربية, हिन्दी, 🙂",
    "  1,000,000 = 10**6;\n\n\tx",
)
# Relative to the largest logit. Both sides compute in fp32 and sum in another order; 2e-6 is what tiny models show, and
# it grows with depth and width. A swapped or rotated weight changes logits by their own size.
TOLERANCE = 1e-4


class LogitsDifference(NamedTuple):
    """Where two sets of logits differ most."""

    amount: float
    scale: float  # the largest logit of the first
    prompt: int
    position: int
    token: int

    @property
    def equal(self) -> bool:
        return self.amount <= TOLERANCE * self.scale


def prompt_ids(opened: Opened, tokenizer: Tokenizer) -> list[list[int]]:
    """PROMPTS as token ids, cut to what the model takes."""
    longest = int(opened.config["max_position_embeddings"])
    return [ids[:longest] for ids in tokenizer.encode_batch(list(PROMPTS))]


def logits_of(opened: Opened, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """[tokens, vocabulary] in fp32 for each prompt. The whole model is in memory, in fp32, until this returns."""
    return _by_transformers(opened, prompts) if isinstance(opened, HfFolder) else _by_our_code(opened, prompts)


def largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> LogitsDifference:
    """Where `left` and `right` are farthest apart."""
    found = []
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        apart = (a - b).abs().nan_to_num(nan=torch.inf)
        position, token = divmod(int(apart.argmax()), a.shape[1])
        found.append(
            LogitsDifference(float(apart.max()), max(float(x.abs().max()) for x in left), number, position, token)
        )
    return max(found, key=lambda difference: difference.amount)


def _by_transformers(opened: HfFolder, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    if isinstance(opened, GgufFile):
        model = _filled(opened)
    else:
        model = AutoModelForCausalLM.from_pretrained(opened.path, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return [model(torch.tensor([list(ids)])).logits[0] for ids in prompts]


def _filled(opened: GgufFile) -> Any:
    """transformers' model with the values of `opened`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**opened.hf_config()), dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in opened.tensors(torch.float32, ""):
            parameters[name].copy_(tensor)
    return model


def _by_our_code(nemo: Opened, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    with open_modern(nemo.path, loadable=True) as folder, _one_rank() as groups:
        chunk = _built(folder, nemo.config, groups)
        vocab = int(nemo.config["vocab_size"])
        with torch.no_grad():
            rows = [torch.tensor([list(ids)], device=groups.device) for ids in prompts]
            return [chunk.logits(row, torch.arange(row.shape[1])[None].to(row))[0, :, :vocab].cpu() for row in rows]


@contextlib.contextmanager
def _one_rank() -> Iterator[Any]:
    """Process groups of this process alone."""
    from nemo_dpo.parallel import cpu_host
    from nemo_dpo.parallel.groups import Layout, initialize

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        cpu_host.install()
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield initialize(Layout(1), torch.device("cuda" if on_gpu else "cpu"), seed=1)
    finally:
        dist.destroy_process_group()


def _built(folder: Path, config: dict[str, Any], groups: Any) -> Any:
    from nemo_dpo.checkpoint import sharded
    from nemo_dpo.model.architecture import Architecture
    from nemo_dpo.model.build import BuildOptions, build_model

    (chunk,), _ = build_model(Architecture.parse(config), groups, BuildOptions(dtype=torch.float32))
    sharded.load_weights(folder / archive.MODEL_WEIGHTS, [chunk])
    return chunk.eval()

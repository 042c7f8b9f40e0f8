"""The table of supported families, for the documentation: what the tables say, not a second list."""

from __future__ import annotations

from nemo_dpo.convert.families import FAMILIES, REFUSED
from nemo_dpo.convert.families.common import COMMON
from nemo_dpo.convert.family import Family

DOCUMENT = "docs/families.md"
HEAD = """# Model families

What the converters know, between a Hugging Face folder and a `.nemo` archive, in both directions and bit for bit. The
family is taken from `model_type` in `config.json`; a `.nemo` from elsewhere is exported as the first family that
computes what its `model_config.yaml` says. `tools/convert/list_families.py` writes this page from the tables in
`nemo_dpo/convert/families/`.

| Models | `model_type` | transformers' class | In `model_config.yaml` | Only with |
| --- | --- | --- | --- | --- |
"""
TAIL = """
*Only with*: keys of `config.json` that have one value (or several) here; anything else is refused by name, as are RoPE
scalings other than `linear` and `llama3`, quantized checkpoints, and whatever else the page does not list.

Not supported:

"""
NOTES = """
Notes:

* **Sliding windows** that every layer has are honoured; NeMo's `window_size` counts the tokens before a token's own, so
  `sliding_window: 4096` is `[4095, 0]`. NeMo's own converter writes `[4096, 0]`, which is a window of 4097.
  Without Transformer Engine, rows longer than the window make a mask of length × length.
* **GPT-NeoX** in parallel form has the layer `name: megatron_gpt_neox`, which NeMo does not know and so refuses.
* **Gemma**'s norms keep the weights of the files, with `layernorm_zero_centered_gamma: true`; a `.nemo` of NeMo's own
  converter, which adds one to them, can be trained but not exported.
* **Mixtral**'s experts train under expert parallelism; [experts.md](experts.md) says what goes with them.
* **GPT-2** and **StarCoder2** were trained with dropout, and training takes it from the checkpoint:
  `model.hidden_dropout=0 model.attention_dropout=0` switches it off.
* **Adapters** go to and from PEFT for every family, of Mixtral those of the attention. Where q, k and v are one
  projection (GPT-2, GPT-NeoX) PEFT has one A for them: train with `model.peft.lora_tuning.variant=nemo`.
"""


def overview() -> str:
    """The page."""
    rows = "".join(f"{_row(family)}\n" for family in FAMILIES.values())
    refused = "".join(f"* `{model_type}`: {reason}.\n" for model_type, reason in REFUSED.items())
    return f"{HEAD}{rows}{TAIL}{refused}{NOTES}"


def _row(family: Family) -> str:
    own = {name: value for name, value in family.constants.items() if name not in COMMON}
    cells = (
        family.models,
        f"`{family.model_type}`",
        f"`{family.architecture}`",
        "<br>".join(f"`{name}: {_yaml(value)}`" for name, value in own.items()),
        "<br>".join(f"`{name}: {' or '.join(map(_yaml, values))}`" for name, values in family.required.items()),
    )
    return f"| {' | '.join(cells)} |"


def _yaml(value: object) -> str:
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))

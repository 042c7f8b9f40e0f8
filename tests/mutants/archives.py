"""Deliberate bugs in reading older archives and bare vocabularies."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

LEGACY = "nemo_dpo/convert/legacy.py"
SAME_BITS = "tests/convert/test_old_nemo.py::test_every_layout_of_ranks_gives_the_same_bits"
OLD_LOGITS = "tests/convert/test_old_nemo.py::test_logits_equal_an_independent_forward_of_the_old_model"

ARCHIVE_MUTATIONS = (
    Mutation(
        "gate and up of each rank left together",
        LEGACY,
        "interleave(parts, 2)",
        "interleave(parts, 1)",
        f"{SAME_BITS}[gpt_2b_001-TP 2]",
    ),
    Mutation(
        "columns of the ranks in the wrong order",
        LEGACY,
        "torch.cat(tuple(parts), dim=1)",
        "torch.cat(tuple(parts[::-1]), dim=1)",
        f"{SAME_BITS}[gpt3-TP 2]",
    ),
    Mutation(
        "rows of the ranks in the wrong order",
        LEGACY,
        "return torch.cat(tuple(parts))",
        "return torch.cat(tuple(parts[::-1]))",
        f"{SAME_BITS}[gpt3-TP 2]",
    ),
    Mutation(
        "NeMo 1.x's fused GELU taken for the exact one",
        "nemo_dpo/convert/old_nemo.py",
        '"openai_gelu": arch.activation == "gelu_tanh"',
        '"openai_gelu": False',
        f"{OLD_LOGITS}[gpt3-TP 1]",
    ),
    Mutation(
        "the special tokens of tiktoken not counted",
        "nemo_dpo/tokenizer/build.py",
        "enumerate([*special, *texts])",
        "enumerate([*texts, *special])",
        "tests/tokenizer/test_tokenizer_forms.py::test_special_tokens_of_a_tiktoken_vocabulary_come_first",
    ),
)

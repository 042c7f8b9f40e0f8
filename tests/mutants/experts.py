"""Deliberate bugs in experts: their tables, their routing, the scale of the auxiliary loss."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

EXPERTS = "nemo_dpo/parallel/experts.py"
ORACLE = "tests/model/test_experts.py::"
TRAINED = f"{ORACLE}test_gradients[1 process-aux_loss]"

EXPERT_MUTATIONS = (
    Mutation(
        "gate and up of experts swapped",
        "nemo_dpo/convert/families/mixtral.py",
        '(Param(f"{EXPERT}.w1.weight", "ffn hidden"), up)',
        '(up, Param(f"{EXPERT}.w1.weight", "ffn hidden"))',
        f"{ORACLE}test_logits_equal_hugging_faces[1 process]",
    ),
    Mutation(
        "experts in the opposite order",
        "nemo_dpo/convert/rules.py",
        'param.name.replace("{expert}", str(number))',
        'param.name.replace("{expert}", str(experts - 1 - number))',
        f"{ORACLE}test_logits_equal_hugging_faces[1 process]",
    ),
    Mutation(
        "auxiliary loss scaled twice",
        EXPERTS,
        "self.config.moe_aux_loss_coeff * self.token_weight * total",
        "self.config.moe_aux_loss_coeff * self.token_weight * self.token_weight * total",
        TRAINED,
    ),
    Mutation(
        "auxiliary loss scaled by a rank's own tokens",
        EXPERTS,
        "groups.sum_over_dp(torch.tensor(own, dtype=torch.float64)).tolist()",
        "own",
        f"{ORACLE}test_gradients[EP 2-aux_loss]",
    ),
    Mutation(
        "load of experts counted on one tensor-parallel rank",
        EXPERTS,
        "if self.tp_cp_group.size() > 1:",
        "if False:",
        f"{ORACLE}test_gradients[TP 2 + SP-aux_loss]",
    ),
    Mutation(
        "padding takes part in the auxiliary loss",
        "nemo_dpo/model/gpt.py",
        "rotary_pos_emb=rotary, padding_mask=padding)",
        "rotary_pos_emb=rotary, padding_mask=None)",
        TRAINED,
    ),
    Mutation(
        "auxiliary loss of a sequence taken over the micro-batch",
        EXPERTS,
        "parts=bsz",
        "parts=1",
        f"{ORACLE}test_gradients[1 process-seq_aux_loss]",
    ),
    Mutation(
        "experts' gradients not clipped",
        "nemo_dpo/parallel/engine.py",
        "for part in self.optimizer.chained_optimizers:  # experts have one of their own",
        "for part in self.optimizer.chained_optimizers[:1]:",
        "tests/cli/test_train_experts.py::test_experts_are_clipped_too",
    ),
)

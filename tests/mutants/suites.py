"""Which tests an operator mutant of a file has to face, in the order in which they run."""

from __future__ import annotations

EQUAL = "tests/cli/test_equivalence.py::test_same_training_in_every_layout"
# Names of parameters as pytest writes them: \xd7 is ×.
COMMANDS = (rf"{EQUAL}[sgd-PP 2 \xd7 VPP 2]", rf"{EQUAL}[mcore_distributed_optim-DP 2 \xd7 TP 2]")
SPINE = (
    "tests/parallel/test_update.py",
    "tests/parallel/test_weight.py",
    "tests/model/test_training_step.py::test_log_probs[PP 2-gqa_tied]",
    "tests/model/test_training_step.py::test_gradients[PP 2-gqa_tied]",
    *COMMANDS,
)
RESUME = "tests/cli/test_resume.py::test_stopped_and_resumed_is_uninterrupted"
RESUMES = (f"{RESUME}[DP 2, distributed]", f"{RESUME}[1 process, sgd]")
LOSSES = ("tests/losses", "tests/metrics")

SUITES: dict[str, tuple[str, ...]] = {
    "nemo_dpo/losses/objective.py": LOSSES,
    "nemo_dpo/losses/preference.py": LOSSES,
    "nemo_dpo/losses/sft.py": LOSSES,
    "nemo_dpo/losses/types.py": LOSSES,
    "nemo_dpo/metrics/preference.py": ("tests/metrics",),
    "nemo_dpo/logprobs.py": ("tests/logprobs/test_response_logps.py", "tests/logprobs/test_vocab_logps.py"),
    "nemo_dpo/parallel/vocab_logps.py": ("tests/logprobs/test_vocab_logps.py", "tests/logprobs/test_vocab_ranks.py"),
    "nemo_dpo/parallel/engine.py": SPINE,
    "nemo_dpo/parallel/response.py": SPINE,
    "nemo_dpo/parallel/experts.py": (
        "tests/model/test_experts.py",
        "tests/cli/test_train_experts.py::test_the_auxiliary_loss_is_trained_or_off",
    ),
    "nemo_dpo/parallel/groups.py": ("tests/parallel/test_stages.py", "tests/model/test_dropout.py", *SPINE),
    "nemo_dpo/parallel/collective.py": ("tests/parallel/test_collective.py", *COMMANDS),
    "nemo_dpo/parallel/cpu_host.py": (
        "tests/parallel/test_cpu_host.py",
        "tests/model/test_dropout.py",
        *SPINE,
        "tests/model/test_experts.py",
    ),
    "nemo_dpo/parallel/mcore_repairs.py": RESUMES,
    "nemo_dpo/parallel/processes.py": (
        "tests/cli/test_launch.py::test_a_killed_parent_takes_its_ranks_along_and_sigterm_saves",
    ),
    "nemo_dpo/parallel/watch.py": ("tests/parallel/test_watch.py", "tests/cli/test_lost_ranks.py"),
    "nemo_dpo/reference/frozen.py": ("tests/reference", *COMMANDS),
}

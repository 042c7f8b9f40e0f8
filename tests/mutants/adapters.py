"""Deliberate bugs in adapters, their files, and cached references."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

LINEAR = "nemo_dpo/lora/linear.py"
ADAPTERS = "nemo_dpo/lora/adapters.py"
START = "nemo_dpo/training/adapters.py"
CACHED = "nemo_dpo/reference/cached.py"

LOGPS = "tests/lora/test_oracle.py::test_log_probs_and_loss"
GRADIENTS = "tests/lora/test_oracle.py::test_gradients_of_the_adapter_and_of_nothing_else"
ROWS = "tests/reference/test_cached.py::test_rows_follow_the_index_of_the_pair"
FILLED = "tests/cli/test_cached_reference.py::test_cached_is_frozen"
WHICH = "tests/cli/test_which_adapter.py::"
PEFT = "tests/convert/test_adapters_peft.py::"

ADAPTER_MUTATIONS = (
    Mutation(
        "adapters left on in the reference pass",
        "nemo_dpo/reference/adapter.py",
        "with active(self._engine.chunks, self._name):",
        'with active(self._engine.chunks, "policy"):',
        "tests/cli/test_lora.py::test_the_reference_run_learns[canonical, SGD]",
    ),
    Mutation(
        "adapters stay off after an exception",
        ADAPTERS,
        "            module.active = was\n",
        "            pass\n",
        "tests/lora/test_switch.py::test_off_inside_and_on_again_after_an_exception",
    ),
    Mutation("scale forgotten", LINEAR, " * self.spec.scale", "", f"{LOGPS}[nemo, all-1 process]"),
    Mutation(
        "B not zero",
        ADAPTERS,
        'INITIALIZERS[a if ".a." in name else b]',
        "INITIALIZERS[a]",
        "tests/lora/test_initial.py::test_a_is_random_and_b_is_zero",
    ),
    Mutation(
        "all adapters start alike",
        ADAPTERS,
        'zlib.crc32(f"{seed} {name}".encode())',
        "seed",
        "tests/lora/test_initial.py::test_no_two_tensors_and_no_two_seeds_are_alike",
    ),
    Mutation(
        "base not frozen",
        "nemo_dpo/model/gpt.py",
        "        self.requires_grad_(False)\n",
        "",
        f"{GRADIENTS}[nemo, all-1 process]",
    ),
    Mutation(
        "every rank takes the first share",
        ADAPTERS,
        "whole.chunk(group.size(), axis)[group.rank()]",
        "whole.chunk(group.size(), axis)[0]",
        f"{LOGPS}[nemo, all-TP 2]",
    ),
    Mutation(
        "gradient of A not summed over the rows of the base",
        LINEAR,
        "return copy_to_tensor_model_parallel_region(inner, group=self.tp_group)",
        "return inner",
        f"{GRADIENTS}[nemo, all-TP 2]",
    ),
    Mutation(
        "columns of the base not summed",
        LINEAR,
        "return reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)",
        "return inner",
        f"{LOGPS}[nemo, all-TP 2]",
    ),
    Mutation(
        "the ranks drop other places of an input that all of them hold",
        LINEAR,
        "base.sequence_parallel or not base.splits_rows",
        "True",
        "tests/model/test_dropout.py::test_masks[TP 2, pre]",
    ),
    Mutation(
        "the ranks drop other places of an output that all of them hold",
        LINEAR,
        "base.sequence_parallel or base.splits_rows",
        "True",
        "tests/model/test_dropout.py::test_masks[TP 2, post]",
    ),
    Mutation(
        "gradients of parts of the sequence not summed",
        LINEAR,
        "parameter.sequence_parallel = sequence_parallel ",
        "parameter.sequence_parallel = False ",
        f"{GRADIENTS}[nemo, all-TP 2 + SP]",
    ),
    Mutation(
        "parts of a fused layer not interleaved",
        LINEAR,
        ".unflatten(-1, (self._groups, -1))",
        ".unflatten(-1, (1, -1))",
        f"{LOGPS}[canonical, all-1 process]",
    ),
    Mutation(
        "no gradient through recomputed layers",
        "nemo_dpo/model/gpt.py",
        "start = start.detach().requires_grad_()",
        "start = start.detach()",
        "tests/cli/test_lora.py::test_same_training_in_every_layout[nemo, distributed Adam-recompute full]",
    ),
    Mutation(
        "scale forgotten in the merge",
        "nemo_dpo/convert/merge.py",
        "file.spec.scale * (",
        "(",
        f"{PEFT}test_merging_a_peft_adapter_is_pefts_merge",
    ),
    Mutation(
        "parts not interleaved in the merge",
        "nemo_dpo/convert/merge.py",
        "interleave(rows, linear.groups)",
        "interleave(rows, 1)",
        f"{PEFT}test_merging_a_peft_adapter_is_pefts_merge",
    ),
    Mutation(
        "cached rows shifted by one",
        CACHED,
        "self._tables[split][batch.pair_index.cpu().numpy()]",
        "self._tables[split][batch.pair_index.cpu().numpy() - 1]",
        FILLED,
    ),
    Mutation(
        "chosen and rejected swapped in the cache",
        CACHED,
        "logps[chosen_and_rejected] =",
        "logps[chosen_and_rejected.flip(1)] =",
        ROWS,
    ),
    Mutation(
        "chosen and rejected swapped while the cache is filled",
        CACHED,
        "responses[micro_batch.pair_segments]",
        "responses[micro_batch.pair_segments.flip(1)]",
        FILLED,
    ),
    Mutation(
        "the cache's key forgets the adapter",
        "nemo_dpo/app.py",
        '"adapter": ',
        '"adapter": "" and ',
        f"{WHICH}test_log_probs_of_another_adapter_are_refused[numbers]",
    ),
    Mutation(
        "the cache's key forgets the four bits",
        "nemo_dpo/app.py",
        '"base_quantization": ',
        '"base_quantization": "" and ',
        f"{WHICH}test_log_probs_of_the_base_in_full_are_not_those_in_four_bits",
    ),
    Mutation(
        "a resume forgets the adapters beside the trained one",
        START,
        '**{f"the start of adapter {name}": digest for name, digest in self.hashes.items()}',
        "**{}",
        f"{WHICH}test_another_adapter_beside_the_trained_one_does_not_resume[numbers]",
    ),
    Mutation(
        "an adapter is known by its tensors alone",
        START,
        " × {spec.scale}",
        "",
        f"{WHICH}test_log_probs_of_another_adapter_are_refused[alpha]",
    ),
)

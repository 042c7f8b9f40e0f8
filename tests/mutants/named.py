"""Deliberate bugs by name, each with the test that must turn red.

`old` occurs exactly once in `file`. A bug that several tests notice names the cheapest; those of the spine name a test
that runs the command line.
"""

from __future__ import annotations

from tests.mutants.adapters import ADAPTER_MUTATIONS
from tests.mutants.archives import ARCHIVE_MUTATIONS
from tests.mutants.converters import TOOL_MUTATIONS
from tests.mutants.experts import EXPERT_MUTATIONS
from tests.mutants.families import FAMILY_MUTATIONS
from tests.mutants.mutation import Mutation

OBJECTIVE = "nemo_dpo/losses/objective.py"
PREFERENCE = "nemo_dpo/losses/preference.py"
METRICS = "nemo_dpo/metrics/preference.py"
BATCH = "nemo_dpo/data/batch.py"
SAMPLER = "nemo_dpo/data/sampler.py"
TOKENIZE = "nemo_dpo/data/tokenize.py"
LLAMA = "nemo_dpo/convert/families/llama.py"
VOCAB = "nemo_dpo/parallel/vocab_logps.py"
GPT = "nemo_dpo/model/gpt.py"
ENGINE = "nemo_dpo/parallel/engine.py"
FROZEN = "nemo_dpo/reference/frozen.py"
STEP = "nemo_dpo/training/step.py"
SHARDED = "nemo_dpo/checkpoint/sharded.py"
FOLDERS = "nemo_dpo/checkpoint/folders.py"

LOSSES = "tests/losses/test_preference_losses.py::"
OBJECTIVES = "tests/losses/test_objective.py::"
FIGURES = "tests/metrics/test_preference_metrics.py::"
BATCHES = "tests/data/test_data_batch.py::"
SAMPLERS = "tests/data/test_data_sampler.py::"
TOKENS = "tests/data/test_data_tokenize.py::"
RULES = "tests/convert/test_rules.py::"
CHUNKED = "tests/logprobs/test_vocab_logps.py::"
VOCAB_RANKS = "tests/logprobs/test_vocab_ranks.py::"
ORACLE = "tests/model/test_training_step.py::"
EQUAL = "tests/cli/test_equivalence.py::test_same_training_in_every_layout"
CLIPPED = "tests/parallel/test_update.py::test_clipping"
FROZEN_PASS = "tests/reference/test_frozen.py::"
RESUMED = "tests/cli/test_resume.py::test_stopped_and_resumed_is_uninterrupted[DP 2, distributed]"
KILLED = "tests/cli/test_bad_input.py::test_killed_while_writing"

LOSS_MUTATIONS = (
    Mutation(
        "sign of δ",
        "nemo_dpo/losses/types.py",
        "return self.chosen.log_ratio - self.rejected.log_ratio",
        "return self.rejected.log_ratio - self.chosen.log_ratio",
        f"{LOSSES}test_value[dpo]",
    ),
    Mutation(
        "sign of the SFT term",
        "nemo_dpo/losses/sft.py",
        "-stats.chosen.logps",
        "stats.chosen.logps",
        f"{OBJECTIVES}test_weights",
    ),
    Mutation(
        "averaging switch ignored",
        OBJECTIVE,
        "return stats.per_token() if average else stats",
        "return stats",
        f"{OBJECTIVES}test_averaged_log_probs",
    ),
    Mutation(
        "reference averaged, policy not",
        "nemo_dpo/losses/types.py",
        "logps=self.logps / self.tokens, ref_logps",
        "ref_logps",
        f"{OBJECTIVES}test_averaged_log_probs",
    ),
    Mutation(
        "gt_reward_scale ignored",
        PREFERENCE,
        "constants.gt_reward_scale * stats.reward_gap",
        "stats.reward_gap",
        f"{LOSSES}test_gt_reward_scale_scales_the_ground_truth_only",
    ),
    Mutation(
        "gt_reward_scale not handed on",
        OBJECTIVE,
        "LossConstants(options.ref_policy_kl_penalty, options.gt_reward_scale)",
        "LossConstants(options.ref_policy_kl_penalty)",
        f"{OBJECTIVES}test_gt_reward_scale_reaches_the_loss",
    ),
    Mutation(
        "IPO's target 1/β",
        PREFERENCE,
        "1 / (2 * constants.beta)",
        "1 / constants.beta",
        f"{LOSSES}test_ipo_is_least_at_one_over_two_beta",
    ),
    Mutation(
        "backward and forward KL exchanged",
        PREFERENCE,
        "_bernoulli_kl(truth, model)",
        "_bernoulli_kl(model, truth)",
        f"{LOSSES}test_value[rpo_bwd_kl]",
    ),
    Mutation(
        "mean over the pairs of a micro-batch",
        "nemo_dpo/losses/types.py",
        "LossSum(losses.sum(),",
        "LossSum(losses.mean(),",
        f"{OBJECTIVES}test_sums_add_up_over_micro_batches",
    ),
)

METRIC_MUTATIONS = (
    Mutation(
        "β missing from the rewards",
        METRICS,
        "beta * output.chosen_log_ratio.double(), beta * output.rejected_log_ratio.double()",
        "output.chosen_log_ratio.double(), output.rejected_log_ratio.double()",
        f"{FIGURES}test_by_hand",
    ),
    Mutation(
        "a tie counts as accurate",
        METRICS,
        "chosen > rejected",
        "chosen >= rejected",
        f"{FIGURES}test_at_the_start",
    ),
    Mutation(
        "mean over responses of logits' means",
        METRICS,
        'total["logits_chosen"] / total["tokens_chosen"]',
        'total["logits_chosen"] / pairs',
        f"{FIGURES}test_by_hand",
    ),
)

DATA_MUTATIONS = (
    Mutation(
        "chosen and rejected swapped in the rows",
        BATCH,
        "for response in (pair.chosen_ids, pair.rejected_ids)",
        "for response in (pair.rejected_ids, pair.chosen_ids)",
        f"{BATCHES}test_two_pairs_by_hand",
    ),
    Mutation(
        "prompt tokens trained on",
        TOKENIZE,
        "(_end(whole[len(prompt) :], eos_id) for whole in wholes)",
        "(_end(whole, eos_id) for whole in wholes)",
        f"{TOKENS}test_the_response_is_what_follows_the_prompt",
    ),
    Mutation(
        "targets not shifted",
        BATCH,
        "tokens.reshape(-1)[response_positions + 1]",
        "tokens.reshape(-1)[response_positions]",
        f"{BATCHES}test_two_pairs_by_hand",
    ),
    Mutation(
        "positions off by one",
        BATCH,
        "first = row * size + len(prompt) - 1",
        "first = row * size + max(0, len(prompt) - 2)",
        f"{BATCHES}test_two_pairs_by_hand",
    ),
    Mutation(
        "end token lost",
        TOKENIZE,
        "else [*response, eos_id]",
        "else response",
        f"{TOKENS}test_append_eod_ends_each_response_once",
    ),
    Mutation(
        "prompt-prefix check dropped",
        TOKENIZE,
        "if any(whole[: len(prompt)] != prompt for whole in wholes):",
        "if False:",
        f"{TOKENS}test_an_invalid_pair_is_a_counted_skip_or_an_error",
    ),
    Mutation(
        "last ragged batch lost",
        SAMPLER,
        "else whole + (rest > 0)",
        "else max(1, whole)",
        f"{SAMPLERS}test_each_pair_comes_once_an_epoch",
    ),
    Mutation(
        "last ragged validation batch lost",
        SAMPLER,
        "range(0, num_pairs, global_batch_size)",
        "range(0, num_pairs - global_batch_size + 1, global_batch_size)",
        f"{SAMPLERS}test_validation_sees_all_pairs_in_file_order",
    ),
    Mutation(
        "same order in every epoch",
        SAMPLER,
        "SeedSequence([seed, epoch])",
        "SeedSequence([seed])",
        f"{SAMPLERS}test_the_order_depends_on_seed_and_epoch_and_nothing_else",
    ),
    Mutation(
        "every rank gets all pairs",
        BATCH,
        "[dp_rank::dp_size])",
        "[:])",
        f"{SAMPLERS}test_each_pair_is_on_one_rank_in_one_micro_batch",
    ),
    Mutation(
        "order depends on the data-parallel rank",
        "nemo_dpo/training/data.py",
        "cfg.model.seed,\n            shuffle",
        "cfg.model.seed + groups.dp.rank(),\n            shuffle",
        f"{EQUAL}[sgd-DP 2]",
    ),
)

LOGPROB_MUTATIONS = (
    Mutation(
        "start of the vocabulary shard ignored",
        VOCAB,
        "weight, targets - vocab_start, real_rows",
        "weight, targets, real_rows",
        f"{VOCAB_RANKS}test_values_and_gradients",
    ),
    Mutation(
        "padding rows in the softmax",
        VOCAB,
        "_softmax_parts(hidden, weight[:real_rows], targets, chunk_tokens)",
        "_softmax_parts(hidden, weight, targets, chunk_tokens)",
        f"{CHUNKED}test_values_and_gradients",
    ),
    Mutation(
        "softmax's denominator of the own shard only",
        VOCAB,
        "    dist.all_reduce(total, group=group)\n",
        "",
        f"{VOCAB_RANKS}test_values_and_gradients",
    ),
    Mutation(
        "largest logit of the own shard only",
        VOCAB,
        "    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)\n",
        "",
        f"{VOCAB_RANKS}test_values_and_gradients",
    ),
    Mutation(
        "mean logits of the own shard only",
        VOCAB,
        "        dist.all_reduce(row_sum, group=group)\n",
        "        pass\n",
        f"{VOCAB_RANKS}test_values_and_gradients",
    ),
    Mutation(
        "vocabulary shard's start counted from the first rank",
        GPT,
        "vocab_start=self.pg_collection.tp.rank() * weight.shape[0]",
        "vocab_start=0",
        f"{ORACLE}test_log_probs[TP 2-gqa_tied]",
    ),
)

CONVERTER_MUTATIONS = (
    Mutation(
        "query, key and value not interleaved by group",
        "nemo_dpo/convert/rules.py",
        "return torch.cat(by_group, dim=1).reshape(-1, *rest)",
        "return torch.cat(tuple(parts))",
        f"{RULES}test_qkv_is_interleaved_by_query_group",
    ),
    Mutation(
        "gate and up swapped",
        LLAMA,
        '(Param(f"{MLP}.gate_proj.weight", "ffn hidden"), Param(f"{MLP}.up_proj.weight", "ffn hidden"))',
        '(Param(f"{MLP}.up_proj.weight", "ffn hidden"), Param(f"{MLP}.gate_proj.weight", "ffn hidden"))',
        f"{RULES}test_gate_is_above_up",
    ),
)

SPINE_MUTATIONS = (
    Mutation(
        "chosen and rejected swapped in the statistics",
        STEP,
        "enumerate(batch.pair_segments.unbind(1))",
        "enumerate(batch.pair_segments.flip(1).unbind(1))",
        f"{ORACLE}test_loss[1 process-gqa_tied]",
    ),
    Mutation(
        "mean of micro-batches' means",
        STEP,
        "return output.total, output.weight, Outcome(",
        "return output.total / output.weight.clamp(min=1), output.weight.clamp(max=1), Outcome(",
        f"{ORACLE}test_gradients[1 process-gqa_tied]",
    ),
    Mutation(
        "weight of the own rank only",
        ENGINE,
        "finalize_model_grads(chunks, self._weight, **groups)",
        "finalize_model_grads(chunks, None, **groups)\n"
        "        for chunk in chunks:\n"
        "            chunk.scale_gradients(1.0 / self._weight.clamp(min=1))",
        f"{EQUAL}[sgd-DP 2]",
    ),
    Mutation(
        "pairs counted instead of the objective's weight",
        STEP,
        "return output.total, output.weight, Outcome(",
        "return output.total, output.weight.new_tensor(batch.num_pairs), Outcome(",
        "tests/parallel/test_weight.py::test_gradients_and_figures_are_divided_by_the_objectives_weight[DP 2]",
    ),
    Mutation(
        "gradients not reduced over the data-parallel group",
        ENGINE,
        "finalize_model_grads(chunks, self._weight, **groups)",
        "for chunk in chunks:\n            chunk.scale_gradients(0.5 / self._weight.clamp(min=1))",
        f"{EQUAL}[sgd-DP 2]",
    ),
    Mutation(
        "figures of the own data-parallel rank only",
        "nemo_dpo/training/module.py",
        "        dist.all_reduce(total, group=groups.dp)\n",
        "",
        f"{EQUAL}[sgd-DP 2]",
    ),
    Mutation(
        "gradient of the hidden states not reduced over the tensor-parallel group",
        GPT,
        "            selected = copy_to_tensor_model_parallel_region(selected, group=self.pg_collection.tp)\n",
        "            pass\n",
        f"{ORACLE}test_gradients[TP 2-gqa_tied]",
    ),
    Mutation(
        "the same under sequence parallelism",
        GPT,
        "tensor_parallel_output_grad=True",
        "tensor_parallel_output_grad=False",
        f"{ORACLE}test_gradients[TP 2 + SP-gqa_tied]",
    ),
    Mutation(
        "norms not marked as sequence parallel",
        "nemo_dpo/model/layers.py",
        "parameter.sequence_parallel = config.sequence_parallel",
        "parameter.sequence_parallel = False",
        f"{ORACLE}test_gradients[TP 2 + SP-gqa_tied]",
    ),
    Mutation(
        "shared-out parameters not marked: gradient norm of the first rank",
        "nemo_dpo/model/build.py",
        "    _mark_partitioned(chunk)\n    mark_experts",
        "    mark_experts",
        f"{ORACLE}test_gradient_norm[TP 2-gqa_tied]",
    ),
    Mutation(
        "loss divided per micro-batch by megatron-core as well",
        "nemo_dpo/model/build.py",
        "calculate_per_token_loss=True",
        "calculate_per_token_loss=False",
        f"{ORACLE}test_gradients[1 process-gqa_tied]",
    ),
    Mutation(
        "clipped as if the norm were 1",
        ENGINE,
        "clip_grad_by_total_norm_fp32(part.get_parameters(), clip_grad, norm)",
        "clip_grad_by_total_norm_fp32(part.get_parameters(), clip_grad, 1.0)",
        CLIPPED,
    ),
    Mutation("never clipped", ENGINE, "if clip_grad > 0:", "if False:", CLIPPED),
    Mutation(
        "reference not frozen",
        FROZEN,
        "p.detach().clone() if on_host",
        "p.detach() if on_host",
        f"{FROZEN_PASS}test_updates_of_the_policy_do_not_reach_it[1 process]",
    ),
    Mutation(
        "weights not swapped back",
        ENGINE,
        "        _point(parameters, own)\n",
        "        pass\n",
        f"{FROZEN_PASS}test_weights_are_swapped_inside_and_back_after_an_exception",
    ),
    Mutation(
        "dropout live in the reference pass",
        ENGINE,
        "with torch.no_grad(), evaluation(self.chunks):",
        "with torch.no_grad():",
        f"{FROZEN_PASS}test_reference_is_the_policy_before_the_first_update[1 process]",
    ),
    Mutation(
        "dropout off for ever after the reference pass",
        ENGINE,
        "            module.training = training\n",
        "            pass\n",
        f"{FROZEN_PASS}test_modes_come_back_after_an_exception",
    ),
)

WAITING_AND_DRAWING_MUTATIONS = (
    Mutation(
        "attention's masks alike on the tensor-parallel ranks",
        "nemo_dpo/parallel/groups.py",
        "contextlib.nullcontext() if sequence_parallel else get_cuda_rng_tracker().fork()",
        "contextlib.nullcontext()",
        "tests/model/test_dropout.py::test_masks[TP 2]",
    ),
    Mutation(
        "a fork within megatron-core's fork",
        "nemo_dpo/parallel/groups.py",
        "contextlib.nullcontext() if sequence_parallel else get_cuda_rng_tracker().fork()",
        "get_cuda_rng_tracker().fork()",
        "tests/model/test_dropout.py::test_recompute_draws_the_masks_of_the_forward_pass[TP 2 + SP-weights]",
    ),
    Mutation(
        "work of rank 0 awaited in the group of training",
        "nemo_dpo/parallel/collective.py",
        "dist.all_gather_object(found, value, group=_waiting_group(dist.group.WORLD))",
        "dist.all_gather_object(found, value)",
        "tests/parallel/test_collective.py::test_work_of_rank_zero_may_outlast_the_timeout_of_training",
    ),
)

CHECKPOINT_MUTATIONS = (
    Mutation(
        "resume without the optimizer's state",
        SHARDED,
        '    engine.load_optimizer(loaded["optimizer"])\n',
        "",
        RESUMED,
    ),
    Mutation(
        "resume without the generators", SHARDED, '        _restore_rng(loaded["rng"])\n', "        pass\n", RESUMED
    ),
    Mutation(
        "resumed parameters share one step counter",
        "nemo_dpo/parallel/mcore_repairs.py",
        'state["step"] = state["step"].detach().clone()',
        "pass",
        RESUMED,
    ),
    Mutation(
        "unfinished checkpoint taken as complete",
        FOLDERS,
        "f.suffix not in (UNFINISHED, REPLACED)",
        "f.suffix not in (REPLACED,)",
        "tests/checkpoint/test_unfinished.py::test_complete_checkpoints_and_nothing_else",
    ),
    Mutation(
        "interrupted save looks like a checkpoint",
        FOLDERS,
        "return folder.with_name(folder.name + UNFINISHED)",
        'return folder.with_name(folder.name + ".partial")',
        f"{KILLED}[kill_before_the_rename-4]",
    ),
    Mutation(
        "a validation that a stop has cut short is forgotten",
        "nemo_dpo/app.py",
        'progress.get("validation_due", False)',
        "False",
        "tests/cli/test_stop_requests.py::test_a_stop_in_a_validation_does_not_wait_for_its_end[1]",
    ),
    Mutation(
        "a validation that is due is logged twice",
        "nemo_dpo/training/run_log.py",
        " or place.validation_due",
        "",
        "tests/training/test_run_log.py::test_a_validation_that_is_due_is_logged_again",
    ),
    Mutation(
        "a stop before its validation is saved under the figures of the one before",
        "nemo_dpo/training/cadence.py",
        "dict.fromkeys(self._latest, math.nan) if self.validation_due else self._latest",
        "self._latest",
        "tests/cli/test_stop_requests.py::test_a_stop_in_a_validation_does_not_wait_for_its_end[1]",
    ),
    Mutation(
        "a save on its way is given up at a step that is not finite",
        "nemo_dpo/training/cadence.py",
        "if not isinstance(exception, NonFiniteError):",
        "if True:",
        "tests/cli/test_async_saves.py::test_a_run_that_ends_at_a_step_that_is_not_finite_completes_it",
    ),
    Mutation(
        "a checkpoint's files are not looked at",
        "nemo_dpo/checkpoint/manifest.py",
        "if found != entry.crc32:",
        "if False:",
        "tests/cli/test_damaged.py::test_no_good_one_is_an_error",
    ),
)

MUTATIONS = (
    *LOSS_MUTATIONS,
    *METRIC_MUTATIONS,
    *DATA_MUTATIONS,
    *LOGPROB_MUTATIONS,
    *CONVERTER_MUTATIONS,
    *FAMILY_MUTATIONS,
    *EXPERT_MUTATIONS,
    *TOOL_MUTATIONS,
    *SPINE_MUTATIONS,
    *WAITING_AND_DRAWING_MUTATIONS,
    *CHECKPOINT_MUTATIONS,
    *ADAPTER_MUTATIONS,
    *ARCHIVE_MUTATIONS,
)

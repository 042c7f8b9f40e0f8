"""Deliberate bugs in the tools around the tables: streaming, comparing, the scripts."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

COMPARE = "nemo_dpo/convert/compare.py"
VERIFY_CODE = "nemo_dpo/convert/verify.py"
VERIFY = "tests/convert/test_verify.py::"
FOLDERS = "tests/convert/test_hostile_folders.py::test_refused_in_one_line_and_without_harm"
MEMORY = "tests/convert/test_memory.py::"

TOOL_MUTATIONS = (
    Mutation(
        "verify passes over a difference",
        COMPARE,
        "            found.parameters.append(difference)\n",
        "            pass\n",
        f"{VERIFY}test_a_vocabulary_shifted_by_one_row",
    ),
    Mutation(
        "verify compares values, not bits",
        COMPARE,
        "torch.equal(_bits(x), _bits(y)) for x, y",
        "torch.equal(x, y) for x, y",
        f"{VERIFY}test_it_is_bits_that_count[minus zero]",
    ),
    Mutation(
        "verify compares the first block of a tensor",
        COMPARE,
        "return zip(a.reshape(-1).split(BLOCK), b.reshape(-1).split(BLOCK), strict=True)",
        "return iter([(a.reshape(-1)[:BLOCK], b.reshape(-1)[:BLOCK])])",
        f"{VERIFY}test_a_difference_in_the_last_block_is_found_and_placed",
    ),
    Mutation(
        "verify ignores the configuration",
        COMPARE,
        "return not self.config and not self.parameters",
        "return not self.parameters",
        f"{VERIFY}test_configuration[rope]",
    ),
    Mutation(
        "verify accepts any logits",
        "nemo_dpo/convert/logits.py",
        "return self.amount <= TOLERANCE * self.scale",
        "return True",
        f"{VERIFY}test_the_largest_difference_of_logits",
    ),
    Mutation(
        "verify always says equal to the shell",
        "nemo_dpo/convert/cli.py",
        "return 0 if equal else 1",
        "return 0",
        f"{VERIFY}test_models_of_other_sizes",
    ),
    Mutation(
        "an archive is not read again",
        "nemo_dpo/convert/run.py",
        "check=check if verify else None",
        "check=None",
        f"{VERIFY}test_a_weight_that_is_written_wrong_is_noticed",
    ),
    Mutation(
        "an export is not read again",
        "nemo_dpo/convert/run.py",
        "            check_same(nemo, open_hf(target), dtype)\n",
        "            pass\n",
        f"{VERIFY}test_an_export_that_is_written_wrong_is_noticed",
    ),
    Mutation(
        "a merge is not read again",
        "nemo_dpo/convert/merge.py",
        "check=check if verify else None",
        "check=None",
        "tests/convert/test_adapters_peft.py::test_a_merge_that_is_written_wrong_is_noticed",
    ),
    Mutation(
        "what was not to be written passes",
        COMPARE,
        "        if left:\n",
        "        if False:\n",
        "tests/convert/test_to_mcore.py::test_what_is_written_wrong_is_noticed[float32]",
    ),
    Mutation(
        "a tokenizer's files are not looked at",
        "nemo_dpo/tokenizer/load.py",
        "            check_whole(file)\n",
        "            pass\n",
        "tests/tokenizer/test_hf_files.py::test_a_file_that_is_cut_off_is_not_passed_on"
        "[SentencePiece beside a tokenizer.json]",
    ),
    Mutation(
        "special tokens of another number are the same",
        "nemo_dpo/tokenizer/compare.py",
        "    if moved:\n",
        "    if False:\n",
        "tests/tokenizer/test_hf_files.py::test_what_no_plain_text_shows[an added token]",
    ),
    Mutation(
        "a damaged tokenizer is none",
        VERIFY_CODE,
        "return not damaged, missing",
        "return True, missing",
        "tests/tokenizer/test_hf_files.py::test_a_file_that_is_cut_off_is_not_passed_on[tokenizer.json]",
    ),
    Mutation(
        "GGUF: query and key rows left as llama.cpp has them",
        "nemo_dpo/convert/gguf_file.py",
        "return _rotary_halves(tensor, rows) if rows else tensor",
        "return tensor",
        "tests/convert/test_gguf.py::test_a_tiny_llama_comes_back_bit_for_bit[file]",
    ),
    Mutation(
        "JSON may nest as deep as it likes",
        "nemo_dpo/json_file.py",
        "    if _deeper(value, MAX_DEPTH):\n",
        "    if False:\n",
        f"{FOLDERS}[config that nests 100 levels]",
    ),
    Mutation(
        "a file older than torch 1.6 may claim any size",
        "nemo_dpo/checkpoint/torch_file.py",
        "argument > size:",
        "argument > 2**80:",
        f"{FOLDERS}[older file with a storage of 4 TB]",
    ),
    Mutation(
        "vocabulary exported one row off",
        "nemo_dpo/convert/rules.py",
        "return (tensor[: dims.vocab],)",
        "return (tensor[1 : dims.vocab + 1],)",
        "tests/convert/test_rules.py::test_vocabulary_is_padded_with_zeros_and_cut",
    ),
    Mutation(
        "all tensors of a model in memory",
        "nemo_dpo/convert/hf.py",
        "stream = iter(tensors)",
        "stream = iter(list(tensors))",
        f"{MEMORY}test_a_shard_is_written_one_tensor_at_a_time",
    ),
    Mutation(
        "a written tensor lives on while the next one is made",
        "nemo_dpo/checkpoint/weights.py",
        "            del chunk  # or",
        "            pass  # or",
        f"{MEMORY}test_a_nemo_is_written_one_tensor_at_a_time",
    ),
    Mutation(
        "a converter takes any family",
        "nemo_dpo/convert/run.py",
        "if families and model_type not in families:",
        "if False:",
        "tests/convert/test_cli.py::test_a_script_refuses_another_family_by_name[qwen2]",
    ),
)

"""What the command-line converters share: arguments → library call, one line instead of a traceback, exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.model.architecture import ArchitectureError
from nemo_dpo.tokenizer import TokenizerError

FAILED = 2


def run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `command`; an error that a user can act on becomes one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        command(args)
    except (ArchitectureError, CheckpointError, TokenizerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    return 0


def hf_to_nemo(args: argparse.Namespace) -> None:
    """convert_llama_hf_to_nemo.py"""
    from nemo_dpo.checkpoint.archive import check_target
    from nemo_dpo.convert import hf_to_nemo as convert
    from nemo_dpo.convert.hf import local_folder

    check_target(args.output_path, overwrite=args.overwrite)  # before a download
    source = local_folder(args.input_name_or_path)
    convert(
        source, args.output_path, precision=args.precision, hparams_file=args.hparams_file, overwrite=args.overwrite
    )


def nemo_to_hf(args: argparse.Namespace) -> None:
    """convert_llama_nemo_to_hf.py"""
    from nemo_dpo.convert import nemo_to_hf as convert

    convert(args.input_name_or_path, args.output_path, precision=args.precision, overwrite=args.overwrite)


def gguf_to_hf(args: argparse.Namespace) -> None:
    """convert_gguf_to_hf.py"""
    from nemo_dpo.convert import gguf_to_hf as convert

    convert(args.input_name_or_path, args.output_path, precision=args.precision, overwrite=args.overwrite)


def peft_to_nemo(args: argparse.Namespace) -> None:
    """convert_lora_hf_to_nemo.py"""
    from nemo_dpo.checkpoint.archive import check_target
    from nemo_dpo.convert.adapter_peft import peft_to_nemo as convert
    from nemo_dpo.convert.hf import local_folder

    check_target(args.output_path, overwrite=args.overwrite)  # before a download
    convert(local_folder(args.input_name_or_path), args.base, args.output_path, overwrite=args.overwrite)


def nemo_to_peft(args: argparse.Namespace) -> None:
    """convert_lora_nemo_to_hf.py"""
    from nemo_dpo.convert.adapter_peft import nemo_to_peft as convert

    convert(args.input_name_or_path, args.output_path, overwrite=args.overwrite)


def merge_lora(args: argparse.Namespace) -> None:
    """merge_lora.py"""
    from nemo_dpo.convert.merge import merge_adapter

    merge_adapter(args.base, args.adapter, args.output, precision=args.precision, overwrite=args.overwrite)

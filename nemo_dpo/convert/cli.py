"""What the command-line converters share: arguments → library call, one line instead of a traceback, exit status."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_dpo.checkpoint import CheckpointError
from nemo_dpo.model.architecture import ArchitectureError
from nemo_dpo.tokenizer import TokenizerError

CHECKPOINT = "Hugging Face folder, GGUF file, .nemo file or extracted .nemo folder"
FAILED = 2
Main = Callable[[Sequence[str] | None], int]
PRECISION = "32, bf16 or 16 (also as NeMo's bf16-mixed, 32-true, …): convert the weights (default: keep)"


def run(command: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run `command`; an error that a user can act on becomes one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return command(args) or 0
    except (ArchitectureError, CheckpointError, TokenizerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED


def hf_to_nemo_script(description: str, *families: str) -> Main:
    """The `main` of a script that converts to `.nemo`.

    Args:
        description: the script's docstring; its first line is shown by `--help`.
        families: the families it is for, by `model_type` of config.json; any that is supported if none.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        parser = _parser(description)
        parser.add_argument(
            "--input_name_or_path",
            required=True,
            help="folder (safetensors or .bin, also sharded), GGUF file, or hub id (organisation/name) to download",
        )
        parser.add_argument("--output_path", required=True, type=Path, help="the .nemo file to write")
        parser.add_argument("--hparams_file", type=Path, help="YAML with further keys for model_config.yaml")
        _add_common(parser, families)
        return run(_hf_to_nemo, parser.parse_args(argv))

    return main


def nemo_to_hf_script(description: str, *families: str) -> Main:
    """The `main` of a script that converts from `.nemo`; the arguments as for `hf_to_nemo_script`."""

    def main(argv: Sequence[str] | None = None) -> int:
        parser = _parser(description)
        parser.add_argument("--input_name_or_path", required=True, type=Path, help=".nemo file or extracted folder")
        parser.add_argument("--output_path", required=True, type=Path, help="the folder to write")
        _add_common(parser, families)
        return run(_nemo_to_hf, parser.parse_args(argv))

    return main


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description.splitlines()[0])


def _add_common(parser: argparse.ArgumentParser, families: Sequence[str]) -> None:
    parser.add_argument("--precision", help=PRECISION)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--skip_verify", action="store_true", help="do not read the output again to compare it")
    parser.set_defaults(families=families)


def _hf_to_nemo(args: argparse.Namespace) -> None:
    from nemo_dpo.checkpoint.archive import check_target
    from nemo_dpo.convert import hf_to_nemo
    from nemo_dpo.convert.gguf import hf_folder

    check_target(args.output_path, overwrite=args.overwrite)  # before a download
    with hf_folder(args.input_name_or_path, args.output_path, verify=not args.skip_verify) as source:
        hf_to_nemo(
            source,
            args.output_path,
            precision=args.precision,
            hparams_file=args.hparams_file,
            overwrite=args.overwrite,
            families=args.families,
            verify=not args.skip_verify,
        )


def _nemo_to_hf(args: argparse.Namespace) -> None:
    from nemo_dpo.convert import nemo_to_hf

    nemo_to_hf(
        args.input_name_or_path,
        args.output_path,
        precision=args.precision,
        overwrite=args.overwrite,
        families=args.families,
        verify=not args.skip_verify,
    )


def verify_script(description: str) -> Main:
    """The `main` of verify.py: status 0 equal, 1 different, 2 cannot be compared."""

    def main(argv: Sequence[str] | None = None) -> int:
        parser = _parser(description)
        parser.add_argument("first", type=Path, help=CHECKPOINT)
        parser.add_argument("second", type=Path, help="another")
        parser.add_argument(
            "--precision", help="32, bf16 or 16: round the parameters of both before they are compared (default: no)"
        )
        parser.add_argument("--skip_logits", action="store_true", help="do not compute with the two models")
        return run(_verify, parser.parse_args(argv))

    return main


def _verify(args: argparse.Namespace) -> int:
    from nemo_dpo.convert.run import dtype_of
    from nemo_dpo.convert.verify import verify

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and megatron-core's, about themselves
        equal, lines = verify(args.first, args.second, dtype=dtype_of(args.precision), logits=not args.skip_logits)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if equal else 1


def inspect_script(description: str) -> Main:
    """The `main` of inspect.py."""

    def main(argv: Sequence[str] | None = None) -> int:
        parser = _parser(description)
        parser.add_argument("checkpoint", type=Path, help=CHECKPOINT)
        parser.add_argument("--json", action="store_true", help="as JSON instead of a table")
        parser.add_argument("--skip_hash", action="store_true", help="leave out the hash, which reads all weights")
        return run(_inspect, parser.parse_args(argv))

    return main


def _inspect(args: argparse.Namespace) -> None:
    from nemo_dpo.convert.summary import as_table, summarise

    facts = summarise(args.checkpoint, hashed=not args.skip_hash)
    sys.stdout.write((json.dumps(facts, indent=2, ensure_ascii=False) if args.json else as_table(facts)) + "\n")


def nemo_to_mcore(args: argparse.Namespace) -> None:
    """convert_nemo_gpt_to_mcore.py, convert_gpt_nemo_to_mcore.py"""
    from nemo_dpo.convert.to_mcore import nemo_to_mcore as convert

    convert(args.input, args.output, overwrite=args.overwrite, verify=not args.skip_verify)


def gguf_to_hf(args: argparse.Namespace) -> None:
    """convert_gguf_to_hf.py"""
    from nemo_dpo.convert import gguf_to_hf as convert

    convert(
        args.input_name_or_path,
        args.output_path,
        precision=args.precision,
        overwrite=args.overwrite,
        verify=not args.skip_verify,
    )


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

    merge_adapter(
        args.base,
        args.adapter,
        args.output,
        precision=args.precision,
        overwrite=args.overwrite,
        verify=not args.skip_verify,
    )

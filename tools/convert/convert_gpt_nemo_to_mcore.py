#!/usr/bin/env python3
"""Convert an older `.nemo` of a GPT model to megatron-core's names and to a checkpoint that training reads.

    python tools/convert/convert_gpt_nemo_to_mcore.py --input_name_or_path GPT-2B-001.nemo --output_path mcore_gpt.nemo

Takes NeMo 1.x's GPT and megatron-core's, from one file of weights or one for every tensor- and pipeline-parallel rank,
and distributed checkpoints of kind zarr; as an archive or an extracted folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

DERIVED = "rotary_pos_emb.inv_freq"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input_name_or_path", dest="input", required=True, type=Path, help=".nemo file or extracted folder"
    )
    parser.add_argument("--output_path", dest="output", required=True, type=Path, help="the .nemo file to write")
    parser.add_argument("--cpu_only", action="store_true", help="accepted as in NeMo: it always runs on the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--skip_verify", action="store_true", help="do not read the output again to compare it")
    parser.add_argument(
        "--ignore_if_missing",
        choices=(DERIVED,),
        default=DERIVED,
        help="accepted as in NeMo: what the new model computes itself; no other parameter may be missing",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemo_dpo.convert import cli

    return cli.run(cli.nemo_to_mcore, args)


if __name__ == "__main__":
    sys.exit(main())

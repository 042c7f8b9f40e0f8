#!/usr/bin/env python3
"""Convert an older `.nemo` of a GPT model to megatron-core's names, under NeMo 1.22's name and arguments.

    python tools/convert/convert_nemo_gpt_to_mcore.py --in-folder GPT-2B-001 --out-file mcore_gpt.nemo --cpu-only

The same as convert_gpt_nemo_to_mcore.py, which names what it reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-folder", dest="input", required=True, type=Path, help=".nemo file or extracted folder")
    parser.add_argument("--out-file", dest="output", required=True, type=Path, help="the .nemo file to write")
    parser.add_argument("--cpu-only", action="store_true", help="accepted as in NeMo: it always runs on the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--skip-verify", dest="skip_verify", action="store_true", help="do not read the output again to compare it"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemo_dpo.convert import cli

    return cli.run(cli.nemo_to_mcore, args)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Merge a LoRA adapter into its base: base `.nemo` + adapter `.nemo` → `.nemo`.

    python tools/convert/merge_lora.py --base base.nemo --adapter lora.nemo --output merged.nemo

The result is an ordinary model: it is trained at any layout and converted like its base.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, type=Path, help=".nemo file or extracted folder of the model")
    parser.add_argument("--adapter", required=True, type=Path, help=".nemo file of the adapter")
    parser.add_argument("--output", required=True, type=Path, help="the .nemo file to write")
    parser.add_argument("--precision", choices=("32", "bf16", "16"), help="convert the weights (default: the base's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--skip_verify", action="store_true", help="do not read the output again to compare it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemo_dpo.convert import cli

    return cli.run(cli.merge_lora, args)


if __name__ == "__main__":
    sys.exit(main())

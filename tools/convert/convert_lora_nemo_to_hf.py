#!/usr/bin/env python3
"""Convert an adapter `.nemo` to a folder that Hugging Face PEFT loads.

    python tools/convert/convert_lora_nemo_to_hf.py --input_name_or_path lora.nemo --output_path adapter

Reads what convert_lora_hf_to_nemo.py and training write, as an archive or an extracted folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_name_or_path", required=True, type=Path, help=".nemo file or extracted folder")
    parser.add_argument("--output_path", required=True, type=Path, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemo_dpo.convert import cli

    return cli.run(cli.nemo_to_peft, args)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Convert a LoRA adapter from Hugging Face PEFT's format to an adapter `.nemo`.

    python tools/convert/convert_lora_hf_to_nemo.py --input_name_or_path adapter --base base.nemo \\
        --output_path lora.nemo

Reads adapter_config.json and adapter_model.safetensors (or .bin) of an adapter of the model that `base.nemo` holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_name_or_path", required=True, help="folder, or hub id (organisation/name) to download")
    parser.add_argument("--base", required=True, type=Path, help=".nemo of the model that the adapter was trained on")
    parser.add_argument("--output_path", required=True, type=Path, help="the .nemo file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemo_dpo.convert import cli

    return cli.run(cli.peft_to_nemo, args)


if __name__ == "__main__":
    sys.exit(main())

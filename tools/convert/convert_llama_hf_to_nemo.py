#!/usr/bin/env python3
"""Convert a Llama-family model from Hugging Face's format to a `.nemo` archive for megatron-core.

    python tools/convert/convert_llama_hf_to_nemo.py --input_name_or_path /path/to/llama --output_path mcore_gpt.nemo

Reads safetensors or .bin weights, whole or sharded; Llama 1 to 3.2 and what shares their architecture, Qwen2 and 2.5.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_name_or_path", required=True, help="folder, or hub id (organisation/name) to download")
    parser.add_argument("--output_path", required=True, type=Path, help="the .nemo file to write")
    parser.add_argument("--hparams_file", type=Path, help="YAML with further keys for model_config.yaml")
    parser.add_argument("--precision", choices=("32", "bf16", "16"), help="convert the weights (default: keep)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemo_dpo.convert import cli

    return cli.run(cli.hf_to_nemo, args)


if __name__ == "__main__":
    sys.exit(main())

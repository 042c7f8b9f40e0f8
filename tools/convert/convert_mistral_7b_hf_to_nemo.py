#!/usr/bin/env python3
"""Convert a Mistral model from Hugging Face's format to a `.nemo` archive for megatron-core.

    python tools/convert/convert_mistral_7b_hf_to_nemo.py --input_name_or_path /path/to/model \\
        --output_path mcore_gpt.nemo

Mistral 7B and its relatives of the same `model_type`.
"""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_dpo.convert import cli

main = cli.hf_to_nemo_script(__doc__, "mistral")

if __name__ == "__main__":
    sys.exit(main())

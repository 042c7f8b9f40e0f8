#!/usr/bin/env python3
"""Convert a `.nemo` archive of a Mistral model to a Hugging Face folder that transformers loads.

    python tools/convert/convert_mistral_7b_nemo_to_hf.py --input_name_or_path mcore_gpt.nemo \\
        --output_path /path/to/folder

Mistral 7B and its relatives of the same `model_type`.
"""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_dpo.convert import cli

main = cli.nemo_to_hf_script(__doc__, "mistral")

if __name__ == "__main__":
    sys.exit(main())

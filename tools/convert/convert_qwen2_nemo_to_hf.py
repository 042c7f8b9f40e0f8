#!/usr/bin/env python3
"""Convert a `.nemo` archive of a Qwen2 or Qwen2.5 model to a Hugging Face folder that transformers loads.

    python tools/convert/convert_qwen2_nemo_to_hf.py --input_name_or_path mcore_gpt.nemo --output_path /path/to/folder

Dense Qwen2 and Qwen2.5 models of every size.
"""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_dpo.convert import cli

main = cli.nemo_to_hf_script(__doc__, "qwen2")

if __name__ == "__main__":
    sys.exit(main())

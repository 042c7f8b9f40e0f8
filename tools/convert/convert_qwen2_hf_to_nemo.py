#!/usr/bin/env python3
"""Convert a Qwen2 or Qwen2.5 model from Hugging Face's format to a `.nemo` archive for megatron-core.

    python tools/convert/convert_qwen2_hf_to_nemo.py --input_name_or_path /path/to/model --output_path mcore_gpt.nemo

Dense Qwen2 and Qwen2.5 models of every size.
"""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_dpo.convert import cli

main = cli.hf_to_nemo_script(__doc__, "qwen2")

if __name__ == "__main__":
    sys.exit(main())

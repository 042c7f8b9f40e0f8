#!/usr/bin/env python3
"""Compare two checkpoints: configuration, parameters to the bit, tokenizer, logits.

    python tools/convert/verify.py /path/to/model mcore_gpt.nemo

Each is a Hugging Face folder, a GGUF file, a `.nemo` file or an extracted `.nemo` folder. Exit status: 0 equal, 1
different, 2 cannot be compared.
"""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_dpo.convert import cli

main = cli.verify_script(__doc__)

if __name__ == "__main__":
    sys.exit(main())

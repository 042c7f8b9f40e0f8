#!/usr/bin/env python3
"""Show what a checkpoint is: family, sizes, parameters, dtypes, tokenizer, layout, hash.

    python tools/convert/inspect.py mcore_gpt.nemo

The checkpoint is a Hugging Face folder, a GGUF file, a `.nemo` file or an extracted `.nemo` folder.
"""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_dpo.convert import cli

main = cli.inspect_script(__doc__)

if __name__ == "__main__":
    sys.exit(main())

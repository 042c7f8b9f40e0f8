#!/usr/bin/env python3
"""Compute the reference log-probs that training with model.dpo.reference.kind=cached reads, and exit.

    python tools/data/cache_reference.py model.dpo.reference.cache_dir=/path/to/cache ...

The other arguments are those of train_gpt_dpo.py; the number of ranks and the parallel sizes need not be those of the
training. Without cache_dir the results folder must be the training's. model.dpo.reference.kind may be the training's as
well: for a kind K that is not cached, what cached:K reads is computed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> int:
    from nemo_dpo.training.signals import note_signals

    note_signals()  # before anything that takes time: a SIGUSR1 without a handler kills
    from nemo_dpo.launch import main as launch

    return launch(ROOT / "conf", "gpt_dpo", "cache_reference", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

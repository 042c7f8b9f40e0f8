"""Preference-train a GPT model with DPO, IPO or RPO.

    python train_gpt_dpo.py pretrained_checkpoint.restore_from_path=model.nemo \\
        "model.data.data_prefix={train: [train.jsonl], validation: [valid.jsonl]}" ++model.dpo.ref_policy_kl_penalty=0.1

All keys, with their meaning and defaults: `python train_gpt_dpo.py --help`.
"""

import sys
from pathlib import Path

CONF = Path(__file__).resolve().parents[3] / "conf"


def main() -> int:
    from nemo_dpo.training.signals import note_signals

    note_signals()  # before anything that takes time: a SIGUSR1 without a handler kills
    from nemo_dpo.launch import main as launch

    return launch(CONF, "gpt_dpo", "train", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

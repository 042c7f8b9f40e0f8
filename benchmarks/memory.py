#!/usr/bin/env python3
"""Peak memory of training all weights or an adapter, by kind of reference: one run of train_gpt_dpo.py a row.

    python benchmarks/memory.py --nemo mcore_gpt.nemo --pairs pairs.jsonl

Every run trains on the first STEPS × BATCH pairs in file order, as one process on the CPU. Its peak is the largest
resident set of that process from its start on, so it includes loading and the reference passes. The figures go to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 5, 4
LORA = ("model.peft.peft_scheme=lora", "model.peft.lora_tuning.target_modules=[all]")
RECOMPUTE = (
    "model.activations_checkpoint_granularity=full",
    "model.activations_checkpoint_method=uniform",
    "model.activations_checkpoint_num_layers=1",
)
KINDS = {
    "full, frozen": ("model.dpo.reference.kind=frozen",),
    "full, cached": ("model.dpo.reference.kind=cached",),
    "LoRA, adapter_off": LORA,
    "QLoRA, adapter_off": (*LORA, "model.peft.base_quantization=nf4"),
    "QLoRA, recompute": (*LORA, "model.peft.base_quantization=nf4", *RECOMPUTE),
}
SETTING = (
    "trainer.accelerator=cpu",
    f"trainer.dpo.max_steps={STEPS}",
    f"trainer.dpo.val_check_interval={STEPS}",
    "trainer.dpo.limit_val_batches=1",
    f"model.micro_batch_size={BATCH}",
    f"model.global_batch_size={BATCH}",
    "model.data.seq_length=512",
    "model.data.append_eod=true",
    "model.data.shuffle=false",
    "model.optim.name=adam",
    "exp_manager.create_tensorboard_logger=false",
    "exp_manager.create_checkpoint_callback=false",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false",
    "exp_manager.plot_on_train_end=false",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nemo", required=True, type=Path, help="the model")
    parser.add_argument("--pairs", required=True, type=Path, help="preference pairs, jsonl")
    parser.add_argument("--precision", nargs="+", choices=("32", "bf16"), default=["32", "bf16"])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--output", type=Path, help="default: memory_<date>.json in benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    today = datetime.date.today().isoformat()
    output = args.output or ROOT / "benchmarks" / "results" / f"memory_{today}.json"
    rows = []
    for precision in args.precision:
        for kind in args.kind:
            rows.append({"kind": kind, "precision": precision, **measured(args.nemo, args.pairs, kind, precision)})
            print(f"{kind:<20} {precision:<5} {rows[-1]['memory_gib']:.1f} GiB", flush=True)
    versions = rows[-1]["versions"]
    facts = {
        "date": today,
        "command": f"python benchmarks/memory.py --nemo {args.nemo.name} --pairs {args.pairs.name}",
        **versions,
        "setting": SETTING,
        "rows": [{name: value for name, value in row.items() if name != "versions"} for row in rows],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(nemo: Path, pairs: Path, kind: str, precision: str) -> dict[str, Any]:
    """One run: the peak in GiB, the losses and the versions that it ran with."""
    with tempfile.TemporaryDirectory() as folder:
        data, log_dir = Path(folder) / "pairs.jsonl", Path(folder) / "run"
        with pairs.open(encoding="utf-8") as lines:
            data.write_text("".join(islice(lines, STEPS * BATCH)), encoding="utf-8")
        words = [
            f"pretrained_checkpoint.restore_from_path={nemo.resolve()}",
            f"model.data.data_prefix={{train: ['{data}'], validation: ['{data}']}}",
            f"exp_manager.explicit_log_dir={log_dir}",
            f"trainer.precision={precision}",
            *SETTING,
            *KINDS[kind],
        ]
        program = ROOT / "examples" / "nlp" / "gpt" / "train_gpt_dpo.py"
        done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{kind}, {precision}: status {done.returncode}\n{done.stderr[-3000:]}")
        rows = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [row for row in rows if "train/loss" in row]
        return {
            "memory_gib": steps[-1]["train/memory_gib"],
            "losses": [row["train/loss"] for row in steps],
            "versions": json.loads((log_dir / "run" / "versions.json").read_text(encoding="utf-8")),
        }


if __name__ == "__main__":
    sys.exit(main())

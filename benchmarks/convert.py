#!/usr/bin/env python3
"""Time and peak memory of the converters, as ratios to transformers' own load and save of the same checkpoint.

    python benchmarks/convert.py --gigabytes 8 --folder /path/to/scratch

Writes a Llama checkpoint of that size with random values (bf16) and converts it to `.nemo` and back with the scripts a
user calls, each in a process of its own, in turn with a process that loads it with transformers and saves it. Needs
about three times the size on the disk. The peak is the largest resident set of the process; what a model of 2 MB takes
is imports. The figures go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nemo_dpo.convert.hf import write_json, write_safetensors  # noqa: E402  after the path
from nemo_dpo.convert.opened import open_hf  # noqa: E402
from nemo_dpo.convert.safetensors_file import Entry  # noqa: E402

TINY = 2 * 10**6
LAYERS = 20  # about, whatever the size
TRANSFORMERS = (
    "import sys; from transformers import AutoModelForCausalLM; "
    "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
)


class Run(NamedTuple):
    """Of one process: seconds on the clock and of the CPU, largest resident set in bytes."""

    wall: float
    cpu: float
    peak: int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint (default 8)")
    parser.add_argument("--folder", required=True, type=Path, help="where to write it; emptied afterwards")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn (default 3)")
    parser.add_argument("--skip_transformers", action="store_true", help="where its load does not fit into memory")
    parser.add_argument("--output", type=Path, help="default: convert_<date>.json in benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    today = datetime.date.today().isoformat()
    output = args.output or ROOT / "benchmarks" / "results" / f"convert_{today}.json"
    args.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in COMMANDS if name != "transformers" or not args.skip_transformers]
    rows, facts = measured(args.folder, int(args.gigabytes * 1e9), names, args.repeats)
    report = {
        "date": today,
        "command": f"python benchmarks/convert.py --gigabytes {args.gigabytes:g} --repeats {args.repeats}",
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "megatron-core")},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        **facts,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 0


def commands(folder: Path) -> dict[str, tuple[list[str], Path]]:
    """What is measured → the command and what it writes."""

    def ours(script: str, source: str, target: str, *options: str) -> tuple[list[str], Path]:
        path = ROOT / "tools" / "convert" / f"{script}.py"
        words = [str(path), "--input_name_or_path", str(folder / source), "--output_path", str(folder / target)]
        return [*words, *options], folder / target

    saved = folder / "saved"
    return {
        "transformers": (["-c", TRANSFORMERS, str(folder / "hf"), str(saved)], saved),
        "to .nemo": ours("convert_hf_to_nemo", "hf", "model.nemo"),
        "to .nemo, unverified": ours("convert_hf_to_nemo", "hf", "unverified.nemo", "--skip_verify"),
        "to Hugging Face": ours("convert_nemo_to_hf", "model.nemo", "back"),
        "to Hugging Face, unverified": ours("convert_nemo_to_hf", "model.nemo", "unverified", "--skip_verify"),
    }


COMMANDS = tuple(commands(Path()))


def measured(
    folder: Path, size: int, names: Sequence[str], repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row for each of `names`, and what was converted."""
    idle = {name: runs[0].peak for name, runs in series(folder / "tiny", TINY, names, 1).items()}
    runs = series(folder / "large", size, names, repeats)
    entries, largest = sizes(folder / "large" / "hf")
    wall = {name: statistics.median(run.wall for run in found) for name, found in runs.items()}
    cpu = {name: statistics.median(run.cpu for run in found) for name, found in runs.items()}
    rows = []
    for name, found in runs.items():
        peak = max(run.peak for run in found)
        rows.append(
            {
                "what": name,
                "seconds": [round(run.wall, 2) for run in found],
                "cpu_seconds": [round(run.cpu, 2) for run in found],
                "time_ratio": ratio(wall, name),
                "cpu_ratio": ratio(cpu, name),
                "peak_mib": peak >> 20,
                "imports_mib": idle[name] >> 20,
                "peak_in_largest_layers": round((peak - idle[name]) / largest, 2),
            }
        )
    facts = {"bytes": sum(entry.nbytes for entry in entries), "largest_layer_bytes": largest}
    for part in ("tiny", "large"):
        shutil.rmtree(folder / part)
    return rows, facts


def ratio(seconds: dict[str, float], name: str) -> float | None:
    """To transformers' time, where that was measured."""
    return round(seconds[name] / seconds["transformers"], 3) if "transformers" in seconds else None


def series(folder: Path, size: int, names: Sequence[str], repeats: int) -> dict[str, list[Run]]:
    """The runs of each of `names`, in turn; outputs go, but for what the way back reads."""
    write_checkpoint(folder / "hf", size)
    found: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            words, target = commands(folder)[name]
            remove(target)
            found[name].append(run(words))
            if target.name != "model.nemo":  # which the way back reads
                remove(target)
    return found


def remove(target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)


def run(words: Sequence[str]) -> Run:
    """Run one Python process; what earlier ones wrote is on the disk before."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"status {process.returncode}: {' '.join(words)}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def shape(size: int) -> dict[str, int]:
    """Sizes of a Llama whose weights take about `size` bytes in bf16, in about LAYERS layers of 13 · hidden² values."""
    hidden = max(256, round(math.sqrt(size / (LAYERS * 26)) / 256) * 256)
    vocab = 8 * hidden + 5  # no multiple of anything, so that it is padded
    layers = max(1, round((size - 4 * vocab * hidden) / (26 * hidden**2)))
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    }


def write_checkpoint(folder: Path, size: int, experts: int = 0) -> None:
    """A random Llama of about `size` bytes as a Hugging Face folder, in shards, one tensor in memory at a time.

    With `experts` a Mixtral, whose MLP is cut into so many.
    """
    folder.mkdir(parents=True)
    config = {
        **shape(size),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if experts:
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts}
        config["intermediate_size"] //= experts
    write_json(folder / "config.json", config)
    entries = parameters(config)
    write_safetensors(folder, entries, random_tensors(entries))
    write_tokenizer(folder)


def parameters(config: dict[str, Any]) -> list[Entry]:
    """The parameters of a Llama with Hugging Face's names."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
    }
    if experts := config.get("num_local_experts"):
        moe = "block_sparse_moe"
        matrices = {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}
        layer |= {f"{moe}.experts.{n}.{name}": value for n in range(experts) for name, value in matrices.items()}
        layer |= {f"{moe}.gate": (experts, hidden)}
    else:
        layer |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    vocab = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": vocab}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": value for name, value in layer.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": vocab}
    return [Entry(f"{name}.weight", torch.bfloat16, value) for name, value in shapes.items()]


def random_tensors(entries: Sequence[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Values from one random block, begun at another place for each tensor: real bytes at the speed of a copy."""
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for number, entry in enumerate(entries):
        count = math.prod(entry.shape)
        repeated = block.roll(number * 7919).repeat(-(-count // len(block)))
        yield entry.name, repeated[:count].reshape(entry.shape)
        del repeated


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


def sizes(folder: Path) -> tuple[list[Entry], int]:
    """The parameters of a checkpoint, and the bytes of its largest layer: one of the stack, or an embedding."""
    entries = open_hf(folder).entries()
    layers: dict[str, int] = {}
    for entry in entries:
        layer = ".".join(entry.name.split(".")[:3]) if ".layers." in entry.name else entry.name
        layers[layer] = layers.get(layer, 0) + entry.nbytes
    return entries, max(layers.values())


if __name__ == "__main__":
    sys.exit(main())

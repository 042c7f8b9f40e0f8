"""Documents say what is there: the file map, links, and the commands in them.

Blocks fenced as ``bash run`` are executed. Other ``bash`` blocks, which need a model, several ranks or minutes, must
parse, and the programs, make targets and configuration keys that they name must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_dpo.config import ConfigError, load_config, parse_cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)


def blocks(document: Path, info: str) -> list[str]:
    """Bodies of the fenced blocks of `document` that are marked exactly `info`."""
    return [match["body"] for match in FENCE.finditer(document.read_text(encoding="utf-8")) if match["info"] == info]


def all_blocks(info: str) -> list[object]:
    """Such blocks of all documents, as test parameters named after their document."""
    return [
        pytest.param(body, id=f"{document.name}-{number}")
        for document in DOCUMENTS
        for number, body in enumerate(blocks(document, info))
    ]


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a block, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_command(words: list[str], folder: Path) -> None:
    """Refuse a program, make target or configuration key that does not exist."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {word for word in arguments if "=" not in word} <= set(targets), words
    if program in ("python", "sbatch"):
        script = next(word for word in arguments if word.endswith((".py", ".sbatch")))
        assert (folder / script).is_file(), words
        if Path(script).stem == "train_gpt_dpo":
            line = parse_cli(arguments[arguments.index(script) + 1 :], ROOT / "conf", "gpt_dpo")
            load_config(line.config_dir, line.config_name, line.overrides)


@pytest.mark.parametrize("block", all_blocks("bash"))
def test_commands_name_things_that_exist(block: str) -> None:
    parsed = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    folder = ROOT
    for words in commands(block):
        if words[0] == "cd":
            folder = folder / words[1]
        else:
            check_command(words, folder)


def test_a_wrong_key_in_a_document_is_noticed() -> None:
    (words,) = commands("python train_gpt_dpo.py \\\n  ++model.dpo.ref_policy_kl_penalti=0.1  # a slip")
    with pytest.raises(ConfigError, match="ref_policy_kl_penalty"):
        check_command(words, ROOT / "examples/nlp/gpt")


@pytest.mark.parametrize("block", all_blocks("bash run"))
def test_runnable_commands_run(block: str) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    script = ["bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_block_of_commands_is_marked_in_one_of_the_two_ways() -> None:
    for document in DOCUMENTS:
        infos = {match["info"] for match in FENCE.finditer(document.read_text(encoding="utf-8"))}
        assert infos <= {"bash", "bash run", "json", "text", "yaml", "python"}, document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


def test_file_map_is_the_tree(files: list[Path]) -> None:
    (block,) = blocks(ROOT / "README.md", "text")
    listed, parent = set(), ""
    for line in block.splitlines():
        name = line.split()[0]
        parent = name if not line.startswith(" ") else parent
        listed.add(name.rstrip("/") if name == parent else parent + name.rstrip("/"))

    visible = [file for file in files if not file.parts[0].startswith(".") and file.name != "__init__.py"]
    package = {"/".join(file.parts[:2]) for file in visible if file.parts[0] == "nemo_dpo"}
    assert listed == {file.parts[0] for file in visible} | package

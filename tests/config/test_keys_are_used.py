"""No key is read and ignored: every field of the schema is looked at by some code outside its definition."""

from __future__ import annotations

import ast
from pathlib import Path

from nemo_dpo.config import Config
from nemo_dpo.config.architecture import Architecture
from nemo_dpo.config.exp_manager import nemo_options
from nemo_dpo.config.keys import schema_keys

PACKAGE = Path(__file__).parents[2] / "nemo_dpo"
SCHEMA = ("schema.py", "exp_manager.py", "architecture.py", "peft.py", "limits.py")
DEFINITIONS = {PACKAGE / "config" / name for name in SCHEMA}
# exp_manager.max_time_per_run and model.data.seq_length follow these, and only those are read.
FOLLOWED = {"trainer.max_time", "model.encoder_seq_length"}


def attributes_read() -> set[str]:
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py") if path not in DEFINITIONS]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_key_is_read() -> None:
    read = attributes_read()
    handed_on = {f"exp_manager.{key}" for key in nemo_options(Config().exp_manager)}
    shapes = {f"model.{key}" for key in Architecture.__dataclass_fields__}  # compared one by one with the checkpoint's
    unread = {key for key in schema_keys() if key.rpartition(".")[2] not in read}
    assert unread - handed_on - shapes - FOLLOWED == set()

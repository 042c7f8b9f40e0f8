"""Import rules that import-linter cannot express: it sees other packages only by their top-level name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

OWNER = Path("nemo_dpo/parallel/groups.py")
GLOBAL_STATE = "megatron.core.parallel_state"


def imported_names(source: str) -> Iterator[str]:
    """Dotted names of all modules and members that `source` imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def touches_global_state(source: str) -> bool:
    """Whether `source` imports megatron-core's parallel_state, by any of its names, or reaches it as an attribute."""
    aliases = (GLOBAL_STATE, "megatron.core.mpu")
    if any(name == alias or name.startswith(alias + ".") for name in imported_names(source) for alias in aliases):
        return True
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return not attributes.isdisjoint({"parallel_state", "mpu"})


def test_the_rule_sees_every_form_of_import() -> None:
    for line in (
        "import megatron.core.parallel_state as ps",
        "from megatron.core import parallel_state",
        "from megatron.core import mpu",
        "def f():\n    from megatron.core.parallel_state import get_tensor_model_parallel_rank",
        "import megatron.core\nmegatron.core.parallel_state.is_initialized()",
    ):
        assert touches_global_state(line), line
    assert not touches_global_state("from megatron.core.process_groups_config import ProcessGroupCollection")


def test_one_module_touches_the_global_process_groups(root: Path, files: list[Path]) -> None:
    sources = [file for file in files if file.suffix == ".py" and file.parts[0] == "nemo_dpo"]
    touching = [file for file in sources if touches_global_state((root / file).read_text(encoding="utf-8"))]
    assert touching == [OWNER]


def test_the_package_knows_nothing_of_tools_examples_and_tests(root: Path, files: list[Path]) -> None:
    for file in files:
        if file.suffix == ".py" and file.parts[0] == "nemo_dpo":
            packages = {name.split(".")[0] for name in imported_names((root / file).read_text(encoding="utf-8"))}
            assert not packages & {"tools", "examples", "tests", "conf"}, file

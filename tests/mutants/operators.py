"""Operator mutants: small changes of single operators, constants and calls, a seeded sample of all there are.

Not made, because nothing there changes what is computed: changes of annotations, texts, error raising, logging,
decorators and of numbers for which any other would do; and swaps of arguments that are no expressions of one kind.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.runner import Mutant

SEED = 3
SAMPLE = 50

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
REDUCTIONS = {"sum": "mean", "mean": "sum"}
SYMMETRIC = {"max", "min", "zip", "maximum", "minimum"}
# Their arguments are of two kinds, whatever expressions they are: exchanged they raise a TypeError and compute nothing.
TYPED = {"isinstance", "hasattr", "getattr"}
SKIPPED_STATEMENTS = (ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)
# Any value does: how many rows at a time, how far apart seeds are, how long is long.
ARBITRARY = {"MEAN_BLOCK_ROWS", "block_rows", "own_seed", "PATIENCE"}
# Keywords that guard against programming errors, or say how something is done rather than what.
SAFEGUARDS = {"strict", "disable_bucketing"}


@dataclass(frozen=True)
class Change:
    """Another text for a stretch of a file; line and column count from 1."""

    file: str
    line: int
    column: int
    start: int  # offsets into the file
    stop: int
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.old} → {self.new}"

    def apply(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.stop :]


def sample(root: Path, tests_of: dict[str, tuple[str, ...]], size: int = SAMPLE) -> list[Mutant]:
    """`size` mutants of the files below `root` that `tests_of` names.

    Which are chosen depends on the seed and on each change's own text and surroundings: editing one function leaves the
    choice in all others as it is.
    """
    found: list[tuple[bytes, Change, str]] = []
    for file in sorted(tests_of):
        source = (root / file).read_text(encoding="utf-8")
        seen: dict[str, int] = {}
        for change in changes(file, source):
            line = source.splitlines()[change.line - 1].strip()
            key = f"{SEED} {file} {line} {change.old} {change.new}"
            seen[key] = seen.get(key, 0) + 1
            found.append((hashlib.sha256(f"{key} {seen[key]}".encode()).digest(), change, source))
    chosen = sorted(sorted(found, key=lambda entry: entry[0])[:size], key=lambda entry: (entry[1].file, entry[1].start))
    return [
        Mutant(change.name, change.file, change.apply(source), tests_of[change.file]) for _, change, source in chosen
    ]


def changes(file: str, source: str) -> list[Change]:
    """Every change of `source` that this module knows, in the order of the text."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())  # ast counts bytes

    made = []
    for node, new in _walk(ast.parse(source)):
        start, stop = offset(node.lineno, node.col_offset), offset(node.end_lineno or 0, node.end_col_offset or 0)
        made.append(Change(file, node.lineno, node.col_offset + 1, start, stop, source[start:stop], new))
    return made


def _walk(node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """(expression, its replacement) below `node`."""
    if isinstance(node, SKIPPED_STATEMENTS) or _is_exempt(node):
        return
    if isinstance(node, ast.expr):
        for new in _variants(node):
            yield node, new
    for child in _children(node):
        yield from _walk(child)


def _is_exempt(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id in ARBITRARY for target in node.targets)
    if isinstance(node, ast.keyword):
        return node.arg in SAFEGUARDS
    if isinstance(node, ast.Call):
        text = ast.unparse(node.func)
        return text.startswith(("logger.", "logging.", "TypeVar")) or text.endswith("new_full")
    return False


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Sub-nodes that are run when the program computes: no annotation, decorator, base class or text."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield child


def _variants(node: ast.expr) -> Iterator[str]:
    """Replacements of one expression, not of what is inside it."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.unparse(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))  # type: ignore[arg-type]
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        swapped = [OPERATORS[type(node.ops[0])](), *node.ops[1:]]
        yield ast.unparse(ast.Compare(node.left, swapped, node.comparators))  # type: ignore[arg-type]
    elif isinstance(node, ast.BoolOp):
        yield f"({ast.unparse(ast.BoolOp(OPERATORS[type(node.op)](), node.values))})"  # type: ignore[arg-type]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _constants(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
        yield f"({value - 1})"


def _calls(node: ast.Call) -> Iterator[str]:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
    if len(node.args) == 2 and type(node.args[0]) is type(node.args[1]) and name not in SYMMETRIC | TYPED:
        yield ast.unparse(ast.Call(function, node.args[::-1], node.keywords))
    if isinstance(function, ast.Attribute) and name in REDUCTIONS:
        method = ast.Attribute(function.value, REDUCTIONS[name], ast.Load())
        yield ast.unparse(ast.Call(method, node.args, node.keywords))

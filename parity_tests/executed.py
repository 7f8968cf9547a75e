"""Which code of the model and of the step JAX traced: what never ran, no comparison can have reached.

Instructions are recorded, not lines, because `a if b else c` has two ways in one line.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

import jax

from jaxllm.data.report import counted

PACKAGES = ("jaxllm.model", "jaxllm.train")

Span = tuple[int, int, int, int]  # line, column, last line, last column


class Missed(NamedTuple):
    """What did not run of one file."""

    file: str
    functions: list[str]
    """Those that were never called."""
    lines: list[int]
    """In functions that were."""
    whole: bool
    """Whether no function was called."""
    partly: list[str]
    """Functions that were called and have such lines: other inputs or options of what ran lead there."""

    def __str__(self) -> str:
        return self.file if self.whole else f"{self.file} ({', '.join([*self.functions, *map(str, self.lines)])})"


def in_short(found: list[Missed], most: int = 400) -> str:
    """The functions that ran in part, by file, in about `most` characters, and how many files did not run at all."""
    of_files = [f"{missed.file.partition('/')[2]} ({', '.join(missed.partly)})" for missed in found if missed.partly]
    shown: list[str] = []
    while len(shown) < len(of_files) and sum(map(len, shown)) + len(of_files[len(shown)]) <= most:
        shown.append(of_files[len(shown)])
    rest = len(of_files) - len(shown)
    ends = [f"parts of {counted(rest, 'more file')}"] * bool(rest)
    whole = sum(missed.whole for missed in found)
    ends += [f"{counted(whole, 'file')} whole"] * bool(whole)
    return ", ".join([*shown, *ends]) or "nothing"


class _Function(NamedTuple):
    name: str
    called: bool
    lines: list[int]
    """The branches that did not run, of one that was called."""


class Executed:
    """Records what runs of some packages within `watching`.

    Args:
        packages: whose files, below their folders too.
    """

    def __init__(self, packages: tuple[str, ...] = PACKAGES):
        self._files: dict[str, str] = {}  # path -> the name that is shown
        for package in packages:
            spec = importlib.util.find_spec(package)
            for folder in (spec and spec.submodule_search_locations) or []:
                for path in sorted(Path(folder).rglob("*.py")):
                    self._files[str(path)] = path.relative_to(Path(folder).parent).as_posix()
        self._seen: dict[tuple[str, int, str], tuple[set[int], CodeType]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        with mock.patch.object(jax.lax, "platform_dependent", _only_here):
            sys.settrace(self._enter)
            try:
                yield
            finally:
                sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Callable | None:
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        key = (code.co_filename, code.co_firstlineno, code.co_qualname)
        offsets, _ = self._seen.setdefault(key, (set(), code))
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def record(frame: FrameType, event: str, arg: Any) -> Callable:
            if event == "opcode":
                offsets.add(frame.f_lasti)
            return record

        return record

    def missed(self) -> list[Missed]:
        """What did not run, by file. What ends in an error is left out: no comparison can reach it."""
        spans: dict[str, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
        for (path, _, _), (offsets, code) in self._seen.items():
            positions = list(code.co_positions())
            for offset in offsets:
                span = positions[offset // 2]
                if None not in span:
                    line, last, column, end = span
                    spans[path][line].append((line, column, last, end))  # pyright: ignore[reportArgumentType]
        found = []
        for path, shown in self._files.items():
            functions = _functions(Path(path), spans[path])
            never = [function.name for function in functions if not function.called]
            partly = [function for function in functions if function.lines]
            if never or partly:
                lines = sorted({line for function in partly for line in function.lines})
                names = [function.name.removesuffix(".__init__").rpartition(".")[2] for function in partly]
                found.append(Missed(shown, never, lines, len(never) == len(functions), [*dict.fromkeys(names)]))
        return found


def _only_here(*arrays: Any, default: Any = None, **of_platform: Any) -> Any:
    """`jax.lax.platform_dependent` that traces the branch of this platform alone."""
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    return of_platform.get(here, default)(*arrays)


def _functions(path: Path, spans: dict[int, list[Span]]) -> list[_Function]:
    """Those of a file, without those that fail or are stubs."""
    found: list[_Function] = []

    def ran(node: Any) -> bool:
        start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        return any(
            start <= (span[0], span[1]) and (span[2], span[3]) <= end
            for line in range(node.lineno, node.end_lineno + 1)
            for span in spans.get(line, ())
        )

    def look(node: ast.AST, within: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef):
                look(child, within)
                continue
            owners = (*within, child.name)
            if isinstance(child, ast.ClassDef):
                look(child, owners)
                continue
            called = any(ran(statement) for statement in child.body)
            if called:
                look(child, owners)
            elif _fails(child.body) or _is_stub(child.body):
                continue
            lines = [way.lineno for way in _ways(child.body) if not ran(way)] if called else []
            found.append(_Function(".".join(owners), called, lines))

    look(ast.parse(path.read_text(encoding="utf-8")), ())
    return found


def _ways(body: list[ast.stmt]) -> Iterator[Any]:
    """The branches of a function, without those of the functions in it and those that end in an error."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            block = getattr(statement, name, [])
            if isinstance(block, list) and block and not _fails(block):
                yield block[0]
                yield from _ways(block)
        for expression in ast.iter_child_nodes(statement):
            if isinstance(expression, ast.expr):
                for node in ast.walk(expression):
                    if isinstance(node, ast.IfExp):
                        yield from (node.body, node.orelse)


def _fails(block: list[ast.stmt]) -> bool:
    return isinstance(block[-1], ast.Raise)


def _is_stub(block: list[ast.stmt]) -> bool:
    return all(isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) for statement in block)

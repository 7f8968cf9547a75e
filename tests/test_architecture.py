"""The rooms: imports go down, never up or round; and the checks of it can fail."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxllm", "convert", "torch_ref", "parity_tests", "benchmarks")


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", program, "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(root)})


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the packages, to plant an import in."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return Path(shutil.copy(ROOT / "pyproject.toml", tmp_path)).parent


def test_imports_go_down(checkout):
    done = lint_imports(checkout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "planted", "said"),
    [
        (
            "jaxllm/model/moe.py",
            "from jaxllm.train.optim import OptimizerState",
            "jaxllm.model.moe -> jaxllm.train.optim",
        ),
        ("jaxllm/data/stream.py", "import jaxllm.store.lock", "jaxllm.data.stream -> jaxllm.store.lock"),
        ("jaxllm/store/resume.py", "import jaxllm.run.prepare", "jaxllm.store.resume -> jaxllm.run.prepare"),
        ("jaxllm/train/step.py", "import torch", "jaxllm.train.step -> torch"),
    ],
)
def test_a_planted_import_is_found(checkout, file, planted, said):
    (checkout / file).write_text((checkout / file).read_text() + f"\n\n{planted}\n")
    done = lint_imports(checkout)
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stdout


def cycles(graph: grimp.ImportGraph) -> list[tuple[str, str]]:
    """Pairs of modules of which each imports the other, directly or not. The facade imports on demand: left out."""
    modules = graph.modules - {"jaxllm"}
    below = {module: graph.find_upstream_modules(module) for module in modules}
    return [(a, b) for a in modules for b in below[a] & modules if a < b and a in below[b]]


def test_no_module_imports_itself_in_a_circle():
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    for imported in graph.find_modules_directly_imported_by("jaxllm"):
        graph.remove_import(importer="jaxllm", imported=imported)
    assert cycles(graph) == []
    graph.add_import(importer="jaxllm.errors", imported="jaxllm.run.run")
    assert ("jaxllm.errors", "jaxllm.run.run") in cycles(graph)


def test_no_file_of_the_product_is_long():
    """Except torch_ref/model.py, which exported folders carry as one file."""
    lengths = {name: len(source.splitlines()) for name, source in product().items()}
    del lengths["torch_ref/model.py"]
    assert {name: length for name, length in lengths.items() if length >= 400} == {}
    assert not [name for name in lengths if "utils" in name]


def product() -> dict[str, str]:
    """The source of each file of the product."""
    files = [ROOT / "train.py", *(f for p in ("jaxllm", "convert", "torch_ref") for f in (ROOT / p).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def functions(source: str) -> Iterator[tuple[str, list[ast.arg]]]:
    """Each function of a file, as CLASS.NAME, with its parameters: self, *args and **kwargs included."""
    tree = ast.parse(source)
    owners = {f: f"{c.name}." for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            each = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
            yield owners.get(node, "") + node.name, [arg for arg in each if arg is not None]


def takes_whole_config(parameters: list[ast.arg]) -> bool:
    """Whether one is a whole config: a group, or the numbers, would do in most functions."""
    whole = {"RunConfig", "TrainConfig"}
    names = [{*ast.unparse(arg.annotation).split(" | ")} for arg in parameters if arg.annotation is not None]
    return any(whole & each for each in names)


MAX_PARAMETERS = 8

MANY_PARAMETERS = {
    "torch_ref/model.py": {"CustomLLM.forward"}  # transformers' signature
}
"""Functions that may have more."""


def test_no_function_has_many_parameters():
    found = {
        name: {f for f, parameters in functions(source) if len(parameters) > MAX_PARAMETERS}
        for name, source in product().items()
    }
    assert {name: many for name, many in found.items() if not many <= MANY_PARAMETERS.get(name, set())} == {}
    planted = "class A:\n def f(self, a, b, /, c, d, *e, f, g, **h): ..."
    assert [(name, len(parameters)) for name, parameters in functions(planted)] == [("A.f", 9)]


MAX_WHOLE_CONFIG = 22
"""It only falls: a new function takes the groups or the numbers that it reads."""


def test_few_functions_take_the_whole_config():
    """Below `jaxllm.run` they take the group, such as OptimConfig, or the numbers."""
    found = [
        f"{name}: {f}"
        for name, source in product().items()
        for f, parameters in functions(source)
        if takes_whole_config(parameters)
    ]
    assert len(found) <= MAX_WHOLE_CONFIG, found
    assert not [place for place in found if place.startswith("jaxllm/model/")]
    (_, parameters), (_, narrow) = functions("def f(a, b: TrainConfig | None): ...\ndef g(a: OptimConfig): ...")
    assert takes_whole_config(parameters)
    assert not takes_whole_config(narrow)


HOOKS = re.compile(
    r"""^ \s* (threading | sys)\.\w*hook \s* = | ^ \s* sys\.std(out | err | in)\b .* = \s
    | ^ \s* sys\.modules\[.*\] \s* = | setattr\(sys, | \baddFilter\( | \bset_client_factory\(""",
    re.VERBOSE | re.MULTILINE,
)


def test_one_file_replaces_what_belongs_to_the_process():
    assert HOOKS.search('    sys.modules["torch"] = None')
    assert HOOKS.search("    threading.excepthook = hook")
    files = [ROOT / "train.py", *(ROOT / "jaxllm").rglob("*.py")]
    assert [file.name for file in files if HOOKS.search(file.read_text())] == ["console.py"]

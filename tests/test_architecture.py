"""The rooms: imports go down, never up or round; and the checks of it can fail."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
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
    files = [ROOT / "train.py", *(f for p in ("jaxllm", "convert", "torch_ref") for f in (ROOT / p).rglob("*.py"))]
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in files}
    del lengths["torch_ref/model.py"]
    assert {name: length for name, length in lengths.items() if length >= 400} == {}
    assert not [name for name in lengths if "utils" in name]


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

"""Every command and every Python block of docs/tutorial.md runs, in the order of the page, on a small model.

Commands run in this process, as `python -m` would run them; those that decide a size get a smaller one.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.configs import NARROW

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(bash|python)\n(.*?)^```", PAGE)

INSTALLING = ("python3 -m venv .venv && . .venv/bin/activate", "pip install -e '.[torch]' -c constraints.txt")
SHORT_TEXT = ["--max-new-tokens", "8"]
SMALLER = {
    "python train.py": [*NARROW, "--steps", "6", "--warmup-steps", "2", "--eval-every", "3", "--save-every", "3"],
    "python -m jaxllm.generate": SHORT_TEXT,
    "python -m parity_tests": ["--rungs", "weights", "layers", "logits", "--seq-len", "24"],
    "python -m torch_ref.train": ["--steps", "8", "--sample-tokens", "4"],
}
"""What is added to a command: the last value of an option counts."""


def program_of(command: str) -> str:
    """`python train.py` or `python -m MODULE`, which the rest of a command is for."""
    found = re.match(r"python (-m \S+|\S+\.py)", command)
    assert found, command
    return found[0]


def run(command: str, data: Path) -> int:
    program = program_of(command)
    arguments = [*shlex.split(command.removeprefix(program)), *SMALLER.get(program, [])]
    if program == "python train.py":
        arguments += ["--data", str(data)]
    name = "train" if program == "python train.py" else program.removeprefix("python -m ")
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    return module.main(arguments)


def commands() -> list[str]:
    return [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]


def test_the_tutorial_has_the_whole_way():
    programs = [program_of(command) for command in commands() if command not in INSTALLING]
    assert programs[0] == "python train.py"
    assert {"python -m convert", "python -m parity_tests", "python -m torch_ref.train"} <= {*programs}
    assert all(line in commands() for line in INSTALLING)
    assert PAGE.count("](loss.png)") == PAGE.count("](parity.png)") == 1


@pytest.mark.slow  # half a minute; `.ci/run` has it
def test_every_command_and_every_python_block_of_the_tutorial_runs(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block.replace("max_new_tokens=40", "max_new_tokens=4"), "tutorial", "exec"), {})
            ran += 1
            continue
        for command in block.splitlines():
            if command in INSTALLING:
                continue
            capsys.readouterr()
            code = run(command, corpus)
            said = capsys.readouterr()
            planted = "--mutate" in command
            assert code == (1 if planted else 0), (command, said.err)
            if planted:
                assert "BREACH, first in: attention of layer 0 (rung layers)" in said.out
            elif "parity_tests" in command:
                assert "The two frameworks agree." in said.out
            ran += 1
    assert ran == 11
    assert Path("runs/tiny/report.md").is_file()
    assert Path("exported/modeling_customllm.py").is_file()
    assert Path("runs/parity/parity.png").is_file()


def test_what_the_page_quotes_is_what_the_commands_print(corpus, tmp_path, monkeypatch, capsys):
    """The lines of a start that have no figure of this machine."""
    monkeypatch.chdir(tmp_path)
    assert run("python train.py", corpus) == 0
    said = capsys.readouterr().out
    for form in (
        r"Data: .*: \d+ \.py files \(.*\); \d+ documents",
        r"Data: .*: held out: .* of the bytes",
        r"Model parameters: \d+\.\d\dM",
        r"Active parameters: .* \(of the \d+ routed experts the \d+ that a token uses; embeddings count whole\)",
        r"Training for \d+ steps of \d+ tokens in \w+ .*on cpu \(cpu\); everything goes to runs/tiny",
        r"step +\d+/\d+  loss +\d+\.\d+  lr \S+ +\S+ tokens/s  expert load +\d+\.\d+  left +\S+",
    ):
        assert re.search(form, said), form
        assert re.search(form, PAGE), form


@pytest.mark.parametrize("program", sorted(SMALLER))
def test_each_smaller_size_belongs_to_a_command_of_the_page(program):
    assert any(command.startswith(program) for command in commands())

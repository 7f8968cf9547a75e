"""The Dockerfile and the workflow run the README's commands and .ci/run. Where a builder works, the image is built."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from jaxllm.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, comments left out and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\s*\\\s*\n\s*", " ", lines)
    parts = (line.strip().partition(" ") for line in joined.splitlines())
    return [(name, rest.strip()) for name, _, rest in parts if name]


DOCKERFILE = (ROOT / "Dockerfile").read_text()
STEPS = instructions(DOCKERFILE)


def arguments(name: str) -> list[str]:
    return [rest for step, rest in STEPS if step == name]


def test_instructions_are_known_and_continued_lines_joined():
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "VOLUME", "USER", "CMD"}
    assert {name for name, _ in STEPS} <= known
    assert instructions("# a\nRUN a \\\n  && b\n\nCMD c") == [("RUN", "a && b"), ("CMD", "c")]


def test_it_installs_and_trains_as_the_readme_says():
    install, train = re.search(r"^(pip install -e \. .*) && (python train\.py)$", README, re.MULTILINE).groups()
    (run,) = (step for step in arguments("RUN") if "pip install" in step)
    first = run.split(" && ")[0]

    def expanded(extras: str) -> list[str]:
        shown = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {first}"], env={"EXTRAS": extras}, capture_output=True, text=True, check=True
        )
        return [word for word in shown.stdout.splitlines() if word != "--no-cache-dir"]

    assert expanded("") == shlex.split(install)
    assert expanded("cuda13") == shlex.split(install.replace(" . ", " .[cuda13] "))
    assert [json.loads(command) for command in arguments("CMD")] == [shlex.split(train)]


def test_the_extras_that_it_names_exist():
    named = {extra for extras in re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE + README) for extra in extras.split(",")}
    assert named == {"cuda13"}
    assert named <= {*PROJECT["optional-dependencies"]}
    assert arguments("ARG") == ['EXTRAS=""']


def test_its_python_is_one_that_the_constraints_pin():
    (image,) = arguments("FROM")
    major, minor = map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim", image).groups())
    least = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert (major, minor) >= least
    assert f'jax==0.12.0.1; python_version >= "{major}.{minor}"' in (ROOT / "constraints.txt").read_text()


def test_runs_go_to_the_volume_as_a_user_without_rights():
    order = [name for name, _ in STEPS]
    (user,), (volume,), (workdir,) = arguments("USER"), arguments("VOLUME"), arguments("WORKDIR")
    assert user not in ("root", "0")
    assert order.index("USER") < order.index("CMD")
    assert not {"RUN", "COPY"} & {*order[order.index("USER") :]}
    runs = arguments("RUN")
    assert f"useradd --create-home --uid 1000 {user} && install -d -o {user} {volume}" in runs
    assert any(run.endswith(f"ln -s {volume} runs") for run in runs)  # in the working directory
    assert workdir != volume
    assert TrainConfig().folder.parts[0] == "runs"
    assert f"JAXLLM_CACHE_DIR={volume}/" in " ".join(arguments("ENV"))


def test_it_holds_no_secret_and_little_that_it_does_not_need():
    assert not re.search(r"(?i)secret|token=|password|api_?key", DOCKERFILE)
    assert {".git", "runs"} <= {*(ROOT / ".dockerignore").read_text().split()}


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (setup,) = (step for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@"))
    assert setup["with"]["python-version"].split() == ["3.12", "3.11"]  # the last one is python3
    assert workflow["permissions"] == {"contents": "read"}


def builder() -> str | None:
    """A program that builds images here, and has or gets the base image."""
    for name in ("docker", "podman", "buildah"):
        if shutil.which(name) and not subprocess.run([name, "info"], capture_output=True).returncode:
            (image,) = arguments("FROM")
            if not subprocess.run([name, "pull", image], capture_output=True).returncode:
                return name
    return None


@pytest.mark.slow
def test_the_image_is_built_and_trains():
    if (program := builder()) is None:
        pytest.skip("no docker, podman or buildah that works here and gets the base image")
    subprocess.run([program, "build", "-t", "jaxllm-test", "."], cwd=ROOT, check=True)
    if program == "buildah":
        return
    command = "id -u && touch /runs/file && python train.py --help"
    done = subprocess.run(
        [program, "run", "--rm", "jaxllm-test", "sh", "-c", command], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("1000\n")
    assert "--precision" in done.stdout

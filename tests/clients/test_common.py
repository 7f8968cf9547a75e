"""transformers' own tests of every model: what the stock model passes, ours passes, but for a list with reasons.

They are fetched from the source distribution of the installed version. It has `tests/*.py` and no folder below, so the
two mixins that are imported from there, for generation and for exports, are replaced by empty ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECORDED = "it collects outputs in the forward pass, and not by hooks"
NO_FUSED = "its experts are modules of linear layers, which adapters and quantizers find, and not one stacked tensor"
NO_SCALING = "its config has no scaling of rotary positions"
DIFFERENT = {
    "test_can_capture_specific_layers_hidden_states": RECORDED,
    "test_capture_outputs_decorator": RECORDED,
    "test_can_load_from_already_mapped_keys": "no key of its files is renamed",
    "test_reverse_loading_mapping": "no key of its files is renamed",
    "test_eager_matches_batched_and_grouped_inference_0_fp16": NO_FUSED,
    "test_eager_matches_batched_and_grouped_inference_1_fp32": NO_FUSED,
    "test_eager_matches_batched_and_grouped_inference_2_bf16": NO_FUSED,
    "test_moe_models_record_router_logits": NO_FUSED,
    "test_output_router_logits_from_config": "output_router=True asks for the routing, and no field of the config does",
    "test_model_rope_scaling_frequencies": NO_SCALING,
    "test_model_rope_scaling_from_config_0_linear": NO_SCALING,
    "test_model_rope_scaling_from_config_1_dynamic": NO_SCALING,
    "test_model_rope_scaling_from_config_2_yarn": NO_SCALING,
    "test_sdpa_can_dispatch_non_composite_models": "attention is eager by default, as the parity ladder compares it",
}
EMPTY = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}


@pytest.fixture(scope="session")
def common_tests(tmp_path_factory, ours) -> Path:
    """A folder with the package `common`."""
    ours.skip_before("5.23", "its tests are others than those listed here")
    pytest.importorskip("parameterized")
    folder = tmp_path_factory.mktemp("transformers")
    wanted = f"transformers=={version('transformers')}"
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers", wanted]
    fetched = subprocess.run(download, cwd=folder, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"the source distribution could not be fetched: {fetched.stderr.strip().splitlines()[-1]}")
    package = folder / "common"
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            inside = Path(*Path(member.name).parts[1:])
            if member.isfile() and inside.match("tests/*.py"):
                member.name = inside.name
                tar.extract(member, package, filter="data")
    for file, mixin in EMPTY.items():
        (package / file).parent.mkdir()
        (package / file).write_text(f"class {mixin}:\n    pass\n")
    return folder


def start(folder: Path, tests: Path, report: Path) -> subprocess.Popen:
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"CLIENTS_SIDE": str(folder), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-c", os.devnull, "--rootdir", tests, "--noconftest"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", Path(__file__).with_name("common_suite.py")]
    return subprocess.Popen(command, env=env, cwd=tests)


def outcomes(report: Path) -> dict[str, str]:
    """The outcome of each test: the worst one of its parts."""
    found: dict[str, str] = {}
    order = ("passed", "skipped", "error", "failure")
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"]
        parts = [found.get(name, "passed"), *(child.tag for child in case if child.tag in order)]
        found[name] = max(parts, key=order.index)
    return found


def test_ours_passes_what_the_stock_model_passes(folders, common_tests):
    runs = {side: start(folder.absolute(), common_tests, common_tests / side) for side, folder in folders.items()}
    for run in runs.values():
        run.wait()
    stock, ours = (outcomes(common_tests / side) for side in ("control", "ours"))
    passed = {name for name, outcome in stock.items() if outcome == "passed"}
    assert len(passed) > 100
    assert {name for name, outcome in stock.items() if outcome not in ("passed", "skipped")} == set()
    differences = {name: ours.get(name, "missing") for name in passed if ours.get(name) != "passed"}
    assert differences.keys() == DIFFERENT.keys()

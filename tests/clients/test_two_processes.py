"""Tensor parallel and FSDP by transformers' plans, on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WHOLE = {
    "ours": ("kv_proj_d", "q_proj_d", "router", "position_embeddings", "norm"),
    "control": ("self_attn", "norm", "gate"),
}


@pytest.mark.parametrize("config", [{"tp_plan": "auto"}, {"fsdp_size": 2}], ids=["tensor parallel", "fsdp"])
def test_a_model_on_two_processes_is_the_plain_one(client, tmp_path, config):
    client.skip_before("5.23", "it has other plans, of the control too")
    result = tmp_path / "figures.json"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         Path(__file__).with_name("parallel_worker.py"), client.folder, json.dumps(config), result],
        check=True,
    )  # fmt: skip
    figures = json.loads(result.read_text())
    assert figures["logits"] < 1e-5
    assert figures["same tokens"] == [True, True]
    assert figures["gradients"] < 1e-5
    # every other weight is cut, or nothing of this has been tested
    allowed = WHOLE[client.name] if "tp_plan" in config else ()
    assert [name for name in figures["whole"] if not any(part in name for part in allowed)] == []

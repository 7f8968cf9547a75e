"""What a run has come to, as checksums: two runs are the same if these are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from jaxllm.config import TrainConfig
from jaxllm.files import read_json
from jaxllm.store.checkpoint import newest_checkpoint
from jaxllm.train.computation import Computation

MEASURED = ("second", "runtime", "mfu", "data_wait", "peak")
"""Parts of the names of columns that are measured, and so differ from run to run."""


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if not any(part in k for part in MEASURED)} for r in records]


def fingerprint(run: Path) -> dict[str, str]:
    """Checksums of a run's newest state, its data positions, and its log without what is measured.

    A log of every step holds, to the last bit, the norm of each step's gradient: no other batch has the same.
    """
    config = TrainConfig.from_dict(read_json(run / "train_config.json"))
    state, resumed = newest_checkpoint(run).state(Computation.of(config))
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, [tuple(p[2:]) for p in resumed.positions])):
        array = np.asarray(leaf)
        found[jax.tree_util.keystr(path)] = hashlib.sha256(array.tobytes() + str(array.dtype).encode()).hexdigest()
    found["positions"] = json.dumps([[p.source, p.drawn] for p in resumed.positions], sort_keys=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = hashlib.sha256(json.dumps(without_times(lines)).encode()).hexdigest()
    history = resumed.history.to_json() | {"records": without_times(resumed.history.records)}
    found["history"] = hashlib.sha256(json.dumps(history).encode()).hexdigest()
    return found

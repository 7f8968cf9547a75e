"""The log of a run on disk, `metrics.jsonl`: one JSON object in each line. Imports neither JAX nor PyTorch."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from jaxllm.files import StrPath, read_json, write_text_atomically
from jaxllm.store.folder import DATA_REPORT, METRICS_FILE


def write_metrics(folder: StrPath, records: list[dict[str, Any]]) -> None:
    """Write `metrics.jsonl` atomically. The report of the data, if there is one, is a first line without a `step`."""
    file = Path(folder, DATA_REPORT)
    first = [{"data": read_json(file)}] if file.is_file() else []
    write_text_atomically(Path(folder, METRICS_FILE), "".join(map(json_line, [*first, *records])))


def json_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON, where a number that is not finite becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(folder: StrPath) -> list[dict[str, Any]]:
    """All complete records of a run; a last line that a killed process left incomplete is skipped."""
    path = Path(folder, METRICS_FILE)
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def last_evaluation(folder: StrPath) -> dict[str, Any] | None:
    """The newest evaluation line of a run whose loss is finite; None without one."""
    records = (record for record in reversed(read_metrics(folder)) if isinstance(record.get("eval_loss"), float))
    return next((record for record in records if math.isfinite(record["eval_loss"])), None)

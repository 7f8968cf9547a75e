"""The data position in a file of its own."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.data.stream import Position, read_position
from jaxllm.errors import UserError


@pytest.mark.parametrize("left_over", [0, 5])
def test_a_position_survives_its_file(left_over, tmp_path):
    source = {"pass": 1, "file": 3, "stream": None, "name": "grüße"}
    pool = np.arange(12, dtype=np.int32).reshape(3, 4)
    position = Position(source, 2**40, np.arange(left_over, dtype=np.int32), pool)
    (tmp_path / "position").write_bytes(position.to_bytes())
    back = read_position(tmp_path / "position", seq_len=4, vocab_size=12)
    assert (back.source, back.drawn) == (position.source, position.drawn)
    for one, other in ((back.tokens, position.tokens), (back.pool, position.pool)):
        assert one.dtype == np.int32
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("state", "tensors"),
    [
        (None, ("tokens", "pool")),
        ("{", ("tokens", "pool")),
        ('{"source": {}, "drawn": "many"}', ("tokens", "pool")),
        ('{"source": {}}', ("tokens", "pool")),
        ('{"source": [], "drawn": 1}', ("tokens", "pool")),
        ('{"source": {}, "drawn": 1}', ("tokens",)),
    ],
)
def test_a_file_that_is_no_position_is_named(state, tensors, tmp_path):
    arrays = {"tokens": np.zeros(2, np.int32), "pool": np.zeros((2, 2), np.int32)}
    arrays = {name: arrays[name] for name in tensors}
    if state is not None:
        arrays["state"] = np.frombuffer(state.encode(), np.uint8)
    save_file(arrays, tmp_path / "position")
    with pytest.raises(UserError, match="position"):
        read_position(tmp_path / "position", seq_len=2, vocab_size=1)


def test_a_missing_or_cut_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*position: No such file"):
        read_position(tmp_path / "position", seq_len=2, vocab_size=1)
    (tmp_path / "position").write_bytes(b"\x00" * 4)
    with pytest.raises(UserError, match="cannot be read"):
        read_position(tmp_path / "position", seq_len=2, vocab_size=1)

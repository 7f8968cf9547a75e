"""A data position in a file of its own: how a PyTorch checkpoint keeps it, and how a run changes frameworks with it.

It is a safetensors file: the tensors `tokens` (n,) and `pool` (P,T), int32; in its metadata `source`, as JSON, and
`drawn`, as a decimal number.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxllm.bounded import check_file
from jaxllm.data.corpus import one_line
from jaxllm.data.stream import Position
from jaxllm.errors import UserError

POSITION_FILE = "data_position.safetensors"
"""Its name in a checkpoint's folder."""


def save_position(file: Path, position: Position) -> None:
    """Write a position to a file."""
    tensors = {
        "tokens": np.ascontiguousarray(position.tokens, np.int32),
        "pool": np.ascontiguousarray(position.pool, np.int32),
    }
    save_file(tensors, file, metadata={"source": json.dumps(position.source), "drawn": str(position.drawn)})


def load_position(file: Path, seq_len: int, vocab_size: int) -> Position:
    """Read a position that `save_position` wrote, for rows of so many tokens below `vocab_size`.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        check_file(file)
        with safe_open(str(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
            position = Position(
                source=json.loads(metadata["source"]),
                drawn=int(metadata["drawn"]),
                tokens=opened.get_tensor("tokens"),
                pool=opened.get_tensor("pool"),
            )
    except Exception as error:  # safetensors, json and NumPy raise kinds of their own
        raise UserError(f"the data position {file} cannot be read ({one_line(error)})") from None
    check_fits(position, str(file), seq_len, vocab_size)
    return position


def check_fits(position: Position, file: str, seq_len: int, vocab_size: int) -> None:
    """Whether a position out of `file` is one, of rows of so many tokens below `vocab_size`.

    Raises:
        UserError: it is something else.
    """
    drawn = position.drawn
    fits = isinstance(position.source, dict) and isinstance(drawn, int) and 0 <= drawn < 2**63
    if not fits or (position.tokens.ndim, position.pool.ndim) != (1, 2):
        raise UserError(f"{file} is no data position: its source, drawn, tokens or pool is of another kind")
    if position.pool.shape[1] != seq_len:
        raise UserError(f"{file} has rows of {position.pool.shape[1]} tokens, and the run has seq_len = {seq_len}")
    for name, tokens in (("tokens", position.tokens), ("pool", position.pool)):
        if tokens.dtype != np.int32 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size):
            raise UserError(f"{file}: {name} must be int32 from 0 to below vocab_size = {vocab_size}")

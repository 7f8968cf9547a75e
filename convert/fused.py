"""Experts that transformers 5 joins in memory, as the tensors of single experts that files have.

`experts.gate_up_proj` is (E, 2M, D), the gates first, and `experts.down_proj` is (E, D, M). A file has them where a
state_dict was saved as it is.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from convert.mapping import Box

MAX_EXPERTS = 2**14

_JOINED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


class Piece(NamedTuple):
    """The tensor of one expert within a tensor of a file, or a tensor that is whole."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    row: int = 0
    """The first of its rows."""

    def box(self, own: Box) -> Box:
        """A box of it as a box of the file's tensor."""
        if self.expert is None:
            return own
        rows, columns = own
        return range(self.expert, self.expert + 1), range(self.row + rows.start, self.row + rows.stop), columns


def pieces(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """The tensors that a tensor joins; it is the only one, whole, if it joins none."""
    match = _JOINED.fullmatch(name)
    if match is None or len(shape) != 3 or shape[0] > MAX_EXPERTS:
        yield Piece(name, shape)
        return
    experts, rows, columns = shape
    parts = {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)}
    if match[2] == "down_proj":
        parts = {"down_proj": (0, rows)}
    for expert in range(experts):
        for linear, (start, end) in parts.items():
            yield Piece(f"{match[1]}.{expert}.{linear}.weight", (end - start, columns), expert, start)

"""Experts that transformers 5 joins in memory, as tensors of single experts, which files have.

`experts.gate_up_proj` is (E, 2M, D), the gates first, and `experts.down_proj` is (E, D, M). A file has them where a
state_dict was saved as it is.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from convert.tensor_files import Tensor

MAX_EXPERTS = 2**14

_JOINED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def unfused(tensor: "Tensor") -> "Iterator[Tensor]":
    """The tensors of single experts that a tensor joins, or the tensor itself."""
    match = _JOINED.fullmatch(tensor.name)
    if match is None or len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
        yield tensor
        return
    E, rows, columns = tensor.shape
    parts = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, None)}
    if match[2] == "down_proj":
        parts = {"down_proj": slice(0, None)}
    for expert in range(E):
        for linear, part in parts.items():

            def read(expert: int = expert, part: slice = part) -> np.ndarray:
                return tensor.read()[expert, part]

            shape = (len(range(rows)[part]), columns)
            yield tensor._replace(name=f"{match[1]}.{expert}.{linear}.weight", shape=shape, read=read)

"""FP8 files of the DeepSeek family: each block of 128 x 128 values of a weight has one scale (arXiv:2412.19437, 3.3.2).

A weight of F8_E4M3 has a sibling tensor NAME_scale_inv, of one number for each block, the last blocks being partial.
Their product is computed in float32. Weights that `--init` reads to be trained keep it; all others are rounded once to
bfloat16, which is what DeepSeek's own conversion writes.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxllm.config.deepseek import FP8_BLOCK

SCALE_SUFFIX = "_scale_inv"
FP8 = "F8_E4M3"
"""The name of the dtype in a safetensors file."""
HELD = np.dtype(ml_dtypes.bfloat16)
"""In which the product is held where it is not trained."""

Shape = tuple[int, ...]


def scales_of(dtypes: Mapping[str, str]) -> dict[str, str]:
    """The name of the scale of each FP8 tensor, given all tensors' dtypes."""
    return {name: name + SCALE_SUFFIX for name, dtype in dtypes.items() if dtype == FP8}


def scale_shape(shape: Shape) -> Shape:
    """The shape of the scales of a weight (out, in)."""
    return tuple(-(-size // FP8_BLOCK) for size in shape)


def dequantize(values: np.ndarray, scales: np.ndarray, start: tuple[int, int] = (0, 0)) -> np.ndarray:
    """values[a, b] * scales[a // 128, b // 128] in float32.

    Args:
        values: a weight, or its part that begins at the row and the column `start`.
        scales: of the whole weight.
    """
    result, (row, column), columns = values.astype(np.float32), start, values.shape[1]
    for block in range(row // FP8_BLOCK, -(-(row + len(values)) // FP8_BLOCK)):
        of_row = np.repeat(scales[block].astype(np.float32), FP8_BLOCK)[column : column + columns]
        result[max(block * FP8_BLOCK - row, 0) : (block + 1) * FP8_BLOCK - row] *= of_row
    return result

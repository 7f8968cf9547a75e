"""The batches of train.py, split into the micro-batches that transformers' Trainer reads."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from jaxllm.config.groups import DataConfig
from jaxllm.data.prefetch import Batch, Prefetcher
from jaxllm.data.stream import TokenStream
from jaxllm.model.batch import token_batch


class MicroBatches:
    """An endless iterator over micro-batches, A of them for each step, in the order of train.py.

    It replaces a DataLoader because accelerate's reads one batch ahead: here `batch` is the one being trained on, with
    the data position after it. The Trainer takes all micro-batches of a step before it trains on the first, and takes
    none of the next step before it has saved.
    """

    def __init__(self, stream: TokenStream, data: DataConfig):
        self._data = data
        self.stream, self.prefetcher = stream, Prefetcher(stream, data.grad_accum * data.batch_size)
        self.batch: Batch | None = None  # None before the first step
        self._shape = (data.grad_accum, data.batch_size, data.seq_len)  # (A,B,T)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self.batch = batch = self.prefetcher.take()
            assert batch is not None  # `take` returns None only if it is interrupted
            for rows in batch.rows.reshape(self._shape):
                yield as_inputs(rows, self._data)


def as_inputs(rows: np.ndarray, data: DataConfig) -> dict[str, Tensor]:
    """Travelling rows (...,T) as inputs and labels: the model shifts the labels. -100 is ignored."""
    batch = token_batch(rows, data)
    return {
        "input_ids": torch.from_numpy(batch.ids).long().clamp(min=0), "labels": torch.from_numpy(batch.labels).long()
    }  # fmt: skip

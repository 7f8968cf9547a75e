"""The batches of train.py, in the pieces that transformers' Trainer asks for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from jaxllm.config import RunConfig
from jaxllm.data.stream import Position, Prefetcher, TokenStream


class MicroBatches:
    """An endless series of micro-batches, A of them for each step; they come in the order of train.py.

    It replaces a DataLoader because accelerate's reads one batch ahead: here `position` and `progress` are
    those after the batch that is being trained on. The Trainer takes all micro-batches of a step before it trains on
    the first, and none of the next step before it has saved.
    """

    def __init__(self, stream: TokenStream, config: RunConfig):
        self._stream = stream
        self._batches = Prefetcher(stream, config.data.grad_accum * config.data.batch_size)
        self._shape = (config.data.grad_accum, config.data.batch_size, config.data.seq_len)  # (A,B,T)
        self.position: Position | None = None
        self.progress: float | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            batch = self._batches.take()
            assert batch is not None  # nothing interrupts it
            self.position, self.progress = batch.position, batch.progress
            for rows in torch.from_numpy(batch.rows).long().view(self._shape):
                yield as_inputs(rows)

    def encoded_position(self) -> bytes:
        """Where the data continues after the batch that is being trained on."""
        assert self.position is not None  # before the first batch nothing is saved
        return self.position.to_bytes()

    @property
    def skipped_rows(self) -> int:
        """Rows of the data that held no text."""
        return self._stream.skipped_rows

    @property
    def waited(self) -> float:
        """Seconds that the training has waited for batches."""
        return self._batches.waited

    def close(self) -> None:
        self._batches.close()


def as_inputs(rows: Tensor) -> dict[str, Tensor]:
    """Rows of tokens are inputs and labels at once: the model shifts them. -100 is no target."""
    return {"input_ids": rows.clamp(min=0), "labels": rows}

"""Rows of tokens as they are stored and as a step takes them."""

import numpy as np
import pytest

from jaxllm.config.groups import DataConfig
from jaxllm.model.batch import DOCUMENT_END, IGNORED, NOT_TARGET, are_rows, token_batch

ROW = np.asarray(
    [[5 | NOT_TARGET, 6, 7 | DOCUMENT_END, 8, 9 | NOT_TARGET | DOCUMENT_END, 3, IGNORED, IGNORED]], np.int32
)


def test_joined_rows_are_inputs_and_labels_at_once():
    rows = np.arange(8, dtype=np.int32)[None]
    batch = token_batch(rows, DataConfig())
    assert batch.ids is rows
    assert batch.labels is rows
    assert batch.targets is None
    assert batch.documents is None


def test_a_token_that_is_no_target_stays_an_input():
    batch = token_batch(ROW, DataConfig(train_on="assistant", documents="joined"))
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 3, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, 6, 7, 8, IGNORED, 3, IGNORED, IGNORED]]
    assert batch.documents is None


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_no_target_crosses_into_another_document(train_on):
    batch = token_batch(ROW, DataConfig(train_on=train_on, documents="separate"))
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 3, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert batch.documents.tolist() == [[1, 1, 1, 2, 2, 3, 0, 0]]


def test_what_is_no_row_of_a_vocabulary_is_known():
    assert are_rows(ROW, 10)
    assert not are_rows(ROW, 9)
    assert not are_rows(ROW.astype(np.int64), 10)
    assert not are_rows(np.asarray([-1], np.int32), 10)

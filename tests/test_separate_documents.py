"""Documents that do not see each other: packed rows compute what separate rows compute, and every document is drawn."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_templates import FAMILIES, tokenizer_of
from flax import nnx

from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.config.groups import DataConfig, OptimConfig
from jaxllm.data import stream as streams
from jaxllm.data.epochs import steps_for_epochs
from jaxllm.data.packing import best_fit, pack_in_order
from jaxllm.data.sources import open_source
from jaxllm.data.stream import Position, TokenStream
from jaxllm.model.batch import DOCUMENT_END, IGNORED, TokenBatch, token_batch, token_ids
from jaxllm.model.decoder import CustomLLM, abstract_model
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.train.loss import count_targets
from jaxllm.train.state import TrainState
from jaxllm.train.step import gradients

CUSTOM = ModelConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=24,
    max_position_embeddings=256,
)  # fmt: skip
LENGTHS = [[37, 3, 60, 1, 20], [128], [5, 5]]
"""Documents of each row of 150 tokens, which is longer than a block of queries."""
ROW = 150


def rows_of(seed: int = 0) -> tuple[TokenBatch, TokenBatch]:
    """Packed rows (1,B,T), and the same documents with a row of their own each (1,N,T); some tokens are not targets."""
    random = np.random.default_rng(seed)
    documents = [[random.integers(0, 97, n, np.int32) for n in lengths] for lengths in LENGTHS]
    keep = [[random.random(n) < 0.6 for n in lengths] for lengths in LENGTHS]

    def batch(rows: list[list[tuple[int, int]]]) -> TokenBatch:
        made = TokenBatch(*(np.full((1, len(rows), ROW), fill, np.int32) for fill in (0, IGNORED, 0)))
        for r, row in enumerate(rows):
            at = 0
            for number, (i, j) in enumerate(row, start=1):
                ids, stop = documents[i][j], at + len(documents[i][j])
                made.ids[0, r, at:stop] = ids
                made.targets[0, r, at:stop] = np.where(keep[i][j], ids, IGNORED)
                made.targets[0, r, at] = IGNORED
                made.documents[0, r, at:stop] = number
                at = stop
        return made

    where = [[(i, j) for j in range(len(lengths))] for i, lengths in enumerate(LENGTHS)]
    return batch(where), batch([[one] for row in where for one in row])


def computed(batch: TokenBatch, dtype: jnp.dtype, optim: OptimConfig, layout: Layout = ONE_DEVICE):
    graph, params, bias = abstract_model(dataclasses.replace(CUSTOM, dropout=0.0), dtype=dtype)
    random = np.random.default_rng(1)

    def drawn(leaf):
        return jnp.asarray(random.normal(0, 0.3, leaf.shape), dtype)

    params, bias = jax.tree.map(drawn, params), jax.tree.map(drawn, bias)
    state = TrainState(params, bias, None, jnp.zeros((), jnp.int32), None)
    step = functools.partial(gradients, optim, graph, layout=layout)
    compiled = jax.jit(step) if layout.devices == 1 else jax.pmap(step, "data", in_axes=(None, 0))
    return jax.device_get(compiled(state, batch))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(jnp.float32, 1e-5, marks=pytest.mark.slow), (jnp.float64, 1e-12)]
)
@pytest.mark.parametrize("routers", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_packed_rows_compute_what_separate_rows_compute(dtype, tolerance, routers):
    """The loss, the gradients and the routers' counts, with the losses of the routers and without."""
    packed, apart = rows_of()
    optim = OptimConfig(balance_loss=routers, router_z_loss=routers)
    with jax.enable_x64(dtype == jnp.float64):
        one, other = (computed(batch, dtype, optim) for batch in (packed, apart))
    assert one[1] == pytest.approx(other[1], rel=tolerance)
    np.testing.assert_array_equal(one[2], other[2])
    for ours, theirs in zip(*map(jax.tree.leaves, (one[0], other[0])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, np.abs(theirs).max()))


@pytest.mark.slow
def test_losses_of_routers_do_not_depend_on_how_rows_are_divided():
    """Among micro-batches or devices, which have other numbers of documents and of tokens."""
    packed, _ = rows_of()
    optim = OptimConfig(balance_loss=0.5, router_z_loss=0.5)
    wanted = computed(packed, jnp.float32, optim)
    micro_batches = jax.tree.map(lambda rows: rows.swapaxes(0, 1), packed)  # (3,1,T)
    devices = jax.tree.map(lambda rows: rows.swapaxes(0, 1)[:, None], packed)  # (3,1,1,T)
    spread = jax.tree.map(lambda a: a[0], computed(devices, jnp.float32, optim, Layout(data=3)))
    for found in (computed(micro_batches, jnp.float32, optim), spread):
        for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def test_a_document_sees_no_other_one():
    """And no padding: what another document says changes nothing, to the last bit."""
    packed, _ = rows_of()
    other = packed._replace(ids=np.where(packed.documents == 3, packed.ids, 1 + packed.ids % 90))
    graph, params, bias = abstract_model(CUSTOM)
    params, bias = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01).at[..., ::3].set(0.2), (params, bias))

    def last(batch: TokenBatch):
        model: CustomLLM = nnx.merge(graph, params, bias)
        return model.hidden_states(batch.ids[0], batch.documents[0]).last

    found = [np.asarray(jax.jit(last)(batch))[packed.documents[0] == 3] for batch in (packed, other)]
    np.testing.assert_array_equal(*found)
    assert found[0].any()


@pytest.mark.slow
def test_padding_reaches_no_statistic_of_a_router():
    packed, _ = rows_of()
    _, _, counts = computed(packed, jnp.float32, OptimConfig())
    real = int((packed.documents > 0).sum())
    assert (counts.sum(axis=-1) == CUSTOM.num_experts_per_tok * real).all()
    optim = OptimConfig(balance_loss=1.0, router_z_loss=1.0)
    alone = computed(packed, jnp.float32, optim)
    other = computed(packed._replace(ids=np.where(packed.documents > 0, packed.ids, 55)), jnp.float32, optim)
    for ours, theirs in zip(*map(jax.tree.leaves, (alone, other)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(1.0, np.abs(theirs).max()))


# rows


def test_the_longest_document_that_fits_comes_next():
    lengths, passes = np.asarray([5, 9, 3, 9, 4]), np.asarray([1, 1, 1, 1, 0])
    assert best_fit(lengths, passes, 9) == 4  # of the oldest pass
    assert best_fit(lengths, np.zeros(5), 9) == 1
    assert best_fit(lengths, np.zeros(5), 8) == 0
    assert best_fit(lengths, passes, 2) is None


def test_held_out_documents_fill_rows_and_longer_ones_are_cut():
    documents = [np.arange(n, dtype=np.int32) for n in (6, 3, 13, 2, 4)]
    for document in documents:
        document[-1] |= DOCUMENT_END
    tokens = np.concatenate(documents)
    rows = pack_in_order(tokens, 8, most=10, is_separate=True)
    assert (rows != IGNORED).sum(axis=1).tolist() == [8, 8, 8, 4]
    ids = [token_ids(row[row != IGNORED]).tolist() for row in rows]
    assert ids == [[*range(6), 0, 1], [0, 1, 2, *range(8, 13)], [*range(8)], [*range(4)]]
    assert len(pack_in_order(tokens, 8, most=2, is_separate=True)) == 2
    np.testing.assert_array_equal(pack_in_order(tokens, 8, most=3, is_separate=False), tokens[:24].reshape(3, 8))
    assert pack_in_order(tokens[:5], 8, most=3, is_separate=False).shape == (0, 8)


@pytest.fixture
def small_pool(monkeypatch):
    monkeypatch.setattr(streams, "POOL_ROWS", 16)


def chats(folder, count: int) -> TrainConfig:
    """Chats of lengths that differ, each with its number."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} " + "why " * (i * 7 % 11)},
                {"role": "assistant", "content": f"because {i} " + "so " * (i * 5 % 13)},
            ]
        }
        for i in range(count)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TrainConfig.from_options(
        data=str(folder), seq_len=96, train_on="assistant", documents="separate", hold_out="nothing", batch_size=2
    )


@pytest.mark.usefixtures("small_pool")
def test_every_document_of_a_pass_is_drawn_once_and_whole(tmp_path):
    config, tokenizer = chats(tmp_path, 60), tokenizer_of(FAMILIES["ChatML"], "byte-level")
    stream = TokenStream(open_source(config.data, config.seed), tokenizer, config.data, seed=0)
    drawn, fills = [], []
    while stream.oldest_pass == 0:
        (row,) = stream.next_rows(1)
        fills.append((row != IGNORED).mean())
        batch = token_batch(row[None], config.data)
        for number in range(1, batch.documents.max() + 1):
            of_one = batch.documents[0] == number
            drawn.append(tokenizer.decode(batch.ids[0][of_one]))
            said = tokenizer.decode(batch.targets[0][of_one & (batch.targets[0] >= 0)])
            assert drawn[-1].endswith(f"assistant\n{said}\n")
            assert said.endswith("<|im_end|>")
    first = {text.split("\n")[1].split()[0] for text in drawn}
    assert first == {str(i) for i in range(60)}
    assert len(drawn) - 60 <= 16  # of the next pass, where no other fits
    assert np.mean(fills[:-1]) > 0.85
    steps = steps_for_epochs(2.0, config.data, config.seed, config.data_streams, tokenizer)
    assert steps == -(-2 * len(fills) // 2)


@pytest.mark.usefixtures("small_pool")
def test_a_stream_of_documents_goes_on_from_any_position(tmp_path):
    config, tokenizer = chats(tmp_path, 40), tokenizer_of(FAMILIES["ChatML"], "byte-level")

    def opened() -> TokenStream:
        return TokenStream(open_source(config.data, config.seed), tokenizer, config.data, seed=3)

    stream = opened()
    wanted = [stream.next_rows(3) for _ in range(20)]
    stream = opened()
    for i in range(20):
        position = Position.from_bytes(stream.position().to_bytes(), "here", 96, len(tokenizer))
        resumed = opened()
        resumed.seek(position)
        np.testing.assert_array_equal(resumed.next_rows(3), wanted[i])
        stream.next_rows(3)


def test_a_text_that_is_longer_than_a_row_is_cut_there(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "word " * n}) for n in (300, 2, 90) * 20))
    data = DataConfig(documents="separate", source=str(tmp_path), hold_out="nothing", seq_len=64)
    tokenizer = tokenizer_of(FAMILIES["ChatML"], "byte-level")
    stream = TokenStream(open_source(data, 0), tokenizer, data, seed=0)
    batch = token_batch(stream.next_rows(40), data)
    assert (batch.documents == 1).all(axis=1).any()
    assert (batch.documents.max(axis=1) > 1).any()
    assert count_targets(jnp.asarray(batch.labels)) == (batch.documents > 0).sum() - batch.documents.max(axis=1).sum()

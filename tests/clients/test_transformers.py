"""transformers itself: loading, signature, masks, attention functions, caches, generation, tokenizer files."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
import runpy
import shutil
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DynamicCache,
    GenerationConfig,
    cache_utils,
)
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # since 5.24, before
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def test_the_model_is_the_exported_file(ours):
    model = ours.load(attn_implementation=None)
    assert type(model).__module__.startswith("transformers_modules.")
    assert model.config._attn_implementation == "eager"  # the reference, unless another one is asked for


@pytest.mark.parametrize("lacking", ["transformers.masking_utils", "transformers.modeling_layers"])
def test_an_old_transformers_is_told_which_one_is_needed(ours, monkeypatch, lacking):
    """In one line, not by the name of what it lacks."""
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.49.0" if name == "transformers" else installed(name)
    )
    monkeypatch.setitem(sys.modules, lacking, None)
    with pytest.raises(ImportError, match=r"transformers>=5.4 is required .* found transformers==4.49.0"):
        runpy.run_path(str(ours.folder / "modeling_customllm.py"))


@torch.no_grad()
def test_embeddings_in_place_of_tokens(client):
    model, ids = client.load(), client.ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="input_ids"):
        model(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="input_ids"):
        model()


@torch.no_grad()
def test_outputs(client):
    model, batch = client.load(), client.padded()
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    layers, rows, length = client.config.num_hidden_layers, *batch["input_ids"].shape
    assert len(out.hidden_states) == layers + 1
    assert [w.shape for w in out.attentions] == [(rows, client.config.num_attention_heads, length, length)] * layers
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        real = batch["attention_mask"].bool()
        assert not weights.triu(1)[real[:, None, :, None].expand_as(weights)].any()
    assert out[CACHE].get_seq_length() == length  # as the config's use_cache says
    assert isinstance(model(**batch, return_dict=False), tuple)


@torch.no_grad()
def test_the_backbone(client):
    model, batch = client.load(), client.padded()
    assert model.base_model is not model
    last = model.base_model(**batch).last_hidden_state
    assert torch.equal(model.lm_head(last), model(**batch).logits)
    torch.testing.assert_close(client.load(AutoModel)(**batch).last_hidden_state, last)
    replaced = torch.nn.Embedding(client.config.vocab_size, client.config.hidden_size)
    model.set_input_embeddings(replaced)
    changed = model.base_model(**batch).last_hidden_state
    assert torch.equal(model.lm_head(changed), model(**batch).logits)
    assert not torch.equal(changed, last)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_other_heads(client, tmp_path, auto):
    model, batch = client.load(auto, num_labels=3), client.padded()
    body = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        wanted = client.load(AutoModel)(**batch).last_hidden_state
        torch.testing.assert_close(body(**batch).last_hidden_state, wanted)  # bits depend on where memory begins
    labels = torch.zeros(len(model(**batch).logits.flatten(0, -2)), dtype=torch.long)
    loss = model(**batch, labels=labels.view(model(**batch).logits.shape[:-1])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.score.parameters())
    model.save_pretrained(tmp_path / "head")
    options = {"trust_remote_code": True, "attn_implementation": "eager"}
    again = auto.from_pretrained(tmp_path / "head", **options).eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_masks_of_four_axes(client):
    model, batch = client.load(), client.padded()
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = model(ids, attention_mask=mask.long(), position_ids=positions).logits
    visible = (mask[:, None, None, :] & torch.ones(24, 24, dtype=torch.bool).tril()) | torch.eye(24, dtype=torch.bool)
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for four in [added, visible] if client.is_ours else [added]:  # the control's eager adds booleans: a silent error
        torch.testing.assert_close(model(ids, attention_mask=four, position_ids=positions).logits[mask], plain[mask])


@torch.no_grad()
def test_unknown_arguments_are_refused(ours):
    """The control swallows them."""
    model, ids = ours.load(), ours.ids(1, 9)
    for name in ("cu_seq_lens_q", "is_causal", "atention_mask", "token_type_ids"):
        with pytest.raises(TypeError, match=name):
            model(ids, **{name: torch.zeros(2, dtype=torch.int32)})
        with pytest.raises(TypeError, match=name):
            model.base_model(ids, **{name: False})
        model(ids, **{name: None})


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_the_cache_has_two_names(ours, attention):
    """transformers 5.24 calls `cache` what was `past_key_values`. With every version either is used, none ignored."""
    model, ids = ours.load(attn_implementation=attention), ours.ids(2, 12)
    backbone = ours.load(AutoModel, attn_implementation=attention)
    with torch.compiler.set_stance("force_eager"):
        wanted, logits = model.generate(ids, use_cache=False, **GREEDY), model(ids).logits[:, 7:]
        for name in ("past_key_values", "cache"):
            assert torch.equal(model.generate(ids, **{name: DynamicCache()}, **GREEDY), wanted)
            filled = backbone(ids[:, :7], **{name: DynamicCache()})[CACHE]
            out = model(ids[:, 7:], **{name: filled})
            assert out[CACHE] is filled
            assert filled.get_seq_length() == 12
            torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_what_is_not_a_cache_is_refused(ours, attention):
    model, ids = ours.load(attn_implementation=attention), ours.ids(1, 9)
    legacy = tuple((torch.zeros(1, 4, 3, 16),) * 2 for _ in range(3))
    for run in (model, model.base_model, model.generate):
        with pytest.raises(TypeError, match="two names of one argument"):
            run(ids, cache=DynamicCache(), past_key_values=DynamicCache())
        for name in ("past_key_values", "cache"):
            for wrong in (legacy, "a server's", object()):
                with pytest.raises(
                    TypeError, match=f"cache has type {type(wrong).__name__}: pass a transformers Cache"
                ):
                    run(ids, **{name: wrong})
    for name in ("kv_cache", "cache_params", "layer_past", "read_index", "block_table"):
        with pytest.raises(TypeError, match=f"does not use {name}"):
            model(ids, **{name: DynamicCache()})


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_continuous_batching(ours, attention):
    """transformers' pages have no place for the latents of the control."""
    prompts = [ours.ids(1, n, seed=n)[0].tolist() for n in (5, 12, 9)]
    model = ours.load(attn_implementation=attention)
    wanted = [model.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist() for p in prompts]
    options = GenerationConfig(**GREEDY | {"eos_token_id": -1}, num_blocks=64, block_size=16)
    made = model.generate_batch(prompts, generation_config=options)
    assert [list(out.generated_tokens) for out in made.values()] == wanted


@torch.no_grad()
def test_pages_that_no_one_would_fill_are_refused(ours, monkeypatch):
    """Before 5.24 the attention function puts keys and values into a paged cache: not all of them do."""
    model = ours.load()
    monkeypatch.setattr(sys.modules[type(model).__module__], "CACHE", "past_key_values")
    with pytest.raises(TypeError, match="attn_implementation='eager' does not read a paged cache"):
        model(ours.ids(1, 9), cache=PagedAttentionCache.__new__(PagedAttentionCache))


@torch.no_grad()
def test_labels_that_are_shifted_already(client):
    model, ids = client.load(), client.ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    wanted = model(ids, labels=labels).loss
    torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted).loss, wanted)  # they take precedence
    # a sequence that is cut among devices: each part is divided by the targets of all
    parts = [shifted.clone(), shifted.clone()]
    parts[0][:, 5:] = parts[1][:, :5] = -100
    losses = [
        model(ids, labels=ids, shift_labels=part, num_items_in_batch=(shifted != -100).sum()).loss for part in parts
    ]
    torch.testing.assert_close(sum(losses), wanted)
    with pytest.raises(ValueError, match="batch_size"):
        model(ids, labels=ids, shift_labels=shifted[:, 1:].contiguous())
    if client.is_ours:  # the stock model returns no loss without `labels`
        torch.testing.assert_close(model(ids, shift_labels=shifted).loss, wanted)


def documents(client, lengths=(5, 17, 10)) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    docs = [client.ids(1, n, seed=n) for n in lengths]
    return docs, torch.cat(docs, dim=1), torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(client, attention):
    model = client.load(attn_implementation=attention)
    docs, row, positions = documents(client)
    apart = torch.cat([model(doc).logits for doc in docs], dim=1)
    for options in ({}, {"use_cache": False}) if client.is_ours else ({"use_cache": False},):
        packed = model(row, position_ids=positions, **options).logits
        torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)
    assert (model(row).logits - apart).abs().max() > 0.1
    features = [{"input_ids": doc[0].tolist()} for doc in docs]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(features)
    batch.pop("labels")
    torch.testing.assert_close(model(**batch, use_cache=False).logits, apart, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_limit_counts_positions(client):
    model = client.load()
    limit = client.config.max_position_embeddings
    docs, row, positions = documents(client, (40,) * (limit // 40 + 2))
    assert row.shape[1] > limit
    apart = torch.cat([model(doc).logits for doc in docs], dim=1)
    packed = model(row, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)
    mask = torch.ones(1, limit + 20, dtype=torch.long)
    mask[0, :20] = 0
    ids = client.ids(1, limit + 20)
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 20:]
    torch.testing.assert_close(padded, model(ids[:, 20:]).logits, rtol=0, atol=1e-5)
    if client.is_ours:
        with pytest.raises(ValueError, match=f"max_position_embeddings = {limit}"):
            model(client.ids(1, limit + 1))
        with pytest.raises(ValueError, match=f"max_position_embeddings = {limit}"):
            model(client.ids(1, 2), position_ids=torch.tensor([[5, limit]]))


@torch.no_grad()
def attention_difference(client, attention: str, decoded: int = 4) -> float:
    batch, steps = client.padded(), client.ids(3, decoded, seed=1)
    logits = []
    for implementation in ("eager", attention):
        model = client.load(attn_implementation=implementation)
        out = model(**batch, use_cache=True)
        parts, mask = [out.logits], batch["attention_mask"]
        for token in steps.T[..., None]:
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            positions = mask.sum(-1, keepdim=True) - 1
            out = model(token, attention_mask=mask, position_ids=positions, **{CACHE: out[CACHE]})
            parts.append(out.logits)
        logits.append(torch.cat(parts, dim=1))
    real = torch.cat([batch["attention_mask"], torch.ones(3, decoded)], dim=1).bool()
    return float((logits[0] - logits[1])[real].abs().max())


def test_sdpa_equals_eager(client):
    assert attention_difference(client, "sdpa") < 1e-5


@pytest.mark.slow
def test_flex_attention_equals_eager(client):
    with torch.compiler.set_stance("force_eager"):
        assert attention_difference(client, "flex_attention") < 1e-5


@pytest.mark.slow
def test_compiled_flex_attention_equals_eager(client):
    """Whole rows: for a decoding step on a CPU, PyTorch 2.13 writes C++ that no compiler takes."""
    if shutil.which("g++") is None:
        pytest.skip("its kernel for CPUs needs g++")
    torch._dynamo.reset()
    assert attention_difference(client, "flex_attention", decoded=0) < 1e-5


@torch.no_grad()
def test_the_attention_of_a_server(client):
    """As vLLM's backend calls a model: with its own attention, which finds its caches in an argument of the model."""
    asked = []

    def attention(module, query, key, value, attention_mask, scaling, caches=None, **kwargs):
        assert attention_mask is None  # the server knows which tokens see each other
        asked.append(caches[module.layer_idx])
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return context.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("server", attention)
    ids, layers = client.ids(1, 9), client.config.num_hidden_layers
    wanted = client.load(AutoModel)(ids).last_hidden_state
    model = client.load(AutoModel, attn_implementation="server")
    assert model.is_backend_compatible()
    inputs = {"position_ids": torch.arange(9)[None], "caches": {i: f"cache {i}" for i in range(layers)}}
    out = model(input_ids=ids, use_cache=False, return_dict=False, **inputs)[0]
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)
    assert asked == [f"cache {i}" for i in range(layers)]


def generated(client, model=None, **options) -> torch.Tensor:
    model = client.load() if model is None else model
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(**client.padded(), **options)


MODES = {
    "uncached": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 8},
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_generation_is_the_same_in_every_mode(client, mode):
    plain = generated(client)
    if mode == "prompt lookup":
        options = {"max_new_tokens": 20, "do_sample": False}  # transformers 5.4 needs an end of text here
        ids = client.ids(1, 24)
        model = client.load()
        assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, **MODES[mode]))
    else:
        assert torch.equal(generated(client, **MODES[mode]), plain)


class Stream:
    """In place of the CUDA stream on which transformers moves the layers of a cache."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches(client, monkeypatch, implementation):
    """On a CPU nothing would move: here a layer's keys and values are NaN between its uses."""
    away = {}

    def offload(layer):
        away[id(layer)] = layer.keys, layer.values
        layer.keys, layer.values = (torch.full_like(x, float("nan")) for x in away[id(layer)])

    def prefetch(layer):
        if id(layer) in away:
            layer.keys, layer.values = away.pop(id(layer))

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "prefetch", prefetch)
    new = generated(client, cache_implementation=implementation, disable_compile=True)
    assert away
    assert torch.equal(new, generated(client))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 7}, {"num_beams": 2, "do_sample": True, "num_return_sequences": 2}],
    ids=["beams", "sampling", "sampled beams"],
)
def test_generation_repeats(client, options):
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(generated(client, use_cache=use_cache, **options))
    assert torch.equal(*runs)


def test_assisted_generation(client):
    model, ids = client.load(), client.ids(1, 12)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options, assistant_model=client.load()), model.generate(ids, **options))


def test_generation_from_embeddings(client):
    model, ids = client.load(), client.ids(2, 12)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    new = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(new, model.generate(ids, **options)[:, 12:])


def test_stop_strings(client):
    model, inputs = client.load(), client.tokenizer("def f(x):\n", return_tensors="pt")

    def text(**options) -> str:
        rows = model.generate(
            **inputs, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
        return client.tokenizer.decode(rows[0, inputs.input_ids.shape[1] :])

    free = text()
    stop = next(letter for letter in free[1:-5] if letter.isascii() and letter.isprintable())
    stopped = text(stop_strings=stop, tokenizer=client.tokenizer)
    assert free.startswith(stopped)
    assert stop in stopped
    assert len(stopped) < len(free)


@pytest.mark.parametrize("padding", [0, 7])
def test_generation_stops_at_the_position_table(ours, padding):
    """The control has no table, and continues."""
    model, limit = ours.load(), ours.config.max_position_embeddings
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[:, :padding] = 0
    options = {"max_new_tokens": 10_000, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for inputs in ({"input_ids": ours.ids(2, 16)}, {"inputs_embeds": model.get_input_embeddings()(ours.ids(2, 16))}):
        with pytest.warns(UserWarning, match="max_position_embeddings"):
            rows = model.generate(**inputs, attention_mask=mask, **options)
        assert rows.shape[1] == limit + padding - (16 if "inputs_embeds" in inputs else 0)


def test_the_tokenizer_belongs_to_the_model(ours):
    tokenizer, config = ours.tokenizer, ours.config
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert tokenizer.pad_token_id == config.pad_token_id == ours.load().generation_config.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    ids = [[*tokenizer("def f(x):").input_ids, tokenizer.eos_token_id], tokenizer("x").input_ids]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in ids])
    assert batch["labels"][0].tolist() == ids[0]  # the end of a text is a target
    assert batch["labels"][1, :-1].eq(-100).all()
    assert batch["attention_mask"][1].tolist() == [0] * (len(ids[0]) - len(ids[1])) + [1] * len(ids[1])


def test_the_config_names_its_writer(ours):
    written = json.loads((ours.folder / "config.json").read_text())
    assert written["transformers_version"]
    assert json.loads((ours.folder / "generation_config.json").read_text())["transformers_version"]
    assert written["use_cache"] is True


@torch.no_grad()
def test_copies(client):
    model, batch = client.load(), client.padded()
    wanted = model(**batch).logits
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(made(**batch).logits, wanted)  # bits depend on where memory begins
        made.lm_head.weight.zero_()
    assert torch.equal(model(**batch).logits, wanted)

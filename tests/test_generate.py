"""Decoding on the latent cache: the same tokens as the full forward pass, in batches of any lengths."""

from __future__ import annotations

import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import CustomLLM, UserError
from jaxllm import evaluate as evaluation
from jaxllm import generate as generation
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.model import decoding
from jaxllm.model.attention import Latents
from jaxllm.model.decoding import STREAMED_TOKENS, Sampling, generate, sample_token, stream
from jaxllm.model.kernels import REPLACEABLE
from tests.configs import small

SMALL = small(
    vocab_size=311, hidden_size=64, num_attention_heads=4, moe_intermediate_size=32, max_position_embeddings=256,
    final_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> CustomLLM:
    model = CustomLLM(SMALL, rngs=nnx.Rngs(0))
    bias = model.decoder_layers.mlp.routing_bias
    bias[...] = 0.1 * jax.random.normal(jax.random.key(5), bias[...].shape)
    return model


def greedy_by_full_forward(model: CustomLLM, prompt: list[int], count: int) -> list[int]:
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
    ids = np.zeros((1, 256), np.int32)  # padding on the right is invisible to what comes before it
    ids[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + count):
        ids[0, length] = int(forward(state, ids)[0, length - 1].argmax())
    return ids[0, len(prompt) : len(prompt) + count].tolist()


def test_greedy_equals_the_full_forward_for_200_tokens(model):
    prompt = [5, 17, 300]
    assert generate(model, [prompt], 200) == [greedy_by_full_forward(model, prompt, 200)]


@pytest.mark.slow  # the ladder decodes prompts of several lengths
def test_prompts_of_different_lengths_do_not_disturb_each_other(model):
    prompts = [[1], list(range(40)), [9, 8, 7, 6, 5]]
    together = generate(model, prompts, 20)
    assert together == [generate(model, [prompt], 20)[0] for prompt in prompts]


def test_stops_at_the_end_of_sequence(model):
    plain = generate(model, [[5, 17, 300]], 30)[0]
    end = plain[10]
    assert generate(model, [[5, 17, 300]], 30, eos_token_ids=[end])[0] == plain[: plain.index(end)]


def test_a_seed_repeats_and_another_differs(model):
    sampling = Sampling(temperature=1.0)
    first = generate(model, [[1, 2]], 30, sampling, seed=1)
    assert generate(model, [[1, 2]], 30, sampling, seed=1) == first
    assert generate(model, [[1, 2]], 30, sampling, seed=2) != first


def test_a_cached_token_is_smaller_than_its_keys_and_values(model):
    _, record = model.hidden_states(jnp.zeros((1, 10), jnp.int32), keep_latents=True)
    assert isinstance(record.latents, Latents)
    numbers = sum(leaf.size for leaf in record.latents) / (10 * SMALL.num_hidden_layers)
    assert numbers == SMALL.kv_latent_size + SMALL.num_attention_heads * SMALL.rope_head_dim
    assert numbers <= 0.4 * 2 * SMALL.hidden_size


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=0.0), {3}),
        (Sampling(temperature=1.0, top_k=1), {3}),
        (Sampling(temperature=1.0, top_k=2), {2, 3}),
        (Sampling(temperature=1.0, top_p=0.5), {3}),
        (Sampling(temperature=1.0, top_p=0.8), {2, 3}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.62), {3}),  # of the three: 0.63, 0.26, 0.11
        (Sampling(temperature=1.0, top_k=10**9), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_p=1e-38), {3}),
        (Sampling(temperature=1e-4), {3}),
        (Sampling(temperature=1.0), {0, 1, 2, 3}),
    ],
)
def test_sampling_is_limited_to_the_likeliest_tokens(sampling, possible):
    probabilities = jnp.asarray([0.05, 0.1, 0.25, 0.6])
    logits = jnp.broadcast_to(jnp.log(probabilities), (2000, 4))
    chosen = drawn(sampling, logits)
    assert set(chosen) == possible
    if len(possible) == 4:
        np.testing.assert_allclose(np.bincount(chosen) / 2000, probabilities, atol=0.04)


def drawn(sampling: Sampling, logits) -> np.ndarray:
    return np.asarray(sample_token(sampling.kind, sampling.numbers(), jnp.asarray(logits), jax.random.key(0)))


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=2), {1, 2}),
        (Sampling(top_k=4), {0, 1, 2, 4}),
        (Sampling(top_p=0.1), {1}),
        (Sampling(top_p=0.5), {1, 2}),
    ],
)
def test_of_equal_tokens_the_first_ones_stay_as_in_greedy_choice(sampling, possible):
    logits = np.broadcast_to(np.asarray([1.0, 2.0, 2.0, 0.0, 2.0], np.float32), (2000, 5))
    assert drawn(Sampling(temperature=0.0), logits)[0] == 1
    assert set(drawn(sampling, logits)) == possible


def test_other_sampling_numbers_compile_nothing(model):
    def count() -> int:
        return decoding._first_token._cache_size() + decoding._more_tokens._cache_size()

    generate(model, [[1, 2]], 9, Sampling(0.7, 3, 0.9))
    compiled = count()
    for numbers in ((0.3, 3, 0.9), (0.7, 100, 0.9), (1.3, 0, 0.5)):
        generate(model, [[1, 2]], 9, Sampling(*numbers))
    assert count() == compiled


@pytest.mark.parametrize("temperature", [1e-38, 1e-5, float("nan"), float("inf"), 1e300, -1.0])
def test_a_temperature_that_cannot_be_computed_with_is_refused(temperature, capsys):
    said = f"temperature is {temperature}: it must be"
    with pytest.raises(UserError, match=re.escape(said)):
        Sampling(temperature=temperature)
    assert generation.main(["nowhere", f"--temperature={temperature}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_seeds_beyond_the_range_are_refused(model, capsys):
    assert generation.main(["nowhere", "--seed", "12345678901234567890123"]) == 2
    assert capsys.readouterr().err.startswith("error: seed is 12345678901234567890123: it must be at most")
    for seed in (2**63, -1):
        with pytest.raises(UserError, match="seed is"):
            generate(model, [[1]], 5, seed=seed)
    last = 2**63 - 1
    assert len(joined(stream(model, [1, 2], 30, Sampling(), seed=last, eos_token_ids=()))) == 30


def test_too_long_is_refused(model):
    with pytest.raises(UserError, match=r"max_new_tokens is 250.*at most 246"):
        generate(model, [[1] * 10], 250)
    for length in (256, 473):
        with pytest.raises(UserError, match=f"prompt has {length} tokens.*at most 255"):
            generate(model, [[1] * length], 1)
    with pytest.raises(UserError, match="prompt is empty"):
        generate(model, [[]], 5)


def test_command_line_continues_prompts(run, capsys):
    arguments = [str(run), "--prompt", "def ", "class ", "--max-new-tokens", "5", "--greedy"]
    assert generation.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("def ")
    assert "\nclass " in first
    assert generation.main(arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--greedy", "--temperature", "0.5"], "temperature is 0.5, and greedy is set"),
        (["--greedy", "--temperature", "0.8"], "temperature is 0.8, and greedy is set"),  # the default
        (["--greedy", "--top-p", "0.95"], "top_p is 0.95, and greedy is set"),
        (["--greedy", "--top-k", "5"], "top_k is 5, and greedy is set"),
        (["--temperature", "0", "--top-k", "0"], "top_k is 0, and temperature is 0"),
        (["--temperature", "0", "--top-p", "0.5"], "top_p is 0.5, and temperature is 0"),
    ],
)
def test_what_greedy_choice_ignores_is_refused(given, named, run, capsys):
    assert generation.main([str(run), *given]) == 2
    assert f"error: {named}, which ignores it" in capsys.readouterr().err


@pytest.mark.parametrize("command", [generation.main, evaluation.main])
def test_kernels_are_chosen_as_in_training(command, run, monkeypatch):
    """As the self-check advises."""
    asked = []
    monkeypatch.setattr(
        generation, "kernels_to_avoid", lambda config, dtype, option: asked.append(option) or REPLACEABLE
    )

    def stop(_: str):
        raise UserError("the model is loaded")

    monkeypatch.setattr(generation, "load_tokenizer", stop)
    monkeypatch.setattr(evaluation, "load_tokenizer", stop)
    assert command([str(run), "--kernels", "plain"]) == 2
    assert asked == ["plain"]


def joined(parts) -> list[int]:
    return [token for part in parts for token in part]


ALIKE = [Sampling(0.0), Sampling(1.0)]


@pytest.mark.parametrize(
    "sampling", [*(pytest.param(one, marks=pytest.mark.slow) for one in ALIKE), Sampling(0.8, top_k=50, top_p=0.9)]
)
@pytest.mark.parametrize(
    "count", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, STREAMED_TOKENS, 30)), STREAMED_TOKENS + 1]
)
def test_stream_and_generate_give_the_same_tokens_with_the_same_seed(count, sampling, model):
    prompt = [5, 17, 300]
    parts = list(stream(model, prompt, count, sampling, seed=7, eos_token_ids=()))
    whole = generate(model, [prompt], count, sampling, seed=7)[0]
    assert joined(parts) == whole
    assert [len(part) for part in parts] == [min(STREAMED_TOKENS, count - i) for i in range(0, count, STREAMED_TOKENS)]
    end = whole[-1]  # also the last token of a part
    stopped = joined(stream(model, prompt, 30, sampling, seed=7, eos_token_ids=[end]))
    assert stopped == generate(model, [prompt], 30, sampling, seed=7, eos_token_ids=[end])[0]
    assert len(stopped) < count


def test_a_stream_reads_its_prompt_once(model, monkeypatch):
    read, first_token = [], decoding._first_token
    monkeypatch.setattr(decoding, "_first_token", lambda *args: read.append(args) or first_token(*args))
    assert len(joined(stream(model, [5, 17], 30, Sampling(0.0), seed=0, eos_token_ids=()))) == 30
    assert len(read) == 1


def test_a_stream_ends_at_the_model_s_last_position(model):
    for length, room in ((250, 6), (256, 0), (300, 0)):
        assert len(joined(stream(model, [1] * length, 30, Sampling(0.0), seed=0, eos_token_ids=()))) == room


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"])
def test_chat_answers_lines_until_they_end(template, run, capsys, monkeypatch):
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    tokenizer.chat_template = template
    monkeypatch.setattr(generation, "load_tokenizer", lambda _: tokenizer)
    prompts, answer = [], generation.stream

    def recorded(model, ids, *args, **options):
        assert tokenizer.eos_token_id not in ids  # also where it is typed
        prompts.append(tokenizer.decode(ids))
        return answer(model, ids, *args, **options)

    monkeypatch.setattr(generation, "stream", recorded)
    monkeypatch.setattr("sys.stdin", io.StringIO("def f\nx = 1\n" + "y" * 9 + "\n<|endoftext|>\n"))
    assert generation.main([str(run), "--chat", "--greedy", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.count("> ") == 5
    assert len(prompts) == 4
    assert "<|endoftext|>" in prompts[3]
    if template is None:
        assert prompts == ["def f", "x = 1", "y" * 9, "<|endoftext|>"]
    else:
        assert prompts[0] == "u:def f;a:"
        assert prompts[1].startswith("u:def f;a:")
        assert prompts[1].endswith(";u:x = 1;a:")
        assert len(tokenizer(prompts[2])["input_ids"]) + 4 <= 64

"""Rows for decoding: tokens per second, the share of the memory's speed, the first token, the bytes of the cache."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.finding import Finding, at_least, at_most, compare
from benchmarks.session import Session
from benchmarks.sizes import MODEL, PRECISIONS, DecodingSizes, decode_model
from benchmarks.timing import Runs, Spread, contenders_of, fastest, interleave, seconds
from benchmarks.worker import Failure, Run
from jaxllm.config import ModelConfig
from jaxllm.model import flops


def decode(session: Session) -> list[Finding]:
    """On a CPU, both sides in their fastest precision."""
    new, long = (4, 64) if session.quick else (64, 1024)
    tiny = {"one row": DecodingSizes(1, 32, new)}
    work = tiny | {
        "first token": DecodingSizes(1, 32, 1),
        "eight rows": DecodingSizes(8, 32, new),
        "first tokens": DecodingSizes(8, 32, 1),
        "long prompt": DecodingSizes(1, long, 1),
    }
    runs, _, _ = _in_turns(session, "tiny", tiny)
    speed = "{rate:,.1f} tokens/s"  # of all new tokens, the pass over the prompt included
    findings = [_compare("tiny, one row", "one row", runs, 2.0, speed, new)]
    runs, cache, read_bytes = _in_turns(session, MODEL, work)
    for key, rows in (("one row", 1), ("eight rows", 8)):
        findings.append(_compare(f"{MODEL}, {key}", key, runs, 2.0, speed, rows * new))
    for key, first in (("one row", "first token"), ("eight rows", "first tokens")):
        findings.append(_share_of_memory(session.quick, key, first, work[key], runs, read_bytes))
    what = f"{MODEL}, first token after {long:,}"
    findings.append(_compare(what, "long prompt", runs, 1.0, "{s:,.2f} s"))
    config = decode_model(MODEL, session.quick)
    full = 2 * config.num_hidden_layers * config.hidden_size * 4
    sizes, share = (f"{cache:,.0f} bytes", f"{full:,.0f} bytes"), cache / full
    return [*findings, Finding(f"{MODEL}, cache of a token", *sizes, share, at_most(0.4))]


def _in_turns(session: Session, name: str, work: Mapping[str, DecodingSizes]) -> tuple[Runs, float, int]:
    """The runs of both sides, and bytes: of the cache of a token, and of what `yardstick read` reads."""
    arguments: dict[str, Any] = {"name": name, "work": work, "quick": session.quick}
    with (  # one prepares after the other: both at once would take all memory
        session.jax("decoding", precisions=PRECISIONS, shared=True, **arguments) as jax,
        session.torch("decoding", **arguments) as torch,
    ):
        runs = interleave(contenders_of(ours=jax, yardstick=torch), session.rounds)
    return runs, jax.facts["cache_bytes"], torch.facts["read_bytes"]


def _best(side: str, key: str, runs: Runs) -> str:
    """The contender of a side that does `key` in its fastest precision."""
    return fastest(runs, [f"{side} {key} {precision}" for precision in PRECISIONS])


def _compare(what: str, key: str, runs: Runs, limit: float, show: str, tokens: int = 1) -> Finding:
    best = [_best(side, key, runs) for side in ("ours", "yardstick")]
    shows = [f"{show} {name.split()[-1]}" for name in best]
    of_key = {name: side for name, side in runs.items() if f" {key} " in name}
    return compare(what, of_key, *best, at_least(limit), *shows, work=tokens)


def _share_of_memory(quick: bool, key: str, first: str, sizes: DecodingSizes, runs: Runs, read_bytes: int) -> Finding:
    """The bytes of weights that a token needs, over what the memory reads in the time that it takes."""
    best = _best("ours", key, runs)
    precision = best.split()[-1]
    taken = step_seconds(runs[best], runs[f"ours {first} {precision}"], sizes.new - 1, quick)
    config, bytes_each = decode_model(MODEL, quick), 4 if precision == "float32" else 2
    # of rows whose tokens choose their experts at random
    idle = (1 - config.num_experts_per_tok / config.n_routed_experts) ** sizes.batch
    needed = bytes_each * parameters_read(config, config.n_routed_experts * (1 - idle))
    a_byte = {
        "ours": [run.per(needed, step) for run, step in zip(runs[best], taken, strict=True)],
        "read": [run.per(read_bytes) for run in runs["yardstick read"]],
    }
    what, each = f"{MODEL}, {key}, share of the memory's speed", 1e3 * Spread.of(taken).median
    shows = (f"{{rate:,.1f}} GB/s ({each:,.0f} ms a step)", "{rate:,.1f} GB/s (a sum)")
    return compare(what, a_byte, "ours", "read", at_least(0.6), *shows, work=1e-9)


def decode_on_gpu(session: Session) -> list[Finding]:
    """Weights in bfloat16: the time to the first token, and the tokens after it."""
    config = decode_model(MODEL, session.quick)
    sizes = [DecodingSizes(2, 32, 32)] if session.quick else [DecodingSizes(1, 1024, 128), DecodingSizes(64, 128, 128)]
    work = {f"{s.batch} {key}": s._replace(new=new) for s in sizes for key, new in (("first", 1), ("all", 1 + s.new))}
    options = {"name": MODEL, "work": work, "quick": session.quick, "precisions": ["bfloat16"], "shared": False}
    with session.jax("decoding", **options) as jax:
        runs = interleave(contenders_of(ours=jax), session.rounds)
    findings = []
    for s in sizes:
        first, whole = (runs[f"ours {s.batch} {key} bfloat16"] for key in ("first", "all"))
        prefill, token = seconds(first), Spread.of(step_seconds(whole, first, s.new, session.quick)).median
        needed = bytes_of_a_token(config, s, weight_bytes=2, cache_bytes=jax.facts["cache_bytes"])
        floor = needed / session.bytes_per_second if session.bytes_per_second else None
        speed = f"{s.batch / token:,.0f} tokens/s ({1e3 * token:,.2f} ms a step)"
        read = f"{needed / 1e9:,.2f} GB to read" + (f": {1e3 * floor:,.2f} ms" if floor else "")
        figures, share = {"seconds_a_step": token, "bytes_a_step": needed}, floor / token if floor else None
        what, times = f"first token after {s.prompt:,}, batch {s.batch}", {"seconds": prefill._asdict()}
        findings += [
            Finding(what, f"{1e3 * prefill.median:,.1f} ms", details=times),
            Finding(f"{s.new} tokens after it, batch {s.batch}", speed, read, share, details=figures),
        ]
    return findings


def step_seconds(whole: Sequence[Run], first: Sequence[Run], steps: int, quick: bool) -> list[float]:
    """The time of a decoding step in each round: of the tokens after the first one.

    With `quick` it is the absolute value: so few steps of a small model take less than the noise.
    """
    taken = [(a.seconds - b.seconds) / steps for a, b in zip(whole, first, strict=True)]
    if quick:
        return [abs(step) for step in taken]
    if min(taken) <= 0:
        raise Failure(f"{steps} more tokens took no longer than the first: other programs disturb it")
    return taken


def bytes_of_a_token(config: ModelConfig, sizes: DecodingSizes, weight_bytes: float, cache_bytes: float) -> float:
    """The least that decoding one token of each row reads: every weight that it uses, and the cache of the rows.

    `weight_bytes` are those of one parameter, `cache_bytes` those of one token of one row, over all layers.
    """
    experts = min(config.n_routed_experts, sizes.batch * config.num_experts_per_tok)  # of a layer, at most
    length = sizes.prompt + sizes.new / 2
    return parameters_read(config, experts) * weight_bytes + sizes.batch * length * cache_bytes


def parameters_read(config: ModelConfig, experts: float) -> float:
    """Parameters that a step of decoding reads that uses so many routed experts of a layer; no rows of tables."""
    read: dict[str, float] = dict(flops.parameters(config))
    read["routed_experts"] *= experts / config.n_routed_experts
    read["position_embeddings"] = 0
    if not config.tie_word_embeddings:
        read["token_embeddings"] = 0
    return sum(read.values())

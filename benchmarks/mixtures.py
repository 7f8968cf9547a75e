"""Rows for the mixture of experts: the cost of routing relative to dense experts."""

from benchmarks.finding import Finding, at_most, compare
from benchmarks.session import Session
from benchmarks.sizes import PRECISIONS, MixtureSizes, mixture_sizes
from benchmarks.timing import Runs, interleave, ready, seconds

LIMITS = {"random": 1.15, "skewed": 1.6}

MILLISECONDS = "{ms:,.4g} ms"


def against_dense(session: Session) -> list[Finding]:
    s = mixture_sizes(session.quick, session.gpu)
    flops = 3 * s.tokens * s.per_token * 3 * 2 * s.hidden * s.expert_hidden
    findings = []
    for dtype in ["bfloat16"] if session.gpu else PRECISIONS:
        runs = _in_turns(session, ("random", "dense", "skewed"), experts=(s, dtype))
        gflops = {name: flops / seconds(side).median / 1e9 for name, side in runs.items()}
        label = f"N={s.tokens:,} D={s.hidden:,} F={s.expert_hidden:,}" if session.gpu else dtype
        shows = (MILLISECONDS, f"{s.per_token} dense experts {MILLISECONDS}" if session.gpu else MILLISECONDS)
        for routing, limit in LIMITS.items():
            what, names = f"{routing} routing, {label}", (f"experts {routing}", "experts dense")
            findings.append(compare(what, runs, *names, at_most(limit), *shows, gflops=gflops))
    return findings


def many_experts(session: Session) -> list[Finding]:
    """8 and 64 experts: at the sizes of `against_dense`, and with smaller experts and more tokens."""
    coarse = mixture_sizes(session.quick, gpu=False)
    fine = coarse if session.quick else coarse._replace(tokens=4096, expert_hidden=512)
    findings = []
    for s in (coarse, fine):
        cases = {name: (s._replace(experts=experts), "float32") for name, experts in (("few", 8), ("many", 64))}
        runs = _in_turns(session, ("random",), **cases)
        what = f"N={s.tokens} D={s.hidden} F={s.expert_hidden}, float32"
        findings.append(compare(what, runs, "many random", "few random", at_most(1.7), MILLISECONDS))
    return findings


def _in_turns(session: Session, kinds: tuple[str, ...], **cases: tuple[MixtureSizes, str]) -> Runs:
    """Runs of each kind in each case. They take a fraction of a second, so there are more of them."""
    workers = {name: session.jax("mixture", shape=list(s), dtype=dtype) for name, (s, dtype) in cases.items()}
    with ready(**workers) as contenders:
        chosen = {f"{name} {kind}": contenders[f"{name} {kind}"] for name in cases for kind in kinds}
        return interleave(chosen, 3 * session.rounds, warmups=2)

"""Propose a mapping: modules aligned by order of execution and shapes, then their tensors by role."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from parity_tests.engine.mapping import CONVOLUTIONS, Entry, Operation, TensorMap, regroups
from parity_tests.engine.record import Module

Shape = tuple[int, ...]

_ROLES = {
    "bias": {"bias", "b", "beta", "offset"},
    "mean": {"mean", "running_mean"},
    "variance": {"var", "running_var", "variance"},
}
_MATRICES = {
    "kernel", "weight", "embedding", "w", "scale", "gamma", "g", "table", "input_embedding", "embed",
}  # fmt: skip

_SAME_WORD = {
    "q": "query", "k": "key", "v": "value", "o": "out", "output": "out", "wq": "query", "wk": "key", "wv": "value",
    "wo": "out", "ln": "norm", "layernorm": "norm", "rmsnorm": "norm", "bn": "norm", "batchnorm": "norm",
    "layernorms": "norm", "wte": "embed", "embedding": "embed", "embeddings": "embed", "embedder": "embed",
    "tok": "token", "wpe": "position", "pos": "position", "fc": "dense", "linear": "dense", "convolution": "conv",
    "w1": "gate", "w3": "up", "w2": "down", "attention": "attn", "self": "", "proj": "", "c": "", "h": "layer",
    "layers": "layer", "blocks": "layer", "block": "layer", "unembed": "head",
}  # fmt: skip
_CLEAR = {"query", "key", "value", "out", "gate", "up", "down"}
_GENERIC = {"layer"}.union(_MATRICES, *_ROLES.values())
"""Words that any tensor may have."""


class Unit(NamedTuple):
    """A module as it is aligned: one iteration of a scan is a module of its own, without the stacked axis."""

    module: Module
    tensors: dict[str, Shape]
    words: Counter[str]


class Match(NamedTuple):
    jax: str
    torch: str
    iteration: int | None


def propose(
    jax_modules: list[Module],
    torch_modules: list[Module],
    jax_shapes: Mapping[str, Shape],
    torch_shapes: Mapping[str, Shape],
    aliases: Mapping[str, str],
) -> TensorMap:
    """A mapping from names, shapes and the order of execution. What it cannot tell is in `unsure`, or left out."""
    ours = [_unit(module, jax_shapes) for module in jax_modules]
    theirs = [_unit(module, torch_shapes) for module in _with_aliases(torch_modules, aliases, torch_shapes)]
    pairs = _by_names(_aligned(ours, theirs))
    used = {id(unit) for pair in pairs for unit in pair}
    rest = [unit for unit in ours if id(unit) not in used], [unit for unit in theirs if id(unit) not in used]
    pairs += _by_names(_aligned_anyhow(*rest))
    matches: list[tuple[Match, Unit, Unit]] = []
    for one, other in pairs:
        for jax, torch in _tensor_pairs(one, other):
            matches.append((Match(jax, torch, one.module.iteration), one, other))
    found = _entries(matches, jax_shapes, torch_shapes, aliases)
    _add_stacks(found, jax_shapes, torch_shapes)
    return found


def _with_aliases(modules: list[Module], aliases: Mapping[str, str], shapes: Mapping[str, Shape]) -> list[Module]:
    """A tied head is a module too: JAX may have a tensor of its own there."""
    known = {module.path for module in modules}
    heads = {name.rpartition(".")[0]: name for name, first in aliases.items() if first in shapes}
    return [*modules, *(Module(path, "tied", [name]) for path, name in heads.items() if path not in known)]


def _unit(module: Module, shapes: Mapping[str, Shape]) -> Unit:
    skipped = 0 if module.iteration is None else 1
    tensors = {name: shapes[name][skipped:] for name in module.own if name in shapes}
    return Unit(module, tensors, _words(module.path, module.iteration))


def _words(path: str, iteration: int | None = None) -> Counter[str]:
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", path)
    words = [word for word in re.split(r"[._]|(?<=[a-zA-Z])(?=\d+$)", spaced.lower()) if word]
    known = [_SAME_WORD.get(word, word) for word in words]
    numbers = [] if iteration is None else [str(iteration)]
    return Counter([word for word in known if word] + numbers)


def _likeness(one: Unit, other: Unit) -> float:
    both, either = (one.words & other.words).total(), (one.words | other.words).total()
    return both / either if either else 0.0


def _same_last_word(one: Unit, other: Unit) -> float:
    """Whether the last parts of two paths say the same of the few words that are clear.

    Others mislead: `attention_norm` is before the attention here and `post_attention_norm` after it there.
    """
    mine, its = (_CLEAR & {*_words(unit.module.path.rpartition(".")[2])} for unit in (one, other))
    return float(bool(mine) and mine == its)


def role(name: str) -> str:
    last = re.split(r"[._]", name)[-1] if name.rpartition(".")[2] not in _MATRICES else name.rpartition(".")[2]
    full = name.rpartition(".")[2]
    for kind, names in _ROLES.items():
        if full in names or last in names:
            return kind
    if full in _MATRICES or last in _MATRICES:
        return "weight"
    return full.lower()


def relations(jax: Shape, torch: Shape) -> list[tuple[Operation, ...]]:
    """The ways in which a tensor of JAX can be one of PyTorch's; more than one for a square matrix."""
    found: list[tuple[Operation, ...]] = []
    if jax == torch or ((len(jax) == 1 or len(torch) == 1) and regroups(torch, jax)):
        found.append(())
    if len(torch) == 2 and len(jax) == 2 and jax == torch[::-1]:
        found.append(("T",))
    for name, axes in CONVOLUTIONS.items():
        if len(axes) == len(torch) == len(jax) and jax == tuple(torch[axis] for axis in axes):
            found.append((name,))
    if not found and len(torch) == 2 and len(jax) > 2:
        if regroups(torch[::-1], jax):
            found.append(("T",))
        if regroups(torch, jax):
            found.append(())
        if len(jax) == 3 and (jax[0] * jax[2], jax[1]) == torch:
            found.append((("reshape", (jax[0], jax[2], jax[1])), ("transpose", (0, 2, 1))))
    return found


def _tensor_pairs(one: Unit, other: Unit) -> list[tuple[str, str]]:
    """Tensors of two modules by role; a role's only tensors on both sides are partners, else their names decide."""
    found, taken = [], set()
    for name, shape in one.tensors.items():
        options = [torch for torch, its in other.tensors.items() if torch not in taken and relations(shape, its)]
        same = [torch for torch in options if role(torch) == role(name)]
        if not same and len(options) == 1 and len(one.tensors) == len(other.tensors) == 1:
            same = options
        if len(same) > 1:
            last = name.rpartition(".")[2]
            same.sort(key=lambda torch: -(_words(torch.rpartition(".")[2]) & _words(last)).total())
        if same:
            found.append((name, same[0]))
            taken.add(same[0])
    return found


def _score(one: Unit, other: Unit) -> float:
    """How well two modules fit; 0 if not at all. A module whose tensors all have a partner counts most."""
    pairs = len(_tensor_pairs(one, other))
    if not pairs:
        return 0.0
    share = 2 * pairs / (len(one.tensors) + len(other.tensors))
    return share**2 + 0.5 * _likeness(one, other)


def _aligned(ours: list[Unit], theirs: list[Unit]) -> list[tuple[Unit, Unit]]:
    """The monotone alignment of two sequences with the largest sum of scores."""
    n, m = len(ours), len(theirs)
    score, best = np.zeros((n, m)), np.zeros((n + 1, m + 1))
    for i, j in itertools.product(range(n), range(m)):
        score[i, j] = _score(ours[i], theirs[j])
    for i, j in itertools.product(reversed(range(n)), reversed(range(m))):
        paired = best[i + 1, j + 1] + score[i, j] if score[i, j] else 0.0
        best[i, j] = max(best[i + 1, j], best[i, j + 1], paired)
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        if score[i, j] and best[i, j] == best[i + 1, j + 1] + score[i, j]:
            pairs.append((ours[i], theirs[j]))
            i, j = i + 1, j + 1
        elif best[i, j] == best[i + 1, j]:
            i += 1
        else:
            j += 1
    return pairs


def _aligned_anyhow(ours: list[Unit], theirs: list[Unit]) -> list[tuple[Unit, Unit]]:
    """What the order left over, the best fit first."""
    scored = [(_score(one, other), i, j) for i, one in enumerate(ours) for j, other in enumerate(theirs)]
    pairs, left, right = [], set(), set()
    for score, i, j in sorted(scored, key=lambda found: (-found[0], found[1], found[2])):
        if score and i not in left and j not in right:
            pairs.append((ours[i], theirs[j]))
            left.add(i)
            right.add(j)
    return pairs


def _by_names(pairs: list[tuple[Unit, Unit]]) -> list[tuple[Unit, Unit]]:
    """Among neighbours of the same shapes (query, key, value; gate, up) names decide where they say more than order."""
    groups: dict[Any, list[int]] = {}
    for i, (one, other) in enumerate(pairs):
        key = (
            one.module.path.rpartition(".")[0], one.module.iteration, other.module.path.rpartition(".")[0],
            tuple(one.tensors.values()), tuple(other.tensors.values()),
        )  # fmt: skip
        groups.setdefault(key, []).append(i)
    pairs = list(pairs)
    for places in groups.values():
        if not 2 <= len(places) <= 6:
            continue
        ours, theirs = [pairs[i][0] for i in places], [pairs[i][1] for i in places]

        def total(order: tuple[int, ...], ours=ours, theirs=theirs) -> float:
            return sum(_same_last_word(one, theirs[j]) for one, j in zip(ours, order, strict=True))

        orders = list(itertools.permutations(range(len(places))))
        best = max(orders, key=total)  # the first of several, which is the order of execution
        if total(best) > total(orders[0]) + 1e-9:
            for i, one, j in zip(places, ours, best, strict=True):
                pairs[i] = one, theirs[j]
    return pairs


def _entries(
    matches: list[tuple[Match, Unit, Unit]],
    jax_shapes: Mapping[str, Shape],
    torch_shapes: Mapping[str, Shape],
    aliases: Mapping[str, str],
) -> TensorMap:
    votes: dict[Any, Counter[tuple[Operation, ...]]] = {}
    options: dict[str, list[tuple[Operation, ...]]] = {}
    kinds: dict[str, Any] = {}
    parts: dict[str, dict[int | None, str]] = {}
    for match, one, other in matches:
        torch = aliases.get(match.torch, match.torch)
        found = relations(one.tensors[match.jax], torch_shapes[torch])
        kind = one.module.kind, other.module.kind, match.jax.rpartition(".")[2], match.torch.rpartition(".")[2]
        options[match.jax], kinds[match.jax] = found, kind
        parts.setdefault(match.jax, {})[match.iteration] = torch
        if len(found) == 1:
            votes.setdefault(kind, Counter())[found[0]] += 1
    entries, unsure = {}, []
    for name, by_iteration in parts.items():
        found = options[name]
        chosen = found[0]
        if len(found) > 1:
            voted = votes.get(kinds[name])
            chosen = voted.most_common(1)[0][0] if voted else _usual(kinds[name], found)
            if not voted and not _is_usual(kinds[name]):
                said = " or ".join(" ".join(map(str, option)) or "as it is" for option in found)
                unsure.append(f"{name}: its shape {list(jax_shapes[name])} allows {said}")
        if None in by_iteration:
            entries[name] = Entry(name, (by_iteration[None],), chosen)
        elif sorted(by_iteration) == list(range(jax_shapes[name][0])):
            names = tuple(by_iteration[i] for i in range(jax_shapes[name][0]))
            entries[name] = Entry(name, names, _stacked(chosen, len(names)))
    used = {torch for entry in entries.values() for torch in entry.torch}
    return TensorMap(
        entries,
        without_jax=[name for name in torch_shapes if name not in used],
        without_torch=[name for name in jax_shapes if name not in entries],
        unsure=unsure,
        proposed=True,
    )


def _add_stacks(found: TensorMap, jax_shapes: Mapping[str, Shape], torch_shapes: Mapping[str, Shape]) -> None:
    """Partners for tensors of JAX that hold those of several modules of PyTorch, such as all experts.

    Names decide among those whose shapes fit; of equal names the one whose members are numbered last.
    """
    groups = _numbered(found.without_jax)
    fits: dict[tuple[str, str], list[tuple[Operation, ...]]] = {}
    scores: dict[tuple[str, str], tuple[int, int, int]] = {}
    for name, (pattern, members) in itertools.product(found.without_torch, groups.items()):
        number, *rest = jax_shapes[name] or (0,)
        shapes = {torch_shapes[member] for member in members}
        both = _words(name) & _words(pattern)
        telling = sum(count for word, count in both.items() if not word.isdigit() and word not in _GENERIC)
        if telling and len(members) == number and len(shapes) == 1 and (ways := relations(tuple(rest), *shapes)):
            fits[name, pattern] = ways
            scores[name, pattern] = telling, both.total(), pattern.split(".").index("*")
    for (name, pattern), score in sorted(scores.items(), key=lambda item: item[1], reverse=True):
        ways, members = fits[name, pattern], groups[pattern]
        if name in found.entries or not {*members} <= {*found.without_jax}:
            continue
        rivals = [other for (mine, other), its in scores.items() if mine == name and its == score and other != pattern]
        if any({*groups[other]} <= {*found.without_jax} for other in rivals):
            continue
        chosen = ("T",) if ("T",) in ways else ways[0]
        if len(ways) > 1:
            found.unsure.append(f"{name}: its shape {list(jax_shapes[name])} allows matrices transposed or not")
        found.entries[name] = Entry(name, members, _stacked(chosen, len(members)))
        found.without_torch.remove(name)
        found.without_jax[:] = [torch for torch in found.without_jax if torch not in members]


def _stacked(operations: tuple[Operation, ...], number: int) -> tuple[Operation, ...]:
    """The operations of one tensor, for a number of them that are stacked before."""
    moved: list[Operation] = ["stack"]
    for operation in operations:
        if isinstance(operation, tuple) and operation[0] == "reshape":
            operation = "reshape", (number, *operation[1])
        elif isinstance(operation, tuple) and operation[0] == "transpose":
            operation = "transpose", (0, *(axis + 1 for axis in operation[1]))
        moved.append(operation)
    return tuple(moved)


def _numbered(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Names that are alike but for one number, which counts from 0, in the order of the numbers."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        for digits in re.finditer(r"(?<![^.])\d+(?![^.])", name):
            pattern = f"{name[: digits.start()]}*{name[digits.end() :]}"
            groups.setdefault(pattern, {})[int(digits.group())] = name
    return {
        pattern: tuple(members[i] for i in range(len(members)))
        for pattern, members in groups.items()
        if sorted(members) == list(range(len(members)))
    }


def _is_usual(kind: Any) -> bool:
    _, torch_kind, jax_role, _ = kind
    return jax_role in ("kernel", "weight", "embedding") or torch_kind in ("Embedding", "Conv1D")


def _usual(kind: Any, found: list[tuple[Operation, ...]]) -> tuple[Operation, ...]:
    """Of a square matrix: a `kernel` is (in, out), PyTorch's `Linear` and a `weight` in equinox are (out, in)."""
    _, torch_kind, jax_role, _ = kind
    as_it_is = torch_kind in ("Embedding", "Conv1D") or jax_role in ("weight", "embedding", "bias", "scale")
    wanted = () if as_it_is else ("T",)
    return wanted if wanted in found else next((option for option in found if option), found[0])

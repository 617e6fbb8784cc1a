"""From what a file holds to the weights of a model: which of its mappings they are, and under which prefix."""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor

from segbench.errors import ModelError, unknown_name

T = TypeVar("T")
Path = tuple[str, ...]  # the keys that lead to a mapping of a checkpoint

# Entries of a checkpoint that hold the weights, the first one first.
WRAPPERS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params", "module",
    "student",
)  # fmt: skip
ALWAYS = WRAPPERS[:3]  # taken however few tensors they hold
AVERAGED = re.compile(r"(^|[_.-])(ema|swa|avg|averaged?|shadow|teacher)($|[_.-])", re.IGNORECASE)
PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel, of wrapping modules, of torch.compile
DEEPEST = 8  # mappings in each other
MOST_PREFIXES = 50  # that are tried


def unwrap(checkpoint: Mapping[Any, Any], key: str | None = None) -> dict[str, Tensor]:
    """The weights of a checkpoint, or a state dict itself.

    Where there are several, those of the model come before averaged ones (``model_ema``, ``teacher``), and a warning
    says which are taken.

    Args:
        checkpoint: a state dict, also inside other mappings.
        key: the entry that holds the wanted weights, at any depth; or a prefix of their names, without the last dot.

    Raises:
        ModelError: there are none, or several of which none is the model by its name; or an entry is no tensor.
    """
    if key is not None:
        return _under(checkpoint, key)
    found = _state_dicts(checkpoint)
    if not found:  # explain what is wrong with the entry that should be one
        inner = [checkpoint[name] for name in ALWAYS if isinstance(checkpoint.get(name), Mapping)]
        return _checked(inner[0] if inner else checkpoint)
    return _checked(found[_take(found)])


def _take(found: Mapping[Path, Mapping[str, Any]]) -> Path:
    """`_choose`, with a warning that names the others."""
    path, others = _choose(found)
    if others:
        logging.getLogger("segbench").warning(
            "The checkpoint holds weights under %s. Those of %r are taken (others: &key=%s in a spec).",
            _listed([path, *others]), _name(path), _name(others[0]),
        )  # fmt: skip
    return path


def _under(checkpoint: Mapping[Any, Any], key: str) -> dict[str, Tensor]:
    """The weights that ``key`` names."""
    node: Any = checkpoint
    for part in [key] if key in checkpoint else key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping):
        return unwrap(node)
    found = _state_dicts(checkpoint)
    if named := {path: state for path, state in found.items() if key in path}:
        return _checked(named[_take(named)])
    below: dict[Path, Mapping[str, Any]] = {}
    for path, state in found.items():
        prefix = key.removeprefix(f"{_name(path)}.") + "."  # of its entries; ``key`` may name the mapping, too
        if inner := {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}:
            place = (*path, prefix[:-1])
            below[place] = inner
    if below:
        return _checked(below[_take(below)])
    prefixes = {str(name).partition(".")[0] for state in found.values() for name in state}
    raise ModelError(unknown_name("entry of the checkpoint:", key, {_name(path) for path in found if path} or prefixes))


def _state_dicts(checkpoint: Mapping[Any, Any]) -> dict[Path, Mapping[str, Any]]:
    """All state dicts in a checkpoint, each once, the outer ones first."""
    found: dict[Path, Mapping[str, Any]] = {}
    seen, waiting = set[int](), deque[tuple[Path, Mapping[Any, Any]]]([((), checkpoint)])
    while waiting:
        path, node = waiting.popleft()
        if id(node) in seen:  # a mapping may hold itself
            continue
        seen.add(id(node))
        if path and not all(isinstance(key, str) for key in node):
            continue  # the state of an optimiser
        if _is_state_dict(node):
            found[path] = node
        elif len(path) < DEEPEST:
            waiting += [((*path, str(key)), value) for key, value in node.items() if isinstance(value, Mapping)]
    return found


def _is_state_dict(node: Mapping[Any, Any]) -> bool:
    """Whether all values are tensors, or some that have the names of parts of a module."""
    tensors = [key for key, value in node.items() if isinstance(value, Tensor)]
    return bool(tensors) and (len(tensors) == len(node) or any("." in str(key) for key in tensors))


def _choose(found: Mapping[Path, Mapping[str, Any]]) -> tuple[Path, list[Path]]:
    """Which state dict is the model, and the others that may be one too: at least half as large as the largest."""
    largest = max(map(len, found.values()))
    large = [path for path in found if path[:1] in {(name,) for name in ALWAYS} or 2 * len(found[path]) >= largest]
    raw = [path for path in large if not _is_averaged(_name(path))]
    named = [path for path in raw if set(path) & set(WRAPPERS)]
    chosen = named or raw or large
    if len(chosen) > 1 and not named:
        raise ModelError(
            f"The checkpoint holds weights under {_listed(chosen)}. Say which ones: add &key={_name(chosen[0])} to the "
            "spec, or save only those."
        )
    best = min(chosen, key=_rank)
    return best, [path for path in large if path != best]


def _rank(path: Path) -> list[int]:
    return [WRAPPERS.index(key) if key in WRAPPERS else len(WRAPPERS) for key in path]


def _is_averaged(name: str) -> bool:
    return AVERAGED.search(name) is not None


def _name(path: Path) -> str:
    return ".".join(path)


def _listed(paths: Collection[Path]) -> str:
    names = [repr(_name(path)) for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _checked(state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """A state dict, if its keys are names and its values tensors."""
    if any(not isinstance(key, str) for key in state_dict):
        raise ModelError("The weights have keys that are not names. Save model.state_dict(), or that with its wrapper.")
    if wrong := [key for key, value in state_dict.items() if not isinstance(value, Tensor)]:
        kind = type(state_dict[wrong[0]]).__name__
        raise ModelError(
            f"{wrong[0]!r} is {kind}, not a tensor ({len(wrong)} such entries). Weights are a mapping of names to "
            f"tensors, or a checkpoint with that mapping under {', '.join(map(repr, ALWAYS))}."
        )
    if not state_dict:
        raise ModelError("The weights are empty: no tensor in the file.")
    return dict(state_dict)


def strip_prefixes(state_dict: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Removes the prefixes that all keys share, whatever their order.

    >>> list(strip_prefixes({"module._orig_mod.a": 1, "module._orig_mod.b": 2}, PREFIXES))
    ['a', 'b']
    """
    state = dict(state_dict)
    while shared := [prefix for prefix in prefixes if state and all(key.startswith(prefix) for key in state)]:
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    return state


def rename(entries: Mapping[str, T], renames: tuple[tuple[str, str], ...]) -> dict[str, T]:
    """Applies regular expressions and their replacements in order to each key; ModelError if two become the same."""
    renamed: dict[str, T] = {}
    old_names: dict[str, str] = {}
    for old, value in entries.items():
        new = old
        for pattern, replacement in renames:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ModelError(f"{old_names[new]!r} and {old!r} are both {new!r}: the weights mix two layouts. Keep one.")
        renamed[new], old_names[new] = value, old
    return renamed


def fit_keys(
    state_dict: Mapping[str, Tensor],
    own: Collection[str],
    prefixes: tuple[str, ...],
    renames: tuple[tuple[str, str], ...] = (),
) -> dict[str, Tensor]:
    """Weights under the names of a model, ``own``: without the prefixes that all share, and renamed.

    Where they do not fit so, but those under another prefix do better (``model.*`` beside ``loss.weight``), these are
    taken, and a warning says what is left out.
    """
    names = set(own)
    best, chosen = rename(strip_prefixes(state_dict, prefixes), renames), ""
    if names <= best.keys():
        return _without_averaged(best, names)
    others: list[str] = []  # prefixes under which as many fit
    for prefix, entries in parts_by_prefix(state_dict, at_least=len(names) // 2).items():
        with suppress(ModelError):
            found = rename(strip_prefixes(entries, prefixes), renames)
            fitting, most = len(found.keys() & names), len(best.keys() & names)
            if fitting > most:
                best, chosen, others = found, prefix, []
            elif fitting == most and not any(prefix.startswith(known) for known in (chosen, *others)):
                others.append(prefix)
    left_out = [key for key in state_dict if not key.startswith(chosen)]
    if left_out:
        logging.getLogger("segbench").warning(
            "The weights under %r are taken; %d other entries of the file are left out: %s%s",
            chosen.removesuffix("."), len(left_out), ", ".join(left_out[:5]) + (", ..." if left_out[5:] else "."),
            f" (Those under {others[0]!r}: &key={others[0].removesuffix('.')} in a spec.)" if others else "",
        )  # fmt: skip
    return best


def _without_averaged(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Weights of a model without averaged ones beside them in the same mapping; a warning names these."""
    averaged = [key for key in state if key not in names and _is_averaged(key.partition(".")[0])]
    if averaged:
        logging.getLogger("segbench").warning(
            "%d entries beside the weights are left out: %s, ... (Those: &key=%s in a spec.)",
            len(averaged), averaged[0], averaged[0].partition(".")[0],
        )  # fmt: skip
    left_out = set(averaged)
    return {key: value for key, value in state.items() if key not in left_out}


def parts_by_prefix(state_dict: Mapping[str, T], *, at_least: int) -> dict[str, dict[str, T]]:
    """The entries below each prefix that so many have, without it; those of averaged weights last.

    >>> parts_by_prefix({"ema.a.b": 1, "net.a.b": 2, "loss": 3}, at_least=1)
    {'net.': {'a.b': 2}, 'net.a.': {'b': 2}, 'ema.': {'a.b': 1}, 'ema.a.': {'b': 1}}
    """
    counter: Counter[str] = Counter()
    for key in state_dict:
        parts = key.split(".")[:-1][:DEEPEST]
        counter.update(".".join(parts[: size + 1]) + "." for size in range(len(parts)))
    prefixes = [prefix for prefix, count in counter.items() if count >= at_least]
    return {
        prefix: {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        for prefix in sorted(prefixes, key=_is_averaged)[:MOST_PREFIXES]
    }

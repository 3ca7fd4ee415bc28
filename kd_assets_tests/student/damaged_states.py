"""States of loaders as they come back from a file that was edited, cut, or that another program wrote."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

NUMBERS: list[Any] = [True, False, -1, -(2**70), 2**70, 1.0, 0.5, float("nan")]
WRONG = [*NUMBERS, None, "", "1", [], {}, [1], {"a": 1}, {1: 2, "b": 3}]
"""What stands in the place of a value."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, within in items:
        yield (*path, key)
        yield from places(within, (*path, key))


def damaged(state: dict[str, Any], *, n_more: int = 300) -> Iterator[Any]:
    """Each value replaced by each wrong one, removed, and with something beside it; and several of it at once. What is
    equal to the state, also in its types, is left out."""
    yield from (None, [], "state", 1, {}, list(state))
    for path in places(state):
        yield from (changed(state, path, value) for value in WRONG)
        yield removed(state, path)
        yield changed(state, (*path[:-1], "other"), 1) if isinstance(path[-1], str) else removed(state, path)
        yield changed(state, (*path[:-1], 7), 1) if isinstance(path[-1], str) else removed(state, path)
    rng = random.Random(0)
    for _ in range(n_more):
        harmed: Any = state
        for path in rng.sample(list(places(state)), 2):
            if path in set(places(harmed)):
                harmed = changed(harmed, path, rng.choice(WRONG)) if rng.random() < 0.7 else removed(harmed, path)
        yield harmed


def changed(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    whole = copy.deepcopy(state)
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = copy.deepcopy(value)
    return whole


def removed(state: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    whole = copy.deepcopy(state)
    holder: Any = whole
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return whole


def is_same(one: Any, other: Any) -> bool:
    """Equal, and of equal types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)

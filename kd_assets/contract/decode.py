"""Parsed JSON as frozen dataclasses, checked field by field: what crosses the seam is understood whole or refused.

Standard library only, since the compute plane runs where nothing else is installed. An unknown field is an error, not
a field to ignore.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from kd_assets.errors import ContractError

T = TypeVar("T")

_MISFIT = object()
_AS_THEY_ARE = (int, float, str, bool)


def parse_json(data: str | bytes) -> Any:
    """A JSON value. Raises ValueError for anything else: also for NaN and infinity, which JSON lacks, and for what is
    nested too deep to be ours."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError as e:
        raise ValueError("it is nested too deep") from e


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number in JSON")


def decode(cls: type[T], raw: Any, where: str) -> T:
    """`raw` (parsed JSON) as the dataclass `cls`, checked field by field. Raises ContractError naming the field."""
    return typing.cast(T, _decode(cls, raw, where))


def _decode(expected: Any, raw: Any, where: str) -> Any:
    if expected is Any or (type(raw) is expected and expected in _AS_THEY_ARE):  # most of what there is
        return raw
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    decoded: Any = _MISFIT
    if origin is Literal and raw in args:
        decoded = raw
    elif origin in (typing.Union, types.UnionType):
        decoded = None if raw is None and type(None) in args else _decode_one_of(args, raw, where)
    elif origin is list and isinstance(raw, list):
        decoded = [_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw)]
    elif origin is tuple and isinstance(raw, list):
        decoded = tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    elif origin is dict and isinstance(raw, dict):
        # Most of a manifest is such facts: looking at each took half the time of reading it.
        decoded = dict(raw) if args[1] is Any else {k: _decode(args[1], v, f"{where}.{k}") for k, v in raw.items()}
    elif dataclasses.is_dataclass(expected) and isinstance(raw, Mapping):
        decoded = _decode_dataclass(typing.cast(type, expected), raw, where)
    elif expected is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        decoded = float(raw)
    elif expected in (int, str, bool) and type(raw) is expected:
        decoded = raw
    if decoded is _MISFIT:
        raise ContractError(f"{where}: expected {getattr(expected, '__name__', expected)}, found {raw!r:.200}")
    return decoded


def _decode_one_of(args: tuple[Any, ...], raw: Any, where: str) -> Any:
    """As the first of these types that takes it; the complaint is that of the last."""
    *others, last = (a for a in args if a is not type(None))
    for expected in others:
        with contextlib.suppress(ContractError):
            return _decode(expected, raw, where)
    return _decode(last, raw, where)


def _decode_dataclass(cls: type, raw: Mapping[str, Any], where: str) -> Any:
    hints = _type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(raw) - set(known), key=str):
        raise ContractError(f"{where}: unknown field {unknown[0]!r} for {cls.__name__}; it has {', '.join(known)}")
    missing = [
        n
        for n, f in known.items()
        if n not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ContractError(f"{where}: {cls.__name__} lacks field {missing[0]!r}")
    return cls(**{name: _decode(hints[name], value, f"{where}.{name}") for name, value in raw.items()})


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    """Evaluated once for each class: doing it for each record took three quarters of the time of reading."""
    return typing.get_type_hints(cls)

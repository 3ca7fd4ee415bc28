"""Bodies of requests: JSON that anybody may have sent, checked once and whole. Errors say what and where, and quote no
text of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_assets.contract import parse_json
from kd_assets.errors import RefusedRequestError, printable
from kd_assets.replay.index import Uint32Array

TOKEN_VARIABLE = "KD_SERVE_TOKEN"  # noqa: S105 - the name of a variable, and no token


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much one request may ask for, and how much may be under way."""

    head_timeout_s: float = 10.0
    """A connection on which no request begins for so long is closed."""
    body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    """A body that takes longer is given up."""
    answer_timeout_s: float = 300.0
    """So is an answer that its client takes longer to read."""
    sequences: int = 512
    answer_logprobs: int = 1 << 21
    """Log-probabilities in one answer: about 60 bytes each in JSON."""
    in_flight: int = 32
    """Requests that are read, answered or sent at a time; further ones are told to come again."""
    connections: int = 512
    shutdown_s: int = 30
    """Requests under way have this long to finish when the server ends."""


def parsed_object(body: bytes) -> Mapping[str, Any]:
    """The JSON object in a body. Raises RefusedRequestError for anything else, NaN and deep nesting among it."""
    try:
        raw = parse_json(body)
    except ValueError as e:
        # Not the parser's own words: they may quote the body.
        place = f" at byte {e.pos}" if hasattr(e, "pos") else ""
        raise RefusedRequestError(f"the body is no JSON{place}: send a JSON object") from e
    if not isinstance(raw, dict):
        raise RefusedRequestError(f"the body is a JSON {_kind(raw)}: send a JSON object")
    return raw


def token_ids(value: object, name: str, *, vocabulary: int) -> Uint32Array:
    """uint32 [L]. Raises RefusedRequestError unless it is a list of at least one integer from 0 to the vocabulary."""
    if not isinstance(value, list) or not value:
        raise RefusedRequestError(f"{name} is {_kind(value)}: send a list of at least one token id")
    if set(map(type, value)) != {int}:
        at = next(i for i, token_id in enumerate(value) if type(token_id) is not int)
        raise RefusedRequestError(f"{name}[{at}] is {_kind(value[at])}: token ids are whole numbers")
    if min(value) < 0 or max(value) >= vocabulary:
        at = next(i for i, token_id in enumerate(value) if not 0 <= token_id < vocabulary)
        raise RefusedRequestError(f"{name}[{at}] is no token id: they are from 0 to {vocabulary - 1}")
    return np.array(value, dtype=np.uint32)


def whole_number(value: object, name: str) -> int:
    if type(value) is not int:
        raise RefusedRequestError(f"{name} is {_kind(value)}: send a whole number")
    return value


def require_known(raw: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise RefusedRequestError for a field that is not known: it may change the answer."""
    for name in raw:
        if name not in known:
            raise RefusedRequestError(
                f"the field {printable(name)[:64]!r} is not known here, and may change the answer: leave it out"
            )


def require_answer_within(limits: Limits, n_positions: int, k: int) -> None:
    """Raise RefusedRequestError for more log-probabilities than one answer has."""
    if n_positions * (k + 1) > limits.answer_logprobs:
        raise RefusedRequestError(
            f"{n_positions} positions with {k + 1} log-probabilities each are asked for, and an answer has at most "
            f"{limits.answer_logprobs}: send fewer sequences at a time",
            status=413,
        )


_KINDS: Mapping[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a fraction",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _kind(value: object) -> str:
    """What a JSON value is, in a word or two, without its content."""
    return "an empty list" if value == [] else _KINDS[type(value)]

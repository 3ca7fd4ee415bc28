"""A source as a recipe names it: where its records are, and how each is read.

Imported by recipes and by the planner; touches no file. What came later in a spec is left out of what is hashed of it
where it is not used, so that what was made before stays what it is.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd_assets.contract import FileFormat, RecordShape
from kd_assets.errors import MissingInputError

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """A data set that `datasets` loads: of the hub, or a folder of its own files."""

    name: str
    """A hub id, or a folder when it starts with `/`, `.`, `~` or `$`."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """A branch, tag or commit; what is pinned is the commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """One of a recipe's sources: a file, several files, or a data set."""

    name: str
    """Stands in the ids of documents that bring none: letters, digits, `_`, `.`, `-`."""
    path: str | None = None
    """A file, a folder, a pattern (`*`, `?`, `[…]`, `**`), or a URL of an object store; may hold `$NAME` and `${NAME}`
    (see `resolve_path`). None: there is a `dataset`."""
    file_format: FileFormat | Literal["auto"] = "auto"
    """auto: by each file's name, jsonl where that says nothing."""
    text_field: str = "text"
    messages_field: str = "messages"
    id_field: str = "id"
    """A record without it is named after the source and its number."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of records and messages that a chat template or a loss may read, left out knowingly."""
    licence: str
    revision: str | None = None
    """Of the files, as the recipe says it; recorded."""
    # What follows came later: see `without_later_defaults`.
    dataset: DatasetSpec | None = None
    shape: RecordShape = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    """Field of the shape → the field or column that has it."""
    prefer: Literal["chosen", "rejected"] | None = None
    """Which of a preference's two answers is the document."""
    roles: dict[str, str] = field(default_factory=dict)
    """The source's own words for roles → system, developer, user, assistant, tool."""
    control_tokens: Literal["tokens", "text"] | None = None
    """What control tokens are that a plain text spells out: text, or those tokens, where texts were rendered before.
    None: text; tokens in a source that was planned first when they were that."""
    weight: float | None = None
    """Its share of the tokens of every shard, beside the weights of the others; None: its shards are its own."""
    licence_accepted: str | None = None
    """Why it may be used though its licence is unknown or not allowed; recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How records are chosen and cut into shards."""

    documents_per_shard: int = 10_000
    # What follows came later: what is not used is in no hash.
    tokens_per_shard: int | None = None
    """Shards of about this many tokens, in the place of so many documents."""
    max_documents: int | None = None
    max_tokens: int | None = None
    """About so many, counted as the plan estimates them."""
    drop_duplicates: bool = False
    """Whether exact copies of a record are left out."""
    seed: int | None = None
    """Sources are taken in stretches drawn with it; None: in the order of their records."""


_FIRST_FIELDS = {"byte_offset", "first_line", "text_field", "messages_field", "revision", "path"}
"""Fields with a default that were there from the beginning."""


def without_later_defaults(cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `SourceSpec` or `RecordRange`, as a dict, without those that came later and are not used."""
    if raw.get("file_format") == "auto":
        raw["file_format"] = "jsonl"
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        came_later = f.name in raw and f.name not in _FIRST_FIELDS and default is not dataclasses.MISSING
        if came_later and raw[f.name] == default:
            del raw[f.name]
    return raw


def resolve_path(
    path: str, base_folder: Path, *, what: str = "path", environment: Mapping[str, str] = os.environ
) -> Path:
    """`path` made absolute: `$NAME` and `${NAME}` replaced, `~` expanded, relative to `base_folder`.

    Raises MissingInputError as `with_variables` does, and for an empty path.
    """
    return absolute_path(with_variables(path, what=what, environment=environment), base_folder, what=what)


def absolute_path(resolved: str, base_folder: Path, *, what: str) -> Path:
    """A path whose variables are replaced, made absolute. (Once: what a variable stands for may have a `$` of its own.)

    Raises MissingInputError, naming `what`, for an empty path and for what no file is called.
    """
    if not resolved:
        raise MissingInputError(f"{what}: its path is empty")
    if "\0" in resolved:
        raise MissingInputError(f"{what}: its path {resolved!r} cannot be read: it holds a NUL")
    return Path(os.path.abspath(base_folder / os.path.expanduser(resolved)))


def with_variables(path: str, *, what: str, environment: Mapping[str, str]) -> str:
    """`path` with `$NAME` and `${NAME}` replaced.

    Raises MissingInputError, naming the variable and `what` (such as "source 'web'"), for a variable that is unset or
    empty: a path with a hole in it would lead somewhere else.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if value := environment.get(name):
            return value
        raise MissingInputError(
            f"{what}: the environment variable {name} of its path {path} is not set: set it where Dagster runs"
        )

    return _VARIABLE.sub(value_of, path)

"""`docs/recipe-reference.md`: every field of a recipe, from the models that a recipe is checked by.

    kd-assets fields > docs/recipe-reference.md

A field's words are the docstring under it; its type and limits are those of the JSON schema that `dg check yaml` uses.
A test holds the file against this, so that it cannot be out of date.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from kd_assets.recipes import cluster_profile, exports, models

_MODULES = (models, exports, cluster_profile)
_FIRST_WORDS = """\
# Every field of a recipe

Made from the models that recipes are checked by: `kd-assets fields > docs/recipe-reference.md`.
[A recipe](recipe.md) and [Sources](sources.md) say how the fields work together. Any field may also be a Dagster
template (`{{ env.NAME }}`).
"""


def reference(component: type[BaseModel]) -> str:
    """The page, in Markdown: fields of `component`, then those of each mapping in it in the order of first mention."""
    sections = [_FIRST_WORDS, _section("attributes", component)]
    return "\n".join([*sections, *(_section(_heading(name), model) for name, model in _models(component))])


def _section(heading: str, model: type[BaseModel]) -> str:
    return f"## {heading}\n\n{_sentence(model)}{_table(model)}"


def _models(component: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Models that a recipe is made of besides its own, by their names."""
    schema = component.model_json_schema()
    by_name = {name: getattr(module, name) for name in schema["$defs"] for module in _MODULES if hasattr(module, name)}
    seen: list[str] = []

    def visit(of: Mapping[str, Any]) -> None:
        for name in _mentioned(of.get("properties", {})):
            if name not in seen:
                seen.append(name)
                visit(schema["$defs"][name])

    visit(schema)
    for name in seen:
        yield name, by_name[name]


def _mentioned(schema: Any) -> Iterator[str]:
    """Models that a part of a schema refers to."""
    if isinstance(schema, Mapping):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference.rpartition("/")[2]
        for value in schema.values():
            yield from _mentioned(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _mentioned(value)


def _heading(model_name: str) -> str:
    """`HiddenStatesModel` is written as `hidden states`."""
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in model_name.removesuffix("Model"))
    return words.strip()


def _sentence(model: type[BaseModel]) -> str:
    said = inspect.cleandoc(model.__dict__.get("__doc__") or "")
    return f"{' '.join(said.split())}\n\n" if said else ""


def _table(model: type[BaseModel]) -> str:
    schema, docs = model.model_json_schema(), _field_docs(model)
    required = set(schema.get("required", ()))
    lines = ["| field | takes | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        if "then" in field and "else" not in field:  # a field that is there to be refused
            continue
        default = "required" if name in required else _default(field)
        lines.append(f"| `{name}` | {_takes(field)} | {default} | {docs.get(name, '')} |")
    return "\n".join(lines) + "\n"


def _field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Field → the docstring under it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            said = ast.literal_eval(after.value) if isinstance(after.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(said).split()).replace("|", "\\|")
    return found


def _default(field: Mapping[str, Any]) -> str:
    default = field.get("default")
    if default is None or isinstance(default, Mapping | list):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _takes(schema: Mapping[str, Any]) -> str:
    """A field's type and limits in words."""
    if alternatives := _alternatives(schema):
        return " or ".join(dict.fromkeys(map(_takes, alternatives)))
    if "$ref" in schema:
        heading = _heading(str(schema["$ref"]).rpartition("/")[2])
        return f"[{heading}](#{heading.replace(' ', '-')})"
    if values := schema.get("enum") or [schema[key] for key in ("const",) if key in schema]:
        return ", ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        return f"list of {_takes(schema.get('items', {}))}"
    return _WORDS.get(str(schema.get("type")), "any value") + _limits(schema)


def _alternatives(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Schemas of which a value fits any one."""
    if {"then", "else"} <= schema.keys():
        return [schema["then"], schema["else"]]
    if isinstance(kinds := schema.get("type"), list):
        return [{"type": kind} for kind in kinds]
    return [one for one in schema.get("anyOf", []) if one != {"type": "null"}]


_WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "`true` or `false`",
    "object": "mapping",
}
_LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def _limits(schema: Mapping[str, Any]) -> str:
    limits = [f"{sign} {schema[name]:,}" for name, sign in _LIMITS.items() if name in schema]
    if "multipleOf" in schema:
        limits.append(f"a multiple of {schema['multipleOf']}")
    return f" {', '.join(limits)}" if limits else ""

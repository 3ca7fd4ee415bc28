"""What is wrong with the recipes' files: every one of them, all of it at once, each with file and line.

`dg check yaml` without a path looks at the last of several files of one type, and with a file as its path at none. This
looks at every `defs.yaml` below the project's defs folder: is it YAML, has it the fields of its component, and does the
component take them. A field that is misspelt is named with the one that was meant, and what follows from it only is
left out.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pydantic
import yaml  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator, ValidationError

from kd_assets.components import TeacherCaches
from kd_assets.dagster_internals import parse_yamls_with_source_position
from kd_assets.errors import RecipeError
from kd_assets.recipes.project import project_folder

FILE_NAMES = ("defs.yaml", "defs.yml")
OTHER_SPELLINGS = {"license": "licence", "license_accepted": "licence_accepted", "allowed_licenses": "allowed_licences"}
PATTERNS = {
    r"^[A-Za-z][A-Za-z0-9_]*$": "it has letters, digits and _, and begins with a letter",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "it has letters, digits, _, . and -, and begins with a letter or a digit",
}
"""What the models' expressions for names ask for, in words."""
FIELDS_OF_A_FILE = ("type", "attributes", "requirements", "template_vars_module", "post_processing")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """Something wrong in a recipe's file."""

    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def defs_folder(project: Path | None = None) -> Path:
    """Where the recipes of a dg project are (default: of the one around the working directory).

    Raises MissingInputError where there is no project, and RecipeError where it cannot be imported.
    """
    project = project or project_folder()
    try:
        return Path(next(iter(dg.ComponentTree.for_project(project).defs_module.__path__)))
    except Exception as e:
        raise RecipeError(f"the recipes of {project} cannot be found ({innermost_cause(e)}): name their folder") from e


def recipe_files(defs_folder: Path) -> list[Path]:
    return sorted(path for name in FILE_NAMES for path in defs_folder.rglob(name))


def mistakes_in(file: Path) -> list[Mistake]:
    """All that is wrong with one file, in the order of its lines; nothing when it can be loaded."""
    try:
        return _mistakes_in(file)
    except Exception as e:  # noqa: BLE001  # whoever asks has other files to look at
        return [Mistake(file=file, line=1, what=f"it cannot be checked: {innermost_cause(e)}")]


def _mistakes_in(file: Path) -> list[Mistake]:
    try:
        documents = parse_yamls_with_source_position(file.read_text(), filename=str(file))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        mark = getattr(e, "problem_mark", None)
        problem = " ".join(str(getattr(e, "problem", None) or e).split())
        if "'\\t'" in problem:
            problem += " (YAML takes no tabs: indent by spaces)"
        return [Mistake(file=file, line=1 if mark is None else mark.line + 1, what=f"it cannot be read: {problem}")]
    if not documents:
        return [Mistake(file=file, line=1, what="it is empty")]
    found = [mistake for document in documents for mistake in _mistakes_of(file, document)]
    return sorted(found, key=lambda m: m.line)


def _mistakes_of(file: Path, document: Any) -> Iterator[Mistake]:
    def mistake(path: Sequence[str | int], what: str) -> Mistake:
        # The nearest that has a line: what is absent has none.
        for length in range(len(path), -1, -1):
            if (position := document.source_position_tree.lookup(list(path[:length]))) is not None:
                return Mistake(file=file, line=position.start.line, what=what)
        return Mistake(file=file, line=1, what=what)

    value = document.value
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        yield mistake([], "it names no type: `type: kd_assets.TeacherCaches`")
        return
    if unknown := [name for name in value if name not in FIELDS_OF_A_FILE]:
        for name in unknown:
            yield mistake([name], _unknown(str(name), FIELDS_OF_A_FILE))
        return
    try:
        component = _component_of(value["type"], file)
    except Exception as e:  # noqa: BLE001  # whatever a module of somebody's does when it is imported
        yield mistake(["type"], f"there is no component {value['type']!r}: {innermost_cause(e)}")
        return
    model = component.get_model_cls()
    if model is None:
        return
    attributes = value.get("attributes") or {}
    errors = list(Draft202012Validator(model.model_json_schema()).iter_errors(attributes))
    for path, what in _in_words(errors):
        yield mistake(["attributes", *path], what)
    if not errors and issubclass(component, TeacherCaches) and "{{" not in file.read_text():
        try:
            TeacherCaches.resolve_from_dict(attributes).to_recipe()
        except (RecipeError, ValueError, dg.DagsterError) as e:
            yield mistake(["attributes"], innermost_cause(e))


def _component_of(name: str, file: Path) -> type[dg.Component]:
    """The class that a file's `type` names: `.my_component.Mine` is in a module beside the file, as for Dagster."""
    module, _, attribute = name.rpartition(".")
    if name.startswith("."):
        module = _module_of(file.parent) + module
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, dg.Component)):
        raise TypeError(f"{name} is no component")
    return found


def _module_of(folder: Path) -> str:
    """`my_project.defs.my_teacher` of a folder in the defs folder of a dg project. Raises RecipeError elsewhere."""
    tree = dg.ComponentTree.for_project(folder)
    if not folder.absolute().is_relative_to(tree.defs_module_path.absolute()):
        raise RecipeError(
            f"a type that begins with a dot is relative to {tree.defs_module_path}, and this is not in it"
        )
    return ".".join((tree.defs_module_name, *folder.absolute().relative_to(tree.defs_module_path.absolute()).parts))


def innermost_cause(error: BaseException) -> str:
    """What is really wrong: Dagster wraps it in what was being loaded, pydantic's in its own lines."""
    while error.__cause__ is not None and not isinstance(error, RecipeError):
        error = error.__cause__
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
    return " ".join(str(error).split())


def _in_words(errors: Iterable[ValidationError]) -> Iterator[tuple[list[str | int], str]]:
    """Where and what, once each. A field that is required, and is there under a wrong name, is no second mistake."""
    misspelt: set[tuple[tuple[str | int, ...], str]] = set()
    required: list[tuple[list[str | int], str]] = []
    for error in errors:
        path = list(error.absolute_path)
        if error.validator == "additionalProperties":
            known = sorted(error.schema.get("properties", ()))
            for name in sorted(set(error.instance) - set(known), key=str):
                misspelt.add((tuple(path), _meant(str(name), known) or ""))
                yield [*path, name], _unknown(str(name), known)
        elif error.validator == "required":
            (name,) = re.findall(r"^'(.*)' is a required property", error.message) or [error.message]
            required.append((path, name))
        else:
            where = ".".join(str(part) for part in path) or "it"
            yield path, f"{where}: {_message(error)}"
    for path, name in required:
        if (tuple(path), name) not in misspelt:
            yield path, f"{'.'.join(str(part) for part in path) or 'it'} lacks {name}, which is required"


def _message(error: ValidationError) -> str:
    words = PATTERNS.get(error.validator_value) if error.validator == "pattern" else None
    return error.message if words is None else f"{error.instance!r} is no name: {words}"


def _unknown(name: str, known: Sequence[str]) -> str:
    meant = _meant(name, known)
    return f"there is no field {name}" + (f": is it {meant}?" if meant else f"; there are {', '.join(known)}")


def _meant(name: str, known: Sequence[str]) -> str | None:
    if (other := OTHER_SPELLINGS.get(name.lower())) in known:
        return other
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), None)


def same_names(files: Iterable[Path]) -> Iterator[Mistake]:
    """Two recipes of one name would share their folder in the store, and Dagster refuses their assets."""
    first: dict[str, Path] = {}
    for file in files:
        for document in parse_yamls_with_source_position(file.read_text(), filename=str(file)):
            attributes = document.value.get("attributes") if isinstance(document.value, dict) else None
            if not isinstance(attributes, dict):
                continue
            if (name := attributes.get("recipe")) is None or "TeacherCaches" not in str(document.value.get("type")):
                continue
            if name in first:
                position = document.source_position_tree.lookup(["attributes", "recipe"])
                what = f"recipe {name!r} is also the name of {first[name]}"
                yield Mistake(file=file, line=1 if position is None else position.start.line, what=what)
            first.setdefault(name, file)


def mistakes_below(defs_folder: Path) -> tuple[list[Path], list[Mistake]]:
    """All files that were looked at, and all that is wrong with them."""
    files = recipe_files(defs_folder)
    found = {file: mistakes_in(file) for file in files}
    wrong = [mistake for mistakes in found.values() for mistake in mistakes]
    return files, wrong + list(same_names(file for file in files if not found[file]))

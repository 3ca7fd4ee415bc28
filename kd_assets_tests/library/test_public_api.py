"""What programs may rely on, as a list: names, parameters, methods. `public_api.txt` is that list, to be read.

A change of it is a change for users: it belongs in CHANGELOG.md. `python -m kd_assets_tests.library.test_public_api`
prints the list as it is now.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import kd_assets
from kd_assets.components import TeacherCaches
from kd_assets.student import losses

LISTED = Path(__file__).with_name("public_api.txt")
NAMES = sorted(kd_assets._MODULE_OF)  # type: ignore[attr-defined]
"""Of `from kd_assets import NAME`."""

FIELDS = [
    "recipe",
    "description",
    "sources",
    "documents_per_shard",
    "tokens_per_shard",
    "max_documents",
    "max_tokens",
    "drop_duplicates",
    "seed",
    "long_documents",
    "overlap",
    "chat_template",
    "chat_template_kwargs",
    "tools",
    "turns",
    "allowed_licences",
    "when_space_is_short",
    "teacher",
    "caches",
    "student",
    "exports",
    "on_bad_record",
    "part_documents",
    "part_tokens",
    "jobs",
    "nightly",
]
"""Of a recipe's YAML. More of them may come, with defaults."""


def public_api() -> Iterator[str]:
    for name in NAMES:
        yield from described(name, getattr(kd_assets, name))
    for name in losses.__all__:
        yield from described(f"student.losses.{name}", getattr(losses, name))


def described(name: str, thing: Any) -> Iterator[str]:
    if thing is TeacherCaches:
        yield f"{name}: a component (its fields: FIELDS of test_public_api.py)"
    elif get_origin(thing) is Literal:
        yield f"{name}: one of {', '.join(get_args(thing))}"
    elif not inspect.isclass(thing):
        yield name + signature(thing)
    elif issubclass(thing, Exception):
        yield f"{name}: an exception"
    else:
        yield name + signature(thing)
        for method, attribute in sorted(vars(thing).items()):
            if method.startswith("_") and method not in ("__getitem__", "__iter__", "__len__"):
                continue
            if isinstance(attribute, (property, cached_property)):
                yield f"    .{method}"
            elif inspect.isroutine(attribute):
                yield f"    .{method}{signature(getattr(thing, method))}"


def signature(function: Any) -> str:
    """As it stands in the code: Python puts annotations that are not evaluated between quotes."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))


def test_the_public_names_take_what_they_are_listed_with() -> None:
    assert list(public_api()) == LISTED.read_text().splitlines()


def test_the_types_of_the_public_names_are_known() -> None:
    typed = Path(kd_assets.__file__).with_name("__init__.pyi").read_text()
    assert sorted(re.findall(r" as (\w+)$", typed, re.MULTILINE)) == NAMES
    assert Path(kd_assets.__file__).with_name("py.typed").exists()


def test_a_recipe_takes_the_fields_that_it_took() -> None:
    fields = TeacherCaches.model_fields
    assert set(FIELDS) <= set(fields)
    required = {name for name, field in fields.items() if field.is_required()}
    assert required == {"recipe", "sources", "teacher", "caches"}


def test_importing_the_package_imports_none_of_its_planes() -> None:
    program = (
        "import sys, kd_assets; print({m.partition('.')[0] for m in sys.modules} & {'torch', 'dagster', 'pyarrow'})"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_dagster_finds_the_component_and_loads_no_torch_for_it() -> None:
    program = (
        "import sys; from dagster.components.core.package_entry import discover_package_objects as found; "
        "print([key.to_typename() for key in found(['kd_assets'])], 'torch' in sys.modules)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "['kd_assets.TeacherCaches'] False"


if __name__ == "__main__":
    print("\n".join(public_api()))

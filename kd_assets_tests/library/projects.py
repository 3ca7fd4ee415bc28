"""dg projects as `create-dagster project` makes them, for recipes to live in."""

from __future__ import annotations

import json
import re
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
TEACHER, TEXTS = GOLDEN / "teacher", GOLDEN / "sources" / "texts.jsonl"

PYPROJECT = """
[project]
name = "{name}"
requires-python = ">=3.10,<3.15"
version = "0.1.0"
dependencies = ["kd-assets[control]"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "{name}"
registry_modules = ["{name}.components.*"]
"""

(DEFINITIONS,) = re.findall(
    r"^```python\n(.*?)^```",
    (Path(__file__).parents[2] / "docs" / "own-project.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
"""As the page on projects of one's own has it."""

RECIPE = """
type: {type_name}
attributes:
  recipe: {recipe}
  sources: [{{name: texts, path: {texts}, licence: CC0-1.0}}]
  documents_per_shard: 2
  teacher: {{model_id: {teacher}, dtype: float32}}
  caches: {{topk: {{k: 4, max_length: 64}}}}
"""


def make_project(folder: Path, name: str) -> Path:
    """The folder of its `defs`."""
    defs = folder / "src" / name / "defs"
    defs.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name=name))
    (defs.parent / "__init__.py").touch()
    (defs / "__init__.py").touch()
    (defs.parent / "definitions.py").write_text(DEFINITIONS)
    return defs


def add_recipe(
    defs: Path, recipe: str, *, folder: str | None = None, type_name: str = "kd_assets.TeacherCaches"
) -> Path:
    path = defs / (folder or recipe) / "defs.yaml"
    path.parent.mkdir()
    words = {"texts": json.dumps(str(TEXTS)), "teacher": json.dumps(str(TEACHER))}
    path.write_text(RECIPE.format(type_name=type_name, recipe=recipe, **words))
    return path

"""The code location of a checkout: every recipe under `defs/`, the platform they run on.

A project of one's own has a code location of its own, which loads its `defs` folder by `load_defs_folder`, too.
"""

from __future__ import annotations

import os
import re
import traceback
from collections import Counter
from functools import lru_cache
from pathlib import Path

import dagster as dg

from kd_assets.components import without_executor
from kd_assets.dagster_internals import is_of_this_load_alone
from kd_assets.errors import MissingInputError, RecipeError
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.parts import Loaded, load_parts
from kd_assets.recipes.project import is_checkout, project_folder

PACKAGE = Path(__file__).parent
STRICT = "KD_STRICT"
"""In the environment: a part that cannot be loaded fails the whole, as CI wants it (`KD_STRICT=1 dg check defs`)."""


@dg.definitions
def defs() -> dg.Definitions:
    if not is_checkout():
        raise MissingInputError(
            "kd_assets.definitions has the recipes of a checkout, and this is an installed package: load the "
            "definitions of your dg project (`dg scaffold defs kd_assets.TeacherCaches NAME` writes a recipe there)"
        )
    return load_defs_folder(PACKAGE)


def load_defs_folder(path_within_project: Path) -> dg.Definitions:
    """Everything under the `defs` folder of a dg project, as `dagster.load_from_defs_folder` has it, but that a part
    that cannot be loaded takes down itself alone: it is an asset `<folder>/not_loaded` whose description says why, with
    file and line, and so does the log. With KD_STRICT=1 in the environment it raises RecipeError with the same lines.

    Dagster itself loads all or nothing: one wrong field would empty the catalog.

    Where the folder has an executor, it is the project's; where it has none, recipes bring theirs.

    A process that asks again gets the same object for as long as folder and environment are the same: each Dagster
    command and run does, three or four times, and would wait for all of it to be loaded and resolved anew.
    """
    found = _loaded(path_within_project, _made_of(path_within_project))
    if is_of_this_load_alone():
        _loaded.cache_clear()
    return found


Stamp = tuple[str, int, int]
"""Of a file: its path, its size, and the time of its last change."""


def _made_of(path_within_project: Path) -> tuple[frozenset[tuple[str, str]], tuple[Stamp, ...]]:
    """What definitions follow from, beside the modules that this process has imported already."""
    stamps = []
    for parent, folders, names in os.walk(_defs_folder(path_within_project)):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            path = os.path.join(parent, name)
            if (status := _status(path)) is not None:
                stamps.append((path, status.st_size, status.st_ctime_ns))
    return frozenset(os.environ.items()), tuple(stamps)


@lru_cache(maxsize=1)
def _defs_folder(path_within_project: Path) -> Path:
    return dg.ComponentTree.for_project(path_within_project).defs_module_path


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # removed meanwhile, or a link that leads nowhere
        return None


@lru_cache(maxsize=1)
def _loaded(path_within_project: Path, made_of: object) -> dg.Definitions:
    with without_executor():
        loaded = load_parts(path_within_project, _definitions_of)
    found = loaded.found
    if found.executor is None and "kd_assets_platform" in (found.resources or {}):
        found = dg.Definitions.merge(found, dg.Definitions(executor=dg.in_process_executor))
    if not loaded.left_out:
        return found
    said = _why_not_loaded(loaded)
    lines = [line for lines in said.values() for line in lines]
    if os.environ.get(STRICT, "0") not in ("", "0"):
        listed = "\n".join(lines)
        raise RecipeError(f"{len(said)} parts of {loaded.folder} cannot be loaded:\n{listed}") from loaded.as_a_whole
    log = dg.get_dagster_logger()
    log.warning("not everything can be loaded together, so each part is by itself", exc_info=loaded.as_a_whole)
    for line in lines:
        log.error(line)
    specs = [_not_loaded(part, key, said[part]) for part, key in _keys(loaded).items()]
    resources = dict(found.resources or {})
    # As each recipe that can be loaded brings it: what else is in the folder may need it, too.
    platform = Platform.from_environment(project_folder(path_within_project))
    resources.setdefault("kd_assets_platform", platform.as_resource())
    return dg.Definitions.merge(found, dg.Definitions(assets=specs, resources=resources))


def _definitions_of(tree: dg.ComponentTree) -> dg.Definitions:
    found = tree.build_defs()
    keys = Counter(
        key
        for of_assets in found.assets or ()
        if isinstance(of_assets, dg.AssetsDefinition | dg.AssetSpec)
        for key in (of_assets.keys if isinstance(of_assets, dg.AssetsDefinition) else [of_assets.key])
    )
    if twice := sorted(key.to_user_string() for key, n in keys.items() if n > 1):
        raise RecipeError(f"the asset {twice[0]} is there twice: another part has it, too")
    return found


def _why_not_loaded(loaded: Loaded[dg.Definitions]) -> dict[Path, list[str]]:
    """Lines of each part: what is wrong with its files, else what it raises."""
    # Only where something is wrong: commands wait for the imports of this module.
    from kd_assets.diagnose.recipe_files import innermost_cause, mistakes_below, recipe_files

    _, mistakes = mistakes_below(loaded.folder)
    said = {}
    for part, error in loaded.left_out.items():
        files = set(recipe_files(part)) if part.is_dir() else set()
        said[part] = [str(mistake) for mistake in mistakes if mistake.file in files]
        said[part] = said[part] or [f"{_where(part, error)}: {innermost_cause(error)}"]
    return said


def _where(part: Path, error: BaseException) -> str:
    """The part, with the line of it at which it raised, where there is one."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == part]
    return f"{part}:{lines[-1]}" if lines else str(part)


def _keys(loaded: Loaded[dg.Definitions]) -> dict[Path, list[str]]:
    """Keys that Dagster takes and that no two parts have: of `my-teacher/` it is `my_teacher/not_loaded`."""
    keys: dict[Path, list[str]] = {}
    for part in loaded.left_out:
        path = part.relative_to(loaded.folder).with_suffix("" if part.suffix == ".py" else part.suffix)
        words = [re.sub(r"[^A-Za-z0-9_]+", "_", word) for word in path.parts] or [loaded.folder.name]
        n = sum(key[:-1] == words for key in keys.values())
        keys[part] = [*words, f"not_loaded_{n + 1}" if n else "not_loaded"]
    return keys


def _not_loaded(part: Path, key: list[str], said: list[str]) -> dg.AssetSpec:
    listed = "\n".join(f"- `{line}`" for line in said)
    return dg.AssetSpec(
        key,
        group_name=key[0],
        description=f"**This cannot be loaded.** `kd-assets check` says more of recipes:\n\n{listed}",
        kinds={"python" if part.suffix == ".py" else "yaml"},
        tags={"kd_assets/not_loaded": ""},
    )

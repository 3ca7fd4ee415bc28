"""What the doctor finds about a recipe's inputs: its sources, the environment variables that it names, and whether its
sources may be used. No data are read, and nothing outside this machine is asked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from kd_assets.cards.words import bytes_in_words
from kd_assets.diagnose.finding import Finding, fail, ok, safely, warn
from kd_assets.errors import MissingInputError
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe, Source
from kd_assets.sources.files.find import find_source
from kd_assets.sources.licences import decide_licence, is_unknown

VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)")


def check_variables(recipe: Recipe, platform: Platform) -> Iterator[Finding]:
    """That every variable of the recipe's paths is set here, where plans are made."""
    datasets = [s.spec.dataset.name for s in recipe.sources if s.spec.dataset is not None]
    paths = [s.spec.path for s in recipe.sources]
    words = [*paths, *datasets, recipe.teacher.model, recipe.tokenising.chat_template]
    named = sorted({name for word in words for name in VARIABLE.findall(word or "")})
    given = platform.variables()
    unset = [name for name in named if not given.get(name)]
    for name in unset:
        yield fail("variables", f"{name} is not set, and the recipe's paths name it", f"export {name}=…")
    if not unset:
        yield ok("variables", f"{', '.join(named) or 'the recipe names none'}")


def check_sources(recipe: Recipe, platform: Platform) -> Iterator[Finding]:
    """That each source is there, and what it is: files and bytes."""
    for source in recipe.sources:
        yield from safely("sources", lambda source=source: _check_source(source, platform))  # type: ignore[misc]


def _check_source(source: Source, platform: Platform) -> Iterator[Finding]:
    spec = source.spec
    if spec.dataset is not None or "://" in (spec.path or ""):
        yield warn("sources", f"{spec.name} is not on this machine, and was not asked for", "kd-assets plan looks")
        return
    try:
        found = find_source(spec, base_folder=platform.home_folder, environment=platform.variables())
    except MissingInputError as e:
        if source.made_by is None:
            raise
        yield fail("sources", f"{spec.name}: {e}", f"materialize {source.made_by}")
        return
    size = bytes_in_words(sum(file.n_bytes for file in found.files))
    yield ok("sources", f"{spec.name}: {len(found.files)} files, {size}")


def check_licences(recipe: Recipe) -> Iterator[Finding]:
    """That each source may be used, as far as the recipe says so."""
    for source in recipe.sources:
        yield from safely("licences", lambda source=source: _check_licence(recipe, source))  # type: ignore[misc]


def _check_licence(recipe: Recipe, source: Source) -> Iterator[Finding]:
    spec = source.spec
    if spec.dataset is not None and is_unknown(spec.licence) and spec.licence_accepted is None:
        yield warn("licences", f"{spec.name}: the recipe names none, and its card's was not looked at")
        return
    yield ok("licences", f"{spec.name}: {decide_licence(spec, None, recipe.allowed_licences)}")


def check_disk(platform: Platform) -> Iterator[Finding]:
    """How much room there is, where no recipe says how much is wanted."""
    usage = shutil.disk_usage(platform.home_folder)
    said = f"{bytes_in_words(usage.free)} of {bytes_in_words(usage.total)} free in {platform.home_folder}"
    if usage.free < usage.total / 20:
        yield warn("free space", said, "less than a twentieth is free: `kd-assets doctor RECIPE` says what is wanted")
    else:
        yield ok("free space", said)

"""From results that must exist to those that can be recoded: beside `planner`, and by its rules.

A run recodes what it can before it asks the teacher for the rest, and `kd-assets recode` does the same without Dagster.
What comes out has the name and the bytes that the teacher's pass would give, so nobody after this asks which it was.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import Asset, Output, WorkUnit
from kd_assets.errors import NO_ANSWER, CorruptManifestError, RecipeError, StoreError
from kd_assets.model_files.digests import Say
from kd_assets.orchestration.planning.planned_work import PlannedWork, damaged_in_words
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.recipes.recipe import Recipe
from kd_assets.store import Manifest, committed
from kd_assets.store.recoding.recode import bytes_after, bytes_finished, hidden_size_of_source
from kd_assets.store.recoding.sources import Form, Search, codec_names, find_source, has_other_forms

WORDS: Mapping[str, Asset] = {"topk": "topk_cache", "hidden_states": "hidden_state_cache"}
"""What a recipe calls the caches that have codecs."""


def partition_key_of(output: Output) -> str:
    return Path(output.path).parent.name


# ------------------------------------------------------------------------------------------------------------ of a run


def recode_work(units: Sequence[WorkUnit], say: Say) -> PlannedWork:
    """What has a source, of a teacher's work that is missing. Why what is missing cannot be recoded, where another form
    of it is there, is said: the teacher makes it."""
    planned, refused, unreachable = [], [], {}
    could_be: dict[str, bool] = {}
    sources: Counter[str] = Counter()
    for unit in units:
        outputs: list[Output] = []
        inputs = dict(unit.inputs)
        try:
            for output in unit.outputs:
                # Of all partitions of a variant the same folders are looked at, once; most recipes have none of them.
                if output.variant not in could_be:
                    could_be[output.variant] = has_other_forms(output)
                if not could_be[output.variant]:
                    continue
                search = find_source(output)
                if search.source is not None:
                    outputs.append(output)
                    inputs[output.asset] = (search.source.output.path,)
                    sources[f"{output.asset} from {search.source.form.in_words}"] += 1
                elif search.refused:
                    refused.append(f"{output.asset} of {unit.partition_key}: {'; '.join(search.refused)}")
        except NO_ANSWER as e:
            unreachable[unit.partition_key] = str(e)
            continue
        if outputs:
            planned.append(dataclasses.replace(unit, inputs=inputs, outputs=tuple(outputs)))
    if sources:
        named = ", ".join(f"{n} of {words}" for words, n in sources.items())
        say(f"recoded without the teacher (recode: false of the recipe asks it again): {named}")
    if refused:
        say(f"{len(refused)} results cannot be recoded and are the teacher's to make, such as {refused[0]}")
    return PlannedWork(kind="recode", units=tuple(planned), unreachable=unreachable)


# -------------------------------------------------------------------------------------------------------- of a command


@dataclass(frozen=True, kw_only=True, slots=True)
class Recoding:
    """One result that the command is asked for."""

    partition_key: str
    wanted: Output
    there: Manifest | None
    """What is committed of it already."""
    search: Search | None
    """What it can be made of; None where it is there."""
    bytes_after: int
    """Of its files, about; exactly where it is there."""
    bytes_finished: int
    """Of these what a recoding that was killed has left, and the next one keeps."""

    @property
    def asset(self) -> Asset:
        return self.wanted.asset


def with_codecs(recipe: Recipe, said: Sequence[str], *, without_logsumexp: bool) -> tuple[Recipe, tuple[Asset, ...]]:
    """The recipe with these codecs (`topk=compact`) in the place of its own, and the caches that are meant: those that
    are named, or without a name those that the recipe codes. Raises RecipeError."""
    named: list[Asset] = []
    topk, states = recipe.topk, recipe.hidden_states
    for words in said:
        cache, is_given, codec = words.partition("=")
        asset = WORDS.get(cache)
        if not is_given or asset is None:
            raise RecipeError(f"--codec {words!r} is not of the form CACHE=CODEC with a cache of {', '.join(WORDS)}")
        if asset not in recipe.caches:
            raise RecipeError(f"--codec {words}: recipe {recipe.name} has no {cache}")
        if codec not in codec_names(asset):
            raise RecipeError(f"{cache} have no codec {codec!r}; there are {', '.join(codec_names(asset))}")
        known: Any = codec
        if asset == "topk_cache" and topk is not None:
            keeps_logsumexp = topk.logsumexp or codec == "plain"
            topk = dataclasses.replace(topk, codec=known, logsumexp=keeps_logsumexp)
        elif states is not None:
            states = dataclasses.replace(states, codec=known)
        named.append(asset)
    if without_logsumexp:
        if topk is None or topk.codec == "plain":
            raise RecipeError("--without-logsumexp is of a coded top-k cache: say --codec topk=compact")
        topk = dataclasses.replace(topk, logsumexp=False)
        named.append("topk_cache")
    assets = tuple(asset for asset in recipe.caches if asset in named) or recipe.coded
    if not assets:
        raise RecipeError(
            f"recipe {recipe.name} codes no cache: say which codec, such as --codec topk=compact, or set it there"
        )
    return dataclasses.replace(recipe, topk=topk, hidden_states=states), assets


def recodings(planner: Planner, partition_keys: Sequence[str], assets: Sequence[Asset]) -> Iterator[Recoding | str]:
    """Each of these results, one after the other, with what is there of it or what it can be made of; or why that
    cannot be told of a partition. Nothing is written, and nothing is kept.

    Raises MissingInputError where there is no plan, RecipeError for a recipe that cannot be.
    """
    weights = planner.planned_weights()
    hidden_sizes: dict[str, int | None] = {}
    for partition_key in partition_keys:
        work = planner.teacher_work([partition_key], assets, weights=weights)
        yield from (f"{key}: {why}" for key, why in (*work.impossible.items(), *work.unreachable.items()))
        for unit in work.units:
            for output in unit.outputs:
                try:
                    yield _recoding(unit, output, hidden_sizes)
                except StoreError as e:
                    yield f"{output.asset} of {unit.partition_key}: {e}"


def _recoding(unit: WorkUnit, output: Output, hidden_sizes: dict[str, int | None]) -> Recoding:
    """`hidden_sizes`: variant → that of its states, filled here: of one teacher all have the same. Raises StoreError
    where a manifest or a part is damaged, or a file system does not answer."""
    try:
        there = committed(Path(output.path), output.fingerprint)
    except CorruptManifestError as e:
        raise CorruptManifestError(damaged_in_words(output, e)) from e
    search = find_source(output) if there is None else None
    if search is None or search.source is None:
        n_bytes, n_finished = 0 if there is None else there.n_bytes, 0
    else:
        if output.variant not in hidden_sizes:
            hidden_sizes[output.variant] = hidden_size_of_source(search.source)
        n_bytes = bytes_after(search.source, output, hidden_size=hidden_sizes[output.variant])
        n_finished = bytes_finished(search.source, output)
    return Recoding(
        partition_key=unit.partition_key,
        wanted=output,
        there=there,
        search=search,
        bytes_after=n_bytes,
        bytes_finished=n_finished,
    )


def form_in_words(output: Output) -> str:
    return Form.of(output.asset, output.identity.get("params") or {}).in_words

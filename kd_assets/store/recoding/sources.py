"""What a result can be recoded from: the results that differ from it by their codec alone, and which of them will do.

A codec is a pure function of the rows without one. So what is made of a source that holds all of the teacher's numbers
has the bytes that the teacher's pass would have written, and its name. Of a source that was rounded it would not: that
is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import Asset, Output
from kd_assets.durable import listing, mode_if_there
from kd_assets.errors import NO_ANSWER, StoreError
from kd_assets.store.codecs.codec import CODECS, PLAIN
from kd_assets.store.codecs.state_codec import RAW
from kd_assets.store.codecs.topk_schema import COMPACT
from kd_assets.store.computing_versions import computing_versions
from kd_assets.store.fingerprint import plan_output
from kd_assets.store.layout import MANIFEST_NAME, QUARANTINE_NAME, recipe_folder_of, result_folder
from kd_assets.store.manifest import Manifest, committed, read_manifest
from kd_assets.store.recorded_checks import codec_name, failed_check

DRAWS_CODEC = "draws_codec_version"
"""In an identity: how the codec compact holds random draws."""

LOSES_NOTHING = (PLAIN, RAW, "split")
"""Codecs that give back every number as it was; of all others the numbers are rounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a cache lies in its files: the part of its parameters that recoding changes."""

    codec: str
    logsumexp: bool = True
    """Whether a top-k cache has that column."""
    coded_draws: bool = True
    """Whether random draws of a compact one are coded, too: not of those that were made before they were."""

    @staticmethod
    def of(asset: Asset, params: Mapping[str, Any]) -> Form:
        return Form(codec=params.get("codec", uncoded(asset)), logsumexp=params.get("logsumexp", True))

    @property
    def in_words(self) -> str:
        without = "" if self.logsumexp else " without logsumexp"
        return self.codec + without + ("" if self.coded_draws else ", its draws not coded")

    def params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """These parameters of an identity with this form in the place of theirs."""
        others = {name: value for name, value in params.items() if name not in ("codec", "logsumexp")}
        coded = {} if self.codec in (PLAIN, RAW) else {"codec": self.codec}
        return {**others, **coded, **({} if self.logsumexp else {"logsumexp": False})}

    def why_not(self, wanted: Form) -> str | None:
        """Why a result of this form cannot become one of the `wanted` form; None where it can."""
        if wanted.logsumexp and not self.logsumexp:
            return "it has no logsumexp, which only the teacher can give"
        if self.codec in LOSES_NOTHING or self.codec == wanted.codec:
            return None
        return f"its numbers are rounded already by {self.codec}: what is made of them is not what the teacher gives"


def is_exact(manifest: Manifest) -> bool:
    """Whether a result has all of its numbers as they were computed; true of what has no codec."""
    return codec_name(manifest) in LOSES_NOTHING


def same_but_for_codec(one: Manifest, other: Manifest) -> bool:
    """Whether two results are of the same numbers, as far as identities say: what one rounds the other may have."""

    def without_form(identity: Mapping[str, Any]) -> dict[str, Any]:
        params = {n: v for n, v in (identity.get("params") or {}).items() if n not in ("codec", "logsumexp")}
        return {name: value for name, value in identity.items() if name != DRAWS_CODEC} | {"params": params}

    return one.asset == other.asset and without_form(one.identity) == without_form(other.identity)


def uncoded(asset: Asset) -> str:
    """The word for a cache without a codec."""
    return PLAIN if asset == "topk_cache" else RAW


def codec_names(asset: Asset) -> tuple[str, ...]:
    """What a recipe may say as the codec of a cache; empty for one that has none."""
    coded = [name for of_asset, name in CODECS if of_asset == asset]
    return (uncoded(asset), *coded) if coded else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A result that would be the same as the wanted one but for its codec, whether it is there or not."""

    form: Form
    output: Output


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A committed result that will do."""

    form: Form
    output: Output
    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What came of looking for a source."""

    source: Source | None
    looked_for: tuple[str, ...]
    """The forms that would do, in words."""
    refused: tuple[str, ...]
    """Results that are there and will not do, each with the reason."""

    @property
    def why_none(self) -> str:
        """Why there is no source, and what to do."""
        remedy = "materialize it, which asks the teacher"
        if not self.looked_for:
            why = ["nothing holds its numbers but what the teacher gives" if self.refused else "it has no codec"]
        else:
            why = [
                f"no committed result of {' or '.join(self.looked_for)} is there that will do and differs by its codec "
                "alone (same shard, teacher, parameters, precision and part sizes)"
            ]
        return f"{'; '.join([*why, *self.refused])}: {remedy}"


def candidates(wanted: Output) -> list[Candidate]:
    """All other forms of a result, those without a codec first."""
    params = wanted.identity.get("params") or {}
    of_wanted = Form.of(wanted.asset, params)
    names = codec_names(wanted.asset)
    forms = [Form(codec=name) for name in names]
    if wanted.asset == "topk_cache":
        forms += [Form(codec=name, logsumexp=False) for name in names if name != PLAIN]
        if params.get("draws"):
            forms += [dataclasses.replace(form, coded_draws=False) for form in forms if form.codec == COMPACT]
    path = Path(wanted.path)
    found = [
        Candidate(
            form=form,
            output=plan_output(
                wanted.asset,
                _identity_of(wanted, form),
                recipe_folder=recipe_folder_of(path),
                partition_key=path.parent.name,
            ),
        )
        for form in forms
        if form != of_wanted
    ]
    return [candidate for candidate in found if candidate.output.fingerprint != wanted.fingerprint]


def _identity_of(wanted: Output, form: Form) -> dict[str, Any]:
    """That of `wanted` in this form, with the version of coded draws that follows from it."""
    params = form.params(wanted.identity.get("params") or {})
    versions = computing_versions(wanted.asset, params)
    version = {DRAWS_CODEC: versions[DRAWS_CODEC]} if DRAWS_CODEC in versions and form.coded_draws else {}
    others = {name: value for name, value in wanted.identity.items() if name != DRAWS_CODEC}
    return {**others, **version, "params": dict(params)}


def why_doubted(source: Manifest, wanted: Output) -> str | None:
    """Why nothing is made of a source: a result that was recoded from its bytes is in quarantine; None where none is.
    What is made of it once more would be the very bytes that somebody does not trust.

    Raises StorageUnavailableError."""
    path = Path(wanted.path)
    for folder in _put_aside(recipe_folder_of(path) / QUARANTINE_NAME, wanted.asset, path.parent.name):
        try:
            before = read_manifest(folder).provenance.get("recoded_from")
        except NO_ANSWER:
            raise
        except StoreError:  # of what it was made is not known
            continue
        while isinstance(before, dict):
            if before.get("data_version") == source.data_version:
                own = result_folder(
                    recipe_folder_of(path), source.asset, source.variant, source.partition_key, source.fingerprint
                )
                return f"{folder}, which was recoded from it, is in quarantine: {ways_out(own)}"
            before = before.get("recoded_from")
    return None


def _put_aside(quarantine_folder: Path, asset: Asset, partition_key: str) -> Iterator[Path]:
    for time in listing(quarantine_folder):
        for variant in listing(quarantine_folder / time / asset):
            for name in listing(quarantine_folder / time / asset / variant / partition_key):
                yield quarantine_folder / time / asset / variant / partition_key / name


def find_source(wanted: Output) -> Search:
    """The committed result that `wanted` can be recoded from, if there is one: the first that will do. Its parts are
    not looked into, and no manifest of a form that will not do.

    Raises StorageUnavailableError where it cannot be told.
    """
    of_wanted = Form.of(wanted.asset, wanted.identity.get("params") or {})
    found = candidates(wanted)
    fit = [candidate for candidate in found if candidate.form.why_not(of_wanted) is None]
    unfit = [candidate for candidate in found if candidate.form.why_not(of_wanted) is not None]
    refused: list[str] = []
    looked_for = tuple(candidate.form.in_words for candidate in fit)
    for candidate in fit:
        form, output = candidate.form, candidate.output
        try:
            manifest = committed(Path(output.path), output.fingerprint)
        except NO_ANSWER:
            raise
        except StoreError as e:
            refused.append(f"the result of {form.in_words} is damaged: {e}")
            continue
        if manifest is None:
            continue
        if why := failed_check(manifest) or why_doubted(manifest, wanted):
            refused.append(f"{output.path} is of {form.in_words}, and {why}")
            continue
        source = Source(form=form, output=output, manifest=manifest)
        return Search(source=source, looked_for=looked_for, refused=tuple(refused))
    for candidate in unfit:
        path, form = Path(candidate.output.path), candidate.form
        if MANIFEST_NAME in listing(path):
            refused.append(f"{path} is of {form.in_words}, and {form.why_not(of_wanted)}")
    return Search(source=None, looked_for=looked_for, refused=tuple(refused))


def ways_out(folder: Path) -> str:
    """What to do about a result that is no good as a source: else its partition is refused for ever."""
    asset, variant, key = (folder.parents[n].name for n in (2, 1, 0))
    return (
        f"either put it aside (kd-assets quarantine {recipe_folder_of(folder)} {key} --assets {asset} --variant "
        f"{variant} --why …), or say recode: false in the recipe: the teacher makes the partition then"
    )


def has_other_forms(wanted: Output) -> bool:
    """Whether anything of the asset was ever made in another codec: one look at a few folders, which are the same for
    all partitions. Raises StorageUnavailableError."""
    return any(mode_if_there(Path(c.output.path).parents[1]) is not None for c in candidates(wanted))

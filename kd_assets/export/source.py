"""Which caches an export reads, and what is known of them before a document is read.

Caches are chosen as readers of a recipe choose them (`kd_assets.store.choose`), with the same refusals; or they are
named by their folders. The invariant: of what is exported every partition is there in every cache that the format
needs, of one teacher and one vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import CACHES, Asset
from kd_assets.durable import listing, read_if_there
from kd_assets.errors import (
    FailedCheckError,
    NotCommittedError,
    RecipeError,
    UnknownFieldError,
    VariantConflictError,
)
from kd_assets.export.format import ExportOptions, Needs, Source
from kd_assets.export.joined import partitions_of
from kd_assets.store import (
    CacheReader,
    Chosen,
    Manifest,
    choose,
    planned_partitions,
    read_manifest,
    variants_of,
)
from kd_assets.store.current_variants import chosen_variant
from kd_assets.store.layout import is_variant_name
from kd_assets.store.schema import HiddenState, hidden_size_of, hidden_state_of

SHARDS: Asset = "shards_manifest"
_SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeCaches:
    """The caches of a recipe in a store."""

    recipe_folder: Path
    partition_keys: tuple[str, ...] | None = None
    """None: all that the plan names."""
    variants: Mapping[Asset, str] | None = None
    """Of assets that have several."""

    def there(self) -> dict[Asset, Chosen]:
        """What is committed of each asset, whole or not; without assets of which several variants are."""
        found: dict[Asset, Chosen] = {}
        for asset in (SHARDS, *CACHES):
            variants = variants_of(self.recipe_folder / asset)
            wanted = (self.variants or {}).get(asset)
            if wanted is None and len(variants) > 1:
                wanted = chosen_variant(self.recipe_folder, asset, variants)
            current = {name: folders for name, folders in variants.items() if wanted in (None, name)}
            if len(current) == 1:
                (folders,) = current.values()
                found[asset] = _of_folders([folder for _, folder in sorted(folders.items())])
        return found

    def unclear(self) -> tuple[Asset, ...]:
        """Of which something is on disk, and `there` has nothing."""
        there = self.there()
        return tuple(a for a in CACHES if a not in there and any(map(is_variant_name, listing(self.recipe_folder / a))))

    def choose(self, asset: Asset) -> Chosen:
        """What is to be read of an asset. Raises as `kd_assets.store.choose` does, and names all that is missing."""
        variant = (self.variants or {}).get(asset)
        try:
            return choose(self.recipe_folder, asset, variant=variant, partition_keys=self.partition_keys)
        except (NotCommittedError, FailedCheckError) as e:
            plan = planned_partitions(self.recipe_folder)
            wanted = self.partition_keys or (() if plan is None else tuple(plan.input_hashes))
            found = self.there().get(asset)
            committed = set() if found is None else {manifest.partition_key for manifest in found.manifests}
            if missing := [key for key in wanted if key not in committed]:
                more = f", and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
                raise type(e)(f"{e}. Without a result of {asset}: {', '.join(missing[:_SHOWN])}{more}") from e
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderCaches:
    """Caches that are named by their result folders, whether or not they are current and planned."""

    folders: Mapping[Asset, Sequence[Path]]

    def there(self) -> dict[Asset, Chosen]:
        return {asset: _of_folders(folders) for asset, folders in self.folders.items() if folders}

    def unclear(self) -> tuple[Asset, ...]:
        return ()

    def choose(self, asset: Asset) -> Chosen:
        """Raises NotCommittedError for an asset without folders, FailedCheckError for a result that failed a check."""
        if not self.folders.get(asset):
            raise NotCommittedError(f"no result folders of {asset} were given, which this export needs")
        if asset in CACHES:
            CacheReader.from_folders(self.folders[asset])
        return _of_folders(self.folders[asset])


def choose_needed(caches: RecipeCaches | FolderCaches, needs: Needs) -> dict[Asset, Chosen]:
    """The results that a format needs, all of the same partitions. Raises what says why there are none."""
    chosen = {asset: caches.choose(asset) for asset in needs.assets}
    if not any(asset in CACHES for asset in chosen):
        raise RecipeError(f"an export needs at least one cache of {', '.join(CACHES)}")
    partitions_of(chosen)
    _require_one_teacher(chosen)
    if "hidden_state_cache" in chosen:
        _require_states(chosen["hidden_state_cache"], needs.states)
    if needs.all_positions:
        _require_all_positions(chosen)
    if needs.fixed_k:
        _require_fixed_k(chosen)
    return chosen


def source_of(chosen: Mapping[Asset, Chosen], *, unclear: tuple[Asset, ...] = ()) -> Source:
    """What is known of these results. Raises NotCommittedError where there are none at all."""
    caches = [asset for asset in CACHES if asset in chosen]
    if not caches:
        raise NotCommittedError(f"there are no committed results of {', '.join(CACHES)}: materialize some")
    first = chosen[caches[0]].manifests[0]
    teacher = _folder_on_this_machine(first, "teacher_folder", "teacher")
    config = {} if teacher is None else _config(teacher)
    vocabulary = first.facts.get("vocab_size", config.get("vocab_size"))
    return Source(
        recipe=first.recipe,
        manifests={asset: results.manifests for asset, results in chosen.items()},
        folders={asset: results.folders for asset, results in chosen.items()},
        n_blocks=_whole(config.get("num_hidden_layers")),
        hidden_size=_hidden_size(chosen) or _whole(config.get("hidden_size")),
        vocabulary_size=_whole(vocabulary),
        teacher_folder=teacher,
        tokenizer_folder=_folder_on_this_machine(first, "tokenizer", "teacher_folder", "teacher"),
        provenance=dict(first.provenance),
        states=states_of(chosen["hidden_state_cache"]) if "hidden_state_cache" in chosen else (),
        unclear=unclear,
    )


def states_of(chosen: Chosen) -> tuple[HiddenState, ...]:
    """All states that a hidden-state cache has; none of one without documents."""
    names = _schema_names(chosen)
    return tuple(state for name in names if (state := hidden_state_of(name)) is not None)


def needs_of_chosen(source: Source, options: ExportOptions, known: Sequence[Asset]) -> Needs:
    """What a format needs that takes any of the caches in `known`: those that are there, or that the options name.

    What is not there, or cannot be read, is refused when it is chosen. Raises RecipeError where nothing is left.
    """
    there = [asset for asset in known if asset in source.manifests or asset in source.unclear]
    wanted = there if options.assets is None else list(options.assets)
    if not wanted:
        raise RecipeError(f"recipe {source.recipe} has none of {', '.join(known)} to export")
    states: tuple[HiddenState, ...] = ()
    if "hidden_state_cache" in wanted:
        states = source.states if options.states is None else options.states
    elif options.states:
        raise RecipeError("states were named, and no hidden_state_cache is exported")
    return Needs(assets=tuple(wanted), states=states, all_positions=False)


def _of_folders(folders: Sequence[Path]) -> Chosen:
    manifests = tuple(read_manifest(folder) for folder in folders)
    return Chosen(folders=tuple(folders), manifests=manifests, left_out={}, plan_hash=None)


def _require_one_teacher(chosen: Mapping[Asset, Chosen]) -> None:
    """Raise VariantConflictError unless all caches are of one vocabulary and of one teacher, as far as they say."""
    known: dict[str, tuple[object, str]] = {}
    for asset in (asset for asset in CACHES if asset in chosen):
        for manifest in chosen[asset].manifests:
            said = {
                "vocabulary (facts.vocab_size)": manifest.facts.get("vocab_size"),
                "teacher (identity.weights_fingerprint)": manifest.identity.get("weights_fingerprint"),
            }
            for what, value in said.items():
                where = f"{asset} of partition {manifest.partition_key!r}"
                before, before_where = known.setdefault(what, (value, where)) if value is not None else (None, "")
                if value != before:
                    raise VariantConflictError(
                        f"the {what} of {where} is {value!r:.40}, that of {before_where} is {before!r:.40}: what "
                        "was made by two teachers is not exported as one; materialize the older one again"
                    )


def _require_states(chosen: Chosen, states: Sequence[HiddenState]) -> None:
    there = states_of(chosen)
    if sum(m.n_documents for m in chosen.manifests) and (absent := [s for s in states if s not in there]):
        what = f"block {absent[0]}" if isinstance(absent[0], int) else f"final state {absent[0]!r}"
        raise UnknownFieldError(
            f"the hidden-state cache of recipe {chosen.manifests[0].recipe} has no {what}; it has "
            f"{', '.join(map(str, there))}: add it to hidden_states of the recipe and materialize"
        )


def _require_all_positions(chosen: Mapping[Asset, Chosen]) -> None:
    for asset in (asset for asset in CACHES if asset in chosen):
        if "positions" in _schema_names(chosen[asset]):
            raise RecipeError(
                f"{asset} of recipe {chosen[asset].manifests[0].recipe} keeps some positions only (positions: …), and "
                "this format needs all of them: make it with `positions: all`"
            )


def _require_fixed_k(chosen: Mapping[Asset, Chosen]) -> None:
    for manifest in chosen["topk_cache"].manifests if "topk_cache" in chosen else ():
        if manifest.params.get("top_p") is not None:
            raise RecipeError(
                f"topk_cache of recipe {manifest.recipe} keeps as many tokens of a position as have a mass of "
                f"{manifest.params['top_p']} (top_p), and this format needs k of each: make it without top_p, export "
                "to axolotl, or train with kd_assets.student, which take it"
            )


def _schema_names(chosen: Chosen) -> list[str]:
    filled = [i for i, manifest in enumerate(chosen.manifests) if manifest.parts]
    if not filled:
        return []
    one = chosen.only({chosen.manifests[filled[0]].partition_key})
    return list(CacheReader.of(one).schema.names)


def _hidden_size(chosen: Mapping[Asset, Chosen]) -> int | None:
    for asset in ("hidden_state_cache", "embedding_cache"):
        for manifest, folder in zip(*_parts_of(chosen, asset), strict=True):
            if manifest.parts:
                return hidden_size_of(CacheReader.from_folders([folder], allow_failed=True).schema)
    return None


def _parts_of(chosen: Mapping[Asset, Chosen], asset: Any) -> tuple[Sequence[Manifest], Sequence[Path]]:
    return (chosen[asset].manifests, chosen[asset].folders) if asset in chosen else ((), ())


def _folder_on_this_machine(manifest: Manifest, *names: str) -> Path | None:
    """The first folder that the provenance names under one of these and that is here."""
    for name in names:
        said = manifest.provenance.get(name)
        if isinstance(said, str) and said and Path(said).is_absolute() and Path(said).is_dir():
            return Path(said)
    return None


def _config(folder: Path) -> dict[str, Any]:
    """The part of a teacher's config.json that is about its texts; empty where there is none."""
    data = read_if_there(folder / "config.json")
    raw = {} if data is None else json.loads(data)
    nested = raw.get("text_config")
    return nested if isinstance(nested, dict) else raw


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None

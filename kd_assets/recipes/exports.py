"""A recipe's `exports`: which formats its caches are written in besides, partition by partition.

What a format takes stands here, since a recipe is loaded where no format is: caches, states, positions and options that
cannot be are refused when it is loaded. What else a format refuses (what hangs on the teacher and on what is in the
caches) it says itself, in its job, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import dagster as dg
from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema, field_validator

from kd_assets.contract import (
    CACHES,
    EXPORTS,
    Asset,
    ExportAsset,
    ExportParams,
    FinalState,
    HiddenStateParams,
    TopkParams,
)
from kd_assets.errors import RecipeError
from kd_assets.recipes.cluster_profile import Positive, refused

_ASSET_OF: Mapping[str, ExportAsset] = {asset.removeprefix("export_"): asset for asset in EXPORTS}

CACHES_OF_FORMAT: Mapping[ExportAsset, tuple[Asset, ...]] = {
    "export_axolotl": ("topk_cache",),
    "export_distillkit": ("topk_cache",),
    "export_modelopt": ("hidden_state_cache",),
    "export_specforge": ("hidden_state_cache",),
    "export_specforge_dflash": ("hidden_state_cache",),
    "export_speculators": ("hidden_state_cache",),
}
"""The caches that a format takes, all of them; one that is not here takes whichever the recipe makes."""

FINAL_OF_FORMAT: Mapping[ExportAsset, FinalState] = {
    "export_modelopt": "after_norm",
    "export_specforge": "after_norm",
    "export_speculators": "before_norm",
}
"""The state at the decoder's end that a format takes; of modelopt unless `states` name the other one."""

FINALS_REFUSED: Mapping[ExportAsset, tuple[FinalState, ...]] = {
    "export_original": ("before_norm", "after_norm"),
    "export_specforge": ("before_norm",),
    "export_specforge_dflash": ("before_norm",),
    "export_speculators": ("after_norm",),
}
"""States at the decoder's end that `states` of a format cannot name."""

SOME_POSITIONS: frozenset[ExportAsset] = frozenset({"export_axolotl", "export_hf", "export_safetensors"})
"""Formats of which a position may be left out of the caches; the others need all."""

DIFFERENT_K: frozenset[ExportAsset] = frozenset({"export_axolotl"})
"""Formats of which a position may keep fewer than k tokens (`topk.top_p`)."""

LEARNED_ONLY: frozenset[ExportAsset] = frozenset({"export_hf", "export_safetensors"})
"""Formats that can leave out positions themselves."""

PACKED: frozenset[ExportAsset] = frozenset({"export_distillkit"})
"""Formats with rows of several documents, which take `pack_to`."""

TWO_TOKENS: frozenset[ExportAsset] = frozenset(CACHES_OF_FORMAT)
"""Formats that leave out documents of one token; `original` does where it has the top-k cache."""

READER_OF_FORMAT: Mapping[str, str] = {
    "axolotl": "axolotl's trainer (a prepared data set)",
    "distillkit": "DistillKit's trainer",
    "hf": "`datasets`",
    "modelopt": "ModelOpt's offline trainer of draft heads",
    "original": "the trainer of the scripts that this project replaces",
    "safetensors": "the safetensors library",
    "specforge": "SpecForge's offline trainer of EAGLE-3 heads",
    "specforge_dflash": "SpecForge's offline trainer of DFlash heads",
    "speculators": "vLLM's offline trainer of draft heads",
}
"""Format → who reads it."""

_BLOCKS_OF_EAGLE3 = 3

_WORD_OF: Mapping[Asset, str] = {
    "topk_cache": "topk",
    "hidden_state_cache": "hidden_states",
    "embedding_cache": "embeddings",
}
"""What a cache is called under `caches` of a recipe."""

_NO_DRAFT_VOCABULARY = (
    "a draft vocabulary, which is counted from the shards of all partitions and not of one: leave it out here, and "
    "give it to the command, once all shards are there (kd-assets export FORMAT RECIPE --draft-vocabulary N)"
)


def _known(format_name: str) -> str:
    if format_name not in _ASSET_OF:
        raise ValueError(f"there is no export format {format_name!r}; there are {', '.join(_ASSET_OF)}")
    return format_name


FormatName = Annotated[str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(_ASSET_OF)})]


class ExportModel(dg.Model, dg.Resolvable):
    """One export, with options; those of `kd-assets export`."""

    format: FormatName
    max_length: Positive | None = None
    """Cut documents to their first tokens."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the documents, chosen by their ids and `seed`: a data set of its own beside the others."""
    learned_only: bool = False
    """Leave out positions that the loss mask does not ask for, where the format can."""
    seed: int = 0
    assets: Annotated[list[Annotated[str, Field(json_schema_extra={"enum": list(CACHES)})]], Field(min_length=1)] | (
        None
    ) = None
    """Of a format that takes whatever caches there are: only these."""
    states: Annotated[list[int | FinalState], Field(min_length=1)] | None = None
    """Only these of the hidden-state cache, where the format leaves the choice: blocks, before_norm, after_norm."""
    pack_to: Positive | None = None
    """Put whole documents together into rows of this many tokens, where the format keeps them apart."""
    draft_vocabulary: Annotated[
        Any, WithJsonSchema(refused({"not": {"type": "null"}}, "nothing: it is no option here"))
    ] = None
    """Not of one partition; see the command."""

    @field_validator("draft_vocabulary")
    @classmethod
    def _none_of_one_partition(cls, value: Any) -> None:
        if value is not None:
            raise ValueError(f"exports of partitions have no draft_vocabulary, {_NO_DRAFT_VOCABULARY}")

    @field_validator("assets")
    @classmethod
    def _caches(cls, assets: list[str] | None) -> list[str] | None:
        if unknown := [asset for asset in assets or () if asset not in CACHES]:
            raise ValueError(f"{unknown[0]!r} is no cache; there are {', '.join(CACHES)}")
        return assets

    def to_params(self) -> ExportParams:
        return ExportParams(
            asset=_ASSET_OF[self.format],
            max_length=self.max_length,
            validation_share=self.validation_share,
            learned_only=self.learned_only,
            seed=self.seed,
            assets=None if self.assets is None else tuple(asset for asset in CACHES if asset in self.assets),
            states=None if self.states is None else tuple(self.states),
            pack_to=self.pack_to,
        )


def _name_or_mapping(schema: dict[str, Any]) -> None:
    """As a condition, and not as alternatives: so a wrong value is reported where it stands."""
    name, mapping = schema["items"]["anyOf"]
    schema["items"] = {"if": {"type": "string"}, "then": name, "else": mapping}


def _resolved(context: dg.ResolutionContext, said: str | Sequence[str | BaseModel]) -> Any:
    """Names as they are, mappings as `ExportModel`: by itself Dagster resolves a list of the one or of the other."""
    whole = context.resolve_value(said) if isinstance(said, str) else said
    return [
        ExportModel.resolve_from_model(context, one) if isinstance(one, BaseModel) else context.resolve_value(one)
        for one in whole
    ]


Exports = Annotated[
    list[FormatName | ExportModel],
    Field(default_factory=list, json_schema_extra=_name_or_mapping),
    dg.Resolver(_resolved, model_field_type=list[FormatName | ExportModel.model()]),  # type: ignore[misc]
]


def export_params(said: Sequence[str | ExportModel]) -> tuple[ExportParams, ...]:
    """In the order of EXPORTS, so that the order in a recipe decides nothing."""
    found = [(ExportModel(format=one) if isinstance(one, str) else one).to_params() for one in said]
    return tuple(sorted(found, key=lambda params: EXPORTS.index(params.asset)))


def export_in_words(params: ExportParams, caches: Sequence[Asset]) -> str:
    """What the web UI says of an export: of what and for whom it is, and the options that a recipe gives."""
    options = {name: value for name, value in params.content().items() if name not in ("format", "assets")}
    said = "".join(f" {name}: {_in_words(value)}." for name, value in options.items())
    return f"{', '.join(caches)} in files for {READER_OF_FORMAT[params.format_name]}.{said}"


def _in_words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def caches_of_export(params: ExportParams, caches: Sequence[Asset]) -> tuple[Asset, ...]:
    """The caches that an export takes of a recipe that makes `caches`."""
    fixed = CACHES_OF_FORMAT.get(params.asset)
    return fixed or tuple(asset for asset in caches if params.assets is None or asset in params.assets)


def check_exports(
    recipe_name: str,
    exports: Sequence[ExportParams],
    caches: Sequence[Asset],
    topk: TopkParams | None,
    hidden_states: HiddenStateParams | None,
) -> None:
    """Raise RecipeError for exports that the recipe's caches cannot become."""
    of = f"recipe {recipe_name}: exports: "
    names = [params.format_name for params in exports]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"{of}{twice[0]} is there twice, and would be one asset: keep one of them")
    for params in exports:
        fixed, what = CACHES_OF_FORMAT.get(params.asset), f"{of}{params.format_name}"
        if fixed and (others := sorted(set(params.assets or ()) - set(fixed))):
            raise RecipeError(f"{what} takes {', '.join(fixed)}, not {others[0]}: leave assets out")
        wanted = fixed or params.assets or ()
        if lacking := [asset for asset in wanted if asset not in caches]:
            raise RecipeError(
                f"{what} takes {lacking[0]}, which the recipe does not make: add {_WORD_OF[lacking[0]]} to caches, or "
                "leave the export out"
            )
        taken = caches_of_export(params, caches)
        _check_options(what, params, taken)
        _check_positions(what, params, taken, topk, hidden_states)
        _check_states(what, params, taken, hidden_states)


def _check_options(what: str, params: ExportParams, caches: Sequence[Asset]) -> None:
    if params.pack_to is not None and params.asset not in PACKED:
        raise RecipeError(f"{what}: a row of it is one document: leave pack_to out")
    if params.learned_only and params.asset not in LEARNED_ONLY:
        raise RecipeError(f"{what}: its trainer reads whole documents: leave learned_only out")
    needs_two = params.asset in TWO_TOKENS or (params.asset == "export_original" and "topk_cache" in caches)
    if params.max_length == 1 and needs_two:
        raise RecipeError(
            f"{what} has no document of one token, and none would be longer: make max_length 2 or more, or leave it out"
        )


def _check_positions(
    what: str,
    params: ExportParams,
    caches: Sequence[Asset],
    topk: TopkParams | None,
    hidden_states: HiddenStateParams | None,
) -> None:
    made: Mapping[Asset, TopkParams | HiddenStateParams | None] = {
        "topk_cache": topk,
        "hidden_state_cache": hidden_states,
    }
    for asset, cache in made.items():
        some = cache is not None and cache.positions.kept != "all"
        if some and asset in caches and params.asset not in SOME_POSITIONS:
            raise RecipeError(
                f"{what} needs all positions of {asset}, and the recipe keeps some only: set positions: all in "
                f"{_WORD_OF[asset]}, or leave the export out"
            )
    ragged = topk is not None and topk.top_p is not None
    if ragged and "topk_cache" in caches and params.asset not in DIFFERENT_K:
        raise RecipeError(
            f"{what} needs k tokens of each position, and with top_p there are fewer: leave top_p out of topk, or the "
            "export"
        )


def _check_states(
    what: str, params: ExportParams, caches: Sequence[Asset], hidden_states: HiddenStateParams | None
) -> None:
    if hidden_states is None or "hidden_state_cache" not in caches:
        if params.states is not None:
            raise RecipeError(f"{what} names states, and takes no hidden_state_cache: leave states out")
        return
    named = params.states or ()
    blocks = [state for state in named if isinstance(state, int)]
    finals = [state for state in named if not isinstance(state, int)]
    if refused_finals := [state for state in finals if state in FINALS_REFUSED.get(params.asset, ())]:
        raise RecipeError(f"{what}: its trainer does not read {refused_finals[0]}: leave it out of states")
    if params.asset == "export_modelopt" and len(finals) > 1:
        raise RecipeError(f"{what}: a file has one state at the decoder's end: name one of {', '.join(finals)}")
    if params.asset in CACHES_OF_FORMAT and blocks != sorted(set(blocks)):
        raise RecipeError(f"{what}: the blocks among its states are not in ascending order, each once: order them")
    if params.asset == "export_specforge" and blocks and len(blocks) != _BLOCKS_OF_EAGLE3:
        raise RecipeError(f"{what}: EAGLE-3 takes exactly three blocks, and states name {len(blocks)}")
    kept = (*hidden_states.blocks, *hidden_states.final)
    if absent := [state for state in named if state not in kept]:
        raise RecipeError(
            f"{what}: the hidden_states of the recipe keep {', '.join(map(str, kept))}, not {absent[0]}: add it to "
            "their blocks or final, or leave it out of states"
        )
    if params.asset in CACHES_OF_FORMAT and not hidden_states.blocks:
        raise RecipeError(f"{what} takes outputs of blocks, and hidden_states keep none: add blocks to them")
    final = FINAL_OF_FORMAT.get(params.asset)
    if params.asset == "export_modelopt" and finals:
        final = finals[0]
    if final is not None and final not in hidden_states.final:
        raise RecipeError(
            f"{what} takes the state {final}, which hidden_states do not keep: add it (final: {final}, or both), or "
            "leave the export out"
        )

"""The YAML's schema says a second time which options there are and what they are by default: it says the same."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

from kd_assets.components import TeacherCaches
from kd_assets.contract import (
    EmbeddingParams,
    FinalState,
    HiddenStateParams,
    PositionChoice,
    StateCodec,
    StudentParams,
    TeacherParams,
    TokenIds,
    TopkParams,
)
from kd_assets.recipes.models import (
    EmbeddingsModel,
    HiddenStatesModel,
    NightlyModel,
    SourceModel,
    StudentModel,
    TasksModel,
    TeacherModel,
    TopkModel,
)
from kd_assets.recipes.recipe import Recipe, Tasks, TeacherSettings
from kd_assets.sources.spec import SourceSpec

Defaults = dict[str, Any]
REQUIRED = "required"


def defaults_of_model(model: type[BaseModel], renamed: Mapping[str, str]) -> Defaults:
    return {
        renamed.get(name, name): REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
    }


def defaults_of_dataclass(cls: type) -> Defaults:
    found: Defaults = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        else:
            found[field.name] = REQUIRED
    return found


@pytest.mark.parametrize(
    ("model", "cls", "renamed"),
    [
        (TeacherModel, TeacherSettings, {"model_id": "model"}),
        (TopkModel, TopkParams, {}),
        (HiddenStatesModel, HiddenStateParams, {}),
        (EmbeddingsModel, EmbeddingParams, {}),
        (StudentModel, StudentParams, {}),
    ],
)
def test_a_models_options_and_their_defaults_are_those_of_its_dataclass(
    model: type[BaseModel], cls: type, renamed: Mapping[str, str]
) -> None:
    of_model, of_class = defaults_of_model(model, renamed), defaults_of_dataclass(cls)
    if model is HiddenStatesModel:  # a word of YAML, and several names behind it
        assert (of_model.pop("final"), of_class.pop("final")) == (None, ())
    if "positions" in of_model:  # a word, or a share, and one class behind both
        assert (of_model.pop("positions"), of_class.pop("positions")) == ("all", PositionChoice())
    if model is TopkModel:  # what a vocabulary of the YAML stands for
        assert of_class.pop("token_ids") is None
    assert of_model == of_class


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("all", PositionChoice()),
        ("learned", PositionChoice(kept="learned")),
        ({"share": 0.1}, PositionChoice(kept="share", share=0.1)),
        ({"share": 0.5, "seed": 7}, PositionChoice(kept="share", share=0.5, seed=7)),
    ],
)
def test_positions_are_a_word_or_a_share_of_either_cache(said: Any, choice: PositionChoice) -> None:
    assert TopkModel(k=2, max_length=8, positions=said).to_params().positions == choice
    assert HiddenStatesModel(blocks=[1], max_length=8, positions=said).to_params().positions == choice


@pytest.mark.parametrize(
    "said", ["some", {"share": 0}, {"share": 1}, {"share": 1.5}, {"seed": 1}, 0.1, {"share": 0.1, "x": 1}]
)
def test_positions_that_are_neither_are_refused_by_the_fields_name(said: Any) -> None:
    with pytest.raises(ValidationError, match="positions"):
        TopkModel(k=2, max_length=8, positions=said)


def test_only_a_compact_cache_leaves_logsumexp_out() -> None:
    assert TopkModel(k=2, max_length=8, codec="compact", logsumexp=False).to_params().logsumexp is False
    with pytest.raises(ValidationError, match="set codec: compact"):
        TopkModel(k=2, max_length=8, logsumexp=False)
    with pytest.raises(ValidationError, match="codec"):
        TopkModel(k=2, max_length=8, codec="zip")  # type: ignore[arg-type]


def test_top_p_is_a_mass_and_left_out_where_all_positions_keep_k() -> None:
    assert TopkModel(k=2, max_length=8).to_params().top_p is None
    assert TopkModel(k=2, max_length=8, top_p=0.95).to_params().top_p == 0.95


@pytest.mark.parametrize("said", [0, 1, -0.5, 95, "most", float("nan"), [0.9]])
def test_what_is_no_mass_is_refused_by_the_fields_name(said: Any) -> None:
    with pytest.raises(ValidationError, match="top_p"):
        TopkModel(k=2, max_length=8, top_p=said)


def test_how_many_tokens_a_position_keeps_is_counted_by_two_bytes() -> None:
    assert TopkModel(k=65_536, max_length=8).to_params().k == 65_536
    with pytest.raises(ValidationError, match="k is 65536, and with top_p it is 65,535 at most"):
        TopkModel(k=65_536, max_length=8, top_p=0.9)


@pytest.mark.parametrize("codec", ["raw", "split", "fp8", "int8_32", "int8_128"])
def test_a_codec_of_hidden_states_is_a_word(codec: StateCodec) -> None:
    assert HiddenStatesModel(blocks=[1], max_length=8, codec=codec).to_params().codec == codec


@pytest.mark.parametrize("said", ["zip", "int8", "int8_33", "FP8", "", 8, {"int8": 32}, None])
def test_another_codec_is_refused_by_the_fields_name(said: Any) -> None:
    with pytest.raises(ValidationError, match="codec"):
        HiddenStatesModel(blocks=[1], max_length=8, codec=said)


@pytest.mark.parametrize(
    ("said", "word", "token_ids"),
    [
        (None, None, None),
        (151_665, None, TokenIds.below(151_665)),
        ("151665", None, TokenIds.below(151_665)),
        ("tokenizer", "tokenizer", None),
        ("$MODELS/student", "$MODELS/student", None),
        ("./student/tokenizer.json", "./student/tokenizer.json", None),
        ("org/student", "org/student", None),
    ],
)
def test_a_vocabulary_is_a_number_or_is_looked_up_later(
    said: Any, word: str | None, token_ids: TokenIds | None
) -> None:
    params = TopkModel(k=2, max_length=8, vocabulary=said).to_params()
    assert (params.vocabulary, params.token_ids) == (word, token_ids)


@pytest.mark.parametrize("said", [0, -5, "-5", "0", True, 1.5e5, "", "  ", ["tokenizer"], {"size": 3}])
def test_a_vocabulary_that_is_neither_is_refused_by_the_fields_name(said: Any) -> None:
    with pytest.raises(ValidationError, match="vocabulary"):
        TopkModel(k=2, max_length=8, vocabulary=said)


@pytest.mark.parametrize(
    ("said", "word", "n"),
    [
        ("151665", None, 151_665),
        ("tokenizer", "tokenizer", None),
        ("'{{ env.N_IDS }}'", None, 32_000),
        ("$M/student", "$M/student", None),
        ("null", None, None),
    ],
)
def test_a_vocabulary_is_read_from_yaml_as_a_number_or_words(
    said: str, word: str | None, n: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("N_IDS", "32000")
    recipe = TeacherCaches.resolve_from_yaml(
        "{recipe: r, sources: [{name: s, path: /s.jsonl, licence: CC0-1.0}], documents_per_shard: 3, "
        f"teacher: {{model_id: /m}}, caches: {{topk: {{k: 2, max_length: 4, vocabulary: {said}}}}}}}"
    ).to_recipe()
    assert recipe.topk is not None
    assert recipe.topk.vocabulary == word
    assert recipe.topk.token_ids == (None if n is None else TokenIds.below(n))


def test_a_vocabulary_of_fewer_ids_than_k_is_refused_with_the_recipe() -> None:
    assert TopkModel(k=8, max_length=8, vocabulary=8).to_params().k == 8
    with pytest.raises(ValidationError, match="k is 9, and vocabulary leaves 8 token ids"):
        TopkModel(k=9, max_length=8, vocabulary=8)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (None, ()),
        ("before_norm", ("before_norm",)),
        ("after_norm", ("after_norm",)),
        ("both", ("before_norm", "after_norm")),
    ],
)
def test_final_names_the_states_at_the_decoders_end(
    said: Literal["before_norm", "after_norm", "both"] | None, kept: tuple[FinalState, ...]
) -> None:
    params = HiddenStatesModel(blocks=[28, 1, 28], max_length=8, final=said).to_params()
    assert params == HiddenStateParams(blocks=(1, 28), max_length=8, final=kept)


def test_no_block_is_enough_where_a_final_state_is_kept_and_only_there() -> None:
    assert HiddenStatesModel(blocks=[], max_length=8, final="after_norm").to_params().blocks == ()
    with pytest.raises(ValidationError, match="blocks is empty: name at least one decoder block"):
        HiddenStatesModel(blocks=[], max_length=8)


def test_the_choices_of_a_teachers_options_are_those_of_its_dataclass() -> None:
    hints = typing.get_type_hints(TeacherSettings)
    choices = {name: hint for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    assert set(choices) == {"dtype", "placement", "compile"}
    assert {name: TeacherModel.model_fields[name].annotation for name in choices} == choices


@pytest.mark.parametrize(
    ("model", "cls", "names"),
    [
        (TeacherCaches, Recipe, {"on_bad_record", "part_documents", "part_tokens"}),
        (TeacherCaches, TeacherParams, {"part_documents", "part_tokens"}),
        (SourceModel, SourceSpec, {"text_field", "messages_field", "id_field", "revision"}),
        (TasksModel, Tasks, {"n_tasks", "concurrency"}),
    ],
)
def test_what_a_model_and_a_dataclass_share_has_one_default(model: type[BaseModel], cls: type, names: set[str]) -> None:
    ours, theirs = defaults_of_model(model, {}), defaults_of_dataclass(cls)
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_the_schedules_have_one_default() -> None:
    of_recipe = defaults_of_dataclass(Recipe)
    assert defaults_of_model(NightlyModel, {}) == {
        "plan": of_recipe["nightly_plan_cron"],
        "caches": of_recipe["nightly_caches_cron"],
    }


@pytest.mark.parametrize("hidden_size", [0, -32, 33, 10**9])
def test_a_students_size_that_cannot_be_is_refused_with_the_recipe(hidden_size: int) -> None:
    with pytest.raises(ValidationError, match="hidden_size"):
        StudentModel(hidden_size=hidden_size)


@pytest.mark.parametrize("hidden_size", [32, 128, 65_536])
def test_a_students_size_is_a_number_of_whole_heads(hidden_size: int) -> None:
    assert StudentModel(hidden_size=hidden_size).hidden_size == hidden_size

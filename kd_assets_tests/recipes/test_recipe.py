"""Identities: what was made before a parameter existed keeps its name, and a parameter that is used changes it."""

from __future__ import annotations

import dataclasses

import pytest

from kd_assets.contract import Asset, EmbeddingParams, HiddenStateParams, PositionChoice, TokenIds, TopkParams
from kd_assets.errors import RecipeError
from kd_assets.recipes.recipe import Recipe, Source, TeacherSettings, Tokenising
from kd_assets.sources.spec import Sharding, SourceSpec
from kd_assets.store.codecs.state_codec import CODED
from kd_assets.store.params_in_identity import params_in_identity


def a_recipe(*, draws: int = 0, seed: int = 0) -> Recipe:
    source = SourceSpec(name="s", path="/s", file_format="jsonl", licence="CC0-1.0")
    return Recipe(
        name="r",
        sources=(Source(spec=source),),
        teacher=TeacherSettings(model="m", seed=seed),
        sharding=Sharding(documents_per_shard=10),
        topk=TopkParams(k=4, max_length=100, draws=draws),
        hidden_states=HiddenStateParams(blocks=(1,), max_length=50),
        embeddings=EmbeddingParams(max_length=300),
    )


@pytest.mark.parametrize(
    ("asset", "code_version"),
    [("topk_cache", "1-07396093"), ("hidden_state_cache", "1-76d669f3"), ("embedding_cache", "1-7c48bb4c")],
)
def test_caches_without_draws_are_called_what_they_were_before_there_were_draws(
    asset: Asset, code_version: str
) -> None:
    """The literals are what the version before draws gave."""
    assert a_recipe().code_version(asset) == code_version


def test_draws_change_the_topk_cache_and_no_other() -> None:
    one, other = a_recipe(), a_recipe(draws=50)
    assert one.code_version("topk_cache") != other.code_version("topk_cache")
    assert other.code_version("topk_cache") != a_recipe(draws=51).code_version("topk_cache")
    for asset in ("hidden_state_cache", "embedding_cache"):
        assert one.code_version(asset) == other.code_version(asset)


def test_final_states_are_of_the_identity_of_a_cache_that_keeps_them_alone() -> None:
    """[F61]"""
    plain = HiddenStateParams(blocks=(0,), max_length=6)
    assert params_in_identity(plain, seed=0) == {"blocks": (0,), "max_length": 6}
    assert params_in_identity(dataclasses.replace(plain, final=("after_norm",)), seed=0)["final"] == ("after_norm",)


def test_a_codec_changes_the_cache_that_has_it_and_no_other_and_plain_is_no_codec() -> None:
    plain = TopkParams(k=4, max_length=100)
    assert params_in_identity(plain, seed=0) == params_in_identity(
        dataclasses.replace(plain, codec="plain", logsumexp=True), seed=0
    )
    assert params_in_identity(plain, seed=0) == {"k": 4, "max_length": 100}
    compact = dataclasses.replace(plain, codec="compact")
    assert params_in_identity(compact, seed=0) == {"k": 4, "max_length": 100, "codec": "compact"}
    without = dataclasses.replace(compact, logsumexp=False)
    assert params_in_identity(without, seed=0) == {"k": 4, "max_length": 100, "codec": "compact", "logsumexp": False}


def test_positions_change_the_cache_that_keeps_them_and_no_other() -> None:
    every = a_recipe()
    learned = TopkParams(k=4, max_length=100, positions=PositionChoice(kept="learned"))
    share = TopkParams(k=4, max_length=100, positions=PositionChoice(kept="share", share=0.5))
    versions = {
        dataclasses.replace(every, topk=topk).code_version("topk_cache") for topk in (every.topk, learned, share)
    }
    assert len(versions) == 3
    changed = dataclasses.replace(every, topk=learned)
    assert changed.code_version("hidden_state_cache") == every.code_version("hidden_state_cache")
    assert params_in_identity(learned, seed=0) == {"k": 4, "max_length": 100, "positions": "learned"}
    assert params_in_identity(share, seed=0)["positions"] == {"share": 0.5, "seed": 0}


def test_a_vocabulary_changes_the_cache_that_is_cut_to_it_and_is_the_ids_that_were_found() -> None:
    every = a_recipe()
    plain = TopkParams(k=4, max_length=100)
    holes = TokenIds.of([0, 1, 5])
    asked = dataclasses.replace(plain, vocabulary="tokenizer")
    choices = (
        every.topk,
        asked,
        dataclasses.replace(asked, token_ids=holes),
        dataclasses.replace(plain, token_ids=TokenIds.below(9)),
    )
    recipes = [dataclasses.replace(every, topk=topk) for topk in choices]
    assert len({recipe.code_version("topk_cache") for recipe in recipes}) == 4
    assert len({recipe.code_version("hidden_state_cache") for recipe in recipes}) == 1
    of_plain = {"k": 4, "max_length": 100}
    assert params_in_identity(plain, seed=0) == of_plain
    assert params_in_identity(asked, seed=0) == of_plain | {"vocabulary": "tokenizer"}
    found = TokenIds.below(9)
    for said in (asked, dataclasses.replace(asked, vocabulary="/models/student"), plain):
        assert params_in_identity(dataclasses.replace(said, token_ids=found), seed=0) == of_plain | {"vocabulary": 9}
        of_holes = params_in_identity(dataclasses.replace(said, token_ids=holes), seed=0)
        assert of_holes == of_plain | {"vocabulary": {"n_ids": 3, "sha256": holes.sha256}}


def test_top_p_changes_the_top_k_cache_that_has_it_and_no_other() -> None:
    every = a_recipe()
    plain = TopkParams(k=4, max_length=100)
    recipes = [dataclasses.replace(every, topk=dataclasses.replace(plain, top_p=p)) for p in (None, 0.9, 0.95)]
    assert len({recipe.code_version("topk_cache") for recipe in recipes}) == 3
    assert len({recipe.code_version("hidden_state_cache") for recipe in recipes}) == 1
    assert params_in_identity(plain, seed=0) == {"k": 4, "max_length": 100}
    assert params_in_identity(dataclasses.replace(plain, top_p=0.9), seed=0) == {
        "k": 4,
        "max_length": 100,
        "top_p": 0.9,
    }


def test_a_codec_changes_the_hidden_state_cache_that_has_it_and_no_other() -> None:
    raw = a_recipe()
    coded = [
        dataclasses.replace(raw, hidden_states=HiddenStateParams(blocks=(1,), max_length=50, codec=c)) for c in CODED
    ]
    versions = {recipe.code_version("hidden_state_cache") for recipe in (raw, *coded)}
    assert len(versions) == 1 + len(CODED)
    for recipe in coded:
        assert recipe.code_version("topk_cache") == raw.code_version("topk_cache")
        assert recipe.coded == ("hidden_state_cache",)
    assert raw.coded == ()
    assert params_in_identity(HiddenStateParams(blocks=(1,), max_length=50, codec="raw"), seed=0) == {
        "blocks": (1,),
        "max_length": 50,
    }
    assert (
        params_in_identity(HiddenStateParams(blocks=(1,), max_length=50, codec="int8_32"), seed=0)["codec"] == "int8_32"
    )


def test_seed_is_of_a_caches_identity_where_something_is_drawn_with_it() -> None:
    assert a_recipe(seed=1).code_version("topk_cache") == a_recipe().code_version("topk_cache")
    assert a_recipe(draws=50, seed=1).code_version("topk_cache") != a_recipe(draws=50).code_version("topk_cache")


@pytest.mark.parametrize(
    ("tokenising", "why"),
    [
        (Tokenising(overlap=8), "overlap is of windows, and long documents are truncate: set long_documents: split"),
        (
            Tokenising(on_long="split", overlap=300),
            "overlap is 300, and a window has 300 tokens, the longest max_length",
        ),
        (Tokenising(chat_template_kwargs={"tools": []}), "chat_template_kwargs has 'tools'.*set tools of the recipe"),
        (Tokenising(chat_template_kwargs={"messages": []}), "chat_template_kwargs has 'messages'.*from each record"),
    ],
)
def test_what_cannot_be_tokenised_is_refused_before_anything_is_planned(tokenising: Tokenising, why: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe r: {why}"):
        dataclasses.replace(a_recipe(), tokenising=tokenising)

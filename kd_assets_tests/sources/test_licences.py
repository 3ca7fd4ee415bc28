"""Which licences let a source be used, and what is recorded of it."""

from __future__ import annotations

import pytest

from kd_assets.errors import RecipeError
from kd_assets.sources.licences import decide_licence
from kd_assets.sources.spec import SourceSpec


def source(licence: str = "unknown", accepted: str | None = None) -> SourceSpec:
    return SourceSpec(name="web", path="web.jsonl", licence=licence, licence_accepted=accepted)


@pytest.mark.parametrize("allowed", [None, ["MIT", "Apache-2.0"], [" apache-2.0"]])
def test_a_licence_that_is_known_and_allowed_is_recorded_as_it_is_written(allowed: list[str] | None) -> None:
    assert decide_licence(source("apache-2.0"), None, allowed) == "apache-2.0"
    assert decide_licence(source(), "Apache-2.0", allowed) == "Apache-2.0"


def test_the_recipes_word_holds_against_the_cards_and_the_difference_is_said() -> None:
    said: list[str] = []
    assert decide_licence(source("MIT"), "gpl-3.0", None, warn=said.append) == "MIT"
    assert said == ["source 'web': the recipe says its licence is MIT, its card gpl-3.0: the recipe's word holds"]
    assert decide_licence(source("MIT"), "mit", None, warn=said.append) == "MIT"
    assert len(said) == 1


@pytest.mark.parametrize("licence", ["unknown", "Unknown", "", "other", "none", "NOASSERTION"])
@pytest.mark.parametrize("card", [None, "other", "unknown"])
def test_an_unknown_licence_stops_the_plan_with_the_settings_that_override_it(licence: str, card: str | None) -> None:
    with pytest.raises(RecipeError) as e:
        decide_licence(source(licence), card, None)
    of_card = "it has no card that says one" if card is None else f"its card says '{card}'"
    assert str(e.value) == (
        f"source 'web': its licence is unknown ({of_card}): say it with licence of the source; "
        "or accept it with licence_accepted of the source, which says why"
    )


@pytest.mark.parametrize(("allowed", "listed"), [(["MIT", "CC0-1.0"], "MIT, CC0-1.0"), ([], "none")])
def test_a_licence_that_is_not_allowed_stops_the_plan_with_the_settings_that_override_it(
    allowed: list[str], listed: str
) -> None:
    with pytest.raises(RecipeError) as e:
        decide_licence(source("gpl-3.0"), None, allowed)
    assert str(e.value) == (
        f"source 'web': its licence gpl-3.0 is not among allowed_licences of the recipe ({listed}): add it there; "
        "or accept it with licence_accepted of the source, which says why"
    )


def test_what_was_accepted_is_recorded_with_the_reason() -> None:
    accepted = "our own data"
    assert decide_licence(source(accepted=accepted), None, ["MIT"]) == "unknown (accepted: our own data)"
    assert decide_licence(source(accepted=accepted), "gpl-3.0", ["MIT"]) == "gpl-3.0 (accepted: our own data)"
    assert decide_licence(source("MIT", accepted), None, ["MIT"]) == "MIT", "there was nothing to accept"
    with pytest.raises(RecipeError):
        decide_licence(source(accepted=" "), None, None)


def test_a_source_of_the_current_plan_stays_allowed_with_a_warning() -> None:
    said: list[str] = []
    assert decide_licence(source(), None, None, known=True, warn=said.append) == "unknown"
    with pytest.raises(RecipeError, match="not among"):
        decide_licence(source("gpl-3.0"), None, ["MIT"], known=True)
    assert len(said) == 1
    assert said[0].endswith("The current plan has it already, so it is used once more")
    assert "licence_accepted" in said[0]

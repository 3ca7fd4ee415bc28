"""Which checks a recipe has, and that to ask for them says nothing in a server's log."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from kd_assets.orchestration.recording.check_specs import check_keys, check_specs, plan_check_specs
from kd_assets_tests.orchestration.deployment import Deployment


def test_the_checks_of_a_recipe_are_made_without_a_warning_of_dagsters(deploy: Callable[..., Deployment]) -> None:
    recipe = deploy().recipe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specs = [*check_specs(recipe, recipe.partitions), *plan_check_specs(recipe)]
        keys = check_keys(recipe)
    assert len(keys) == len(set(keys))
    assert set(keys) == {spec.key for spec in specs}

"""The bill before spending, for people: `kd-assets plan`. Plans in memory; the current plan stays what it is."""

from __future__ import annotations

from collections.abc import Iterator

from kd_assets.orchestration.billing.bill import Bill, make_bill
from kd_assets.orchestration.billing.words import Row, rows, source_row, why_it_does_not_fit
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe


def bill_of(recipe: Recipe, platform: Platform) -> Bill:
    """The bill of the plan that would be made now; nothing is written.

    Raises what `plan_shards` raises of bad sources, StorageUnreachableError where results cannot be looked at.
    """
    planner = planner_of(recipe, platform)
    return make_bill(recipe, platform, planner, planner.draft_plan())


def fits(bill: Bill) -> bool:
    return why_it_does_not_fit(bill) is None


def text_lines(bill: Bill) -> Iterator[str]:
    """The sources, the figures, what people should know, and whether the caches fit."""
    yield f"recipe {bill.recipe}: what its plan would be now, and what it would cost. Nothing was written."
    shown = [*(source_row(line) for line in bill.sources), *rows(bill)]
    widths = [max(len(row[i]) for row in shown) for i in range(2)]
    yield from (_line(row, widths) for row in shown)
    yield from (f"note: {line}" for line in bill.said)
    all_known = all(line.n_bytes is not None for line in bill.caches)
    yield why_it_does_not_fit(bill) or ("The caches fit." if all_known else "The caches whose size is known fit.")


def _line(row: Row, widths: list[int]) -> str:
    return f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip()

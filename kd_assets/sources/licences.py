"""Whether a source may be used: its licence against those that the recipe allows.

For the planner: touches no file. What was decided stands in the plan, and from there in every manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kd_assets.errors import RecipeError
from kd_assets.sources.spec import SourceSpec

UNKNOWN = "unknown"

_NO_LICENCE = ("", UNKNOWN, "other", "none", "noassertion")
"""What data sets' cards and recipes say where they name none."""


def decide_licence(
    spec: SourceSpec,
    card: str | None,
    allowed: Sequence[str] | None,
    *,
    known: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> str:
    """The licence that the plan records of a source: the recipe's word, else that of the data set's card.

    Raises RecipeError for one that is unknown, or not among the `allowed` (None: every one that is known), unless the
    source's `licence_accepted` says why it may be used all the same: then that stands beside it. `known`: the plan that
    is current has this source, of an unknown licence, too; it stays, with a warning, so that an upgrade stops no one.
    """
    licence = spec.licence.strip() or UNKNOWN
    if is_unknown(licence) and card and card.strip():
        licence = card.strip()
    elif card and not is_unknown(card) and card.strip().casefold() != licence.casefold():
        warn(
            f"source {spec.name!r}: the recipe says its licence is {licence}, its card {card}: the recipe's word holds"
        )
    why = _refusal(licence, card, allowed)
    if why is None:
        return licence
    if spec.licence_accepted is not None and spec.licence_accepted.strip():
        return f"{licence} (accepted: {spec.licence_accepted.strip()})"
    message = f"source {spec.name!r}: {why}; or accept it with licence_accepted of the source, which says why"
    if not (known and is_unknown(licence)):
        raise RecipeError(message)
    warn(f"{message}. The current plan has it already, so it is used once more")
    return licence


def is_unknown(licence: str) -> bool:
    """Whether these words name no licence."""
    return licence.strip().casefold() in _NO_LICENCE


def _refusal(licence: str, card: str | None, allowed: Sequence[str] | None) -> str | None:
    """Why a source of this licence may not be used, and the settings that would change it; None where it may. SPDX ids
    are the same in any case."""
    if is_unknown(licence):
        of_card = f"its card says {card!r}" if card else "it has no card that says one"
        return f"its licence is unknown ({of_card}): say it with licence of the source"
    if allowed is not None and licence.casefold() not in {name.strip().casefold() for name in allowed}:
        listed = ", ".join(allowed) or "none"
        return f"its licence {licence} is not among allowed_licences of the recipe ({listed}): add it there"
    return None

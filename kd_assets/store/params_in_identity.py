"""A cache's parameters as its identity has them."""

from __future__ import annotations

import dataclasses

from kd_assets.contract import EmbeddingParams, HiddenStateParams, TopkParams
from kd_assets.store.codecs.codec import PLAIN
from kd_assets.store.codecs.state_codec import RAW
from kd_assets.store.positions import choice_in_identity

_LATER_DEFAULTS: tuple[tuple[str, object], ...] = (
    ("final", ()),
    ("positions", "all"),
    ("vocabulary", None),
    ("codec", PLAIN),
    ("codec", RAW),
    ("logsumexp", True),
    ("top_p", None),
)


def params_in_identity(params: TopkParams | HiddenStateParams | EmbeddingParams, *, seed: int) -> dict[str, object]:
    """A cache's parameters as they enter its identity, with the seed where something is drawn with it. One that came
    later is left out where it is not used, so that what was made before it stays what it is. A student's vocabulary is
    its set of ids, wherever that was found; before it is looked up it is the recipe's word for it."""
    content: dict[str, object] = dataclasses.asdict(params)
    if "positions" in content:
        content["positions"] = choice_in_identity(params.positions)  # type: ignore[union-attr]
    if isinstance(params, TopkParams):
        del content["token_ids"]
        if params.token_ids is not None:
            content["vocabulary"] = params.token_ids.in_identity()
    for later, default in _LATER_DEFAULTS:
        if later in content and content[later] == default:
            del content[later]
    if isinstance(params, TopkParams):
        if params.draws:
            content["seed"] = seed
        else:
            del content["draws"]
    return content

"""The few names of Dagster that it does not export, in one place. Pinned by version, tested by what they do.

Only `kd_assets.orchestration` may import it. `kd_assets_tests/orchestration/test_dagster_internals.py` fails when a new
Dagster changes any of these.
"""

from __future__ import annotations

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData as CheckTarget,
)
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    INPUT_DATA_VERSION_TAG_PREFIX,
    INPUT_EVENT_POINTER_TAG_PREFIX,
    NULL_EVENT_POINTER,
)
from dagster._core.definitions.source_asset import SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARTITION_NAME_TAG,
)

__all__ = [
    "ASSET_PARTITION_RANGE_END_TAG",
    "ASSET_PARTITION_RANGE_START_TAG",
    "CODE_VERSION_TAG",
    "DATA_VERSION_TAG",
    "PARTITION_NAME_TAG",
    "CheckTarget",
    "already_recorded",
    "input_data_version_tag",
    "input_tags",
]


def already_recorded(asset_key: dg.AssetKey) -> dg.MaterializeResult[None]:
    """The output of an asset whose partitions were each logged by hand: it lets downstream steps of the same run start,
    and records no event.

    Without any output Dagster skips those steps silently and calls the run a success; with an ordinary
    MaterializeResult it records every partition a second time, all with the same metadata. The metadata key is the one
    Dagster uses for observable source assets, which log their own events, too.
    """
    return dg.MaterializeResult(asset_key=asset_key, metadata={SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION: True})


def input_tags(upstream: dg.AssetKey, data_version: str, event_pointer: int | None) -> dict[str, str]:
    """The provenance tags that let Dagster tell whether a hand-logged materialization is stale.

    `event_pointer` is the storage id of the upstream materialization that was read; None when there is none.
    """
    pointer_tag = f"{INPUT_EVENT_POINTER_TAG_PREFIX}/{upstream.to_user_string()}"
    return {
        input_data_version_tag(upstream): data_version,
        pointer_tag: NULL_EVENT_POINTER if event_pointer is None else str(event_pointer),
    }


def input_data_version_tag(upstream: dg.AssetKey) -> str:
    """The tag that holds the data version of the input `upstream` that was read."""
    return f"{INPUT_DATA_VERSION_TAG_PREFIX}/{upstream.to_user_string()}"

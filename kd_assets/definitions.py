"""The table of contents: every recipe under `defs/`, the platform they run on."""

import warnings
from pathlib import Path

import dagster as dg

from kd_assets.orchestration.platform import Platform


@dg.definitions
def defs() -> dg.Definitions:
    with warnings.catch_warnings():
        # Backfill policies and partitioned checks are beta in Dagster 1.13; its version is pinned.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        recipes = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    return dg.Definitions.merge(
        recipes,
        dg.Definitions(
            resources={"platform": Platform.from_environment()},
            # Each run is one step that waits for a job: a process for the run and another for the step would only
            # leave the step behind, unwatched, when the run is killed.
            executor=dg.in_process_executor,
        ),
    )

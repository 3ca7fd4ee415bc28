"""The table of contents: every recipe under `defs/`, the platform they run on."""

from pathlib import Path

import dagster as dg

from kd_assets.orchestration.platform import Platform


@dg.definitions
def defs() -> dg.Definitions:
    return dg.Definitions.merge(
        dg.load_from_defs_folder(path_within_project=Path(__file__).parent),
        dg.Definitions(
            resources={"platform": Platform.from_environment()},
            # Each run is one step that waits for a job: a process for the run and another for the step would only
            # leave the step behind, unwatched, when the run is killed.
            executor=dg.in_process_executor,
        ),
    )

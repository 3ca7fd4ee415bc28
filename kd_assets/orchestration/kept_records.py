"""Nothing is made by a command whose records Dagster deletes at its end: results that nobody knows of are no use.

Without DAGSTER_HOME each `dg launch` has a Dagster of its own in a temporary folder. `dg dev` has one, too, for as long
as it lives: what is launched there is shown there, and goes on.
"""

import dagster as dg

from kd_assets.dagster_internals import is_forgotten_at_its_end
from kd_assets.errors import MissingInputError
from kd_assets.orchestration.platform import Platform


def require_kept_records(context: dg.AssetExecutionContext, platform: Platform) -> None:
    """Raises MissingInputError in a run of a command whose Dagster is a temporary folder."""
    is_of_a_command = context.run.remote_job_origin is None
    if is_of_a_command and is_forgotten_at_its_end(context.instance):
        raise MissingInputError(
            "DAGSTER_HOME is not set, so Dagster keeps this run in a temporary folder and deletes it when this command "
            "ends: no later command would find its partitions and results, so nothing was made. Set it to a folder "
            f"that stays, for every command (export DAGSTER_HOME={platform.home_folder / 'dagster'}), and ask again"
        )

"""Dagster's daemon, a step at a time and without its waits of half a minute: backfills become runs, runs leave the
queue, over a real code server that starts them as processes. What the web UI would ask for is asked of it, too."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import PythonFileTarget
from dagster._daemon.backfill import execute_backfill_iteration
from dagster._daemon.run_coordinator import QueuedRunCoordinatorDaemon
from dagster_graphql.test.utils import execute_dagster_graphql
from dagster_shared.error import SerializableErrorInfo

from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from kd_assets_tests.orchestration.deployment import CACHES, Deployment, write_definitions
from kd_assets_tests.orchestration.web_queries import LAUNCH_RUN

LOCATION = "tiny"
LAUNCH = """
mutation Launch($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""
CANCEL = """mutation Cancel($id: String!) { cancelPartitionBackfill(backfillId: $id) { __typename } }"""
STATUS = """
query Status($id: String!) {
  partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill {
    status
    assetBackfillData { assetBackfillStatuses { ... on AssetPartitionsStatusCounts {
      assetKey { path } numPartitionsTargeted numPartitionsInProgress numPartitionsMaterialized numPartitionsFailed
    } } }
  } }
}
"""


class Daemon:
    def __init__(self, deployment: Deployment, process: WorkspaceProcessContext) -> None:
        self._deployment, self._process = deployment, process
        self._queue = QueuedRunCoordinatorDaemon(interval_seconds=1)
        self._log = logging.getLogger(__name__)

    def backfill(self, partition_keys: Sequence[str] | None = None, assets: Sequence[str] = CACHES) -> str:
        """Launch one as the web UI does, over these partitions or all; returns its id."""
        partitions = {"allPartitions": True} if partition_keys is None else {"partitionNames": list(partition_keys)}
        selection = [{"path": list(self._deployment.recipe.key(asset).path)} for asset in assets]
        launched = self._ask(LAUNCH, params={"assetSelection": selection, **partitions})["launchPartitionBackfill"]
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        return str(launched["backfillId"])

    def cancel(self, backfill_id: str) -> None:
        answer = self._ask(CANCEL, id=backfill_id)["cancelPartitionBackfill"]
        assert answer == {"__typename": "CancelBackfillSuccess"}

    def launch(self, job: str, first: str, last: str) -> str:
        """A run of a job over a range of partitions, as a schedule asks for it; returns its id."""
        tags = {ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}
        selector = {"repositoryLocationName": LOCATION, "repositoryName": "__repository__", "jobName": job}
        metadata = {"tags": [{"key": key, "value": value} for key, value in tags.items()]}
        launched = self._ask(LAUNCH_RUN, selector=selector, metadata=metadata)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return str(launched["run"]["runId"])

    def status(self, backfill_id: str) -> tuple[str, dict[str, tuple[int, int, int, int]]]:
        """What the page of a backfill shows: its status, and of each asset how many partitions it is of, and how many
        are under way, made and failed."""
        shown = self._ask(STATUS, id=backfill_id)["partitionBackfillOrError"]
        return shown["status"], {
            s["assetKey"]["path"][-1]: (
                s["numPartitionsTargeted"],
                s["numPartitionsInProgress"],
                s["numPartitionsMaterialized"],
                s["numPartitionsFailed"],
            )
            for s in shown["assetBackfillData"]["assetBackfillStatuses"]
        }

    def runs_of(self, backfill_id: str) -> list[dg.DagsterRun]:
        return list(self._deployment.instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill_id})))

    def tick(self) -> None:
        """One round of what the daemon does for backfills and queued runs."""
        for said in (*execute_backfill_iteration(self._process, self._log), *self._queue.run_iteration(self._process)):
            assert not isinstance(said, SerializableErrorInfo), said

    def run_until(self, condition: Callable[[], object], what: str, limit_s: float = 600) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"timed out waiting for {what}"
            self.tick()
            time.sleep(0.5)

    def _ask(self, query: str, **variables: Any) -> dict[str, Any]:
        with warnings.catch_warnings():
            # Dagster asks a deprecated function of its own for the assets of a backfill.
            warnings.simplefilter("ignore", DeprecationWarning)
            answer = execute_dagster_graphql(self._process.create_request_context(), query, variables=variables)
        return dict(answer.data)


@contextmanager
def dagster_daemon(deployment: Deployment) -> Iterator[Daemon]:
    file = write_definitions(deployment)
    target = PythonFileTarget(
        python_file=str(file), attribute=None, working_directory=str(file.parent), location_name=LOCATION
    )
    with WorkspaceProcessContext(deployment.instance, target) as process:
        yield Daemon(deployment, process)

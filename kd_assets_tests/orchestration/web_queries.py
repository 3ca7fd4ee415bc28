"""What the web UI asks for, asked as it does: GraphQL over a deployment's definitions, in this process."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster_graphql.test.utils import execute_dagster_graphql

from kd_assets_tests.orchestration.deployment import Deployment, write_definitions

ASSET = """
query Asset($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) { ... on AssetNode {
    partitionStats { numPartitions numMaterialized numFailed }
    assetChecksOrError { ... on AssetChecks { checks {
      name
      executionForLatestMaterialization { status evaluation { success severity description } }
      partitionStatuses { ... on AssetCheckDefaultPartitionStatuses {
        succeededPartitions failedPartitions inProgressPartitions skippedPartitions executionFailedPartitions
      } }
    } } }
  } }
}
"""

LAUNCH_RUN = """
mutation Launch($selector: JobOrPipelineSelector!, $metadata: ExecutionMetadata) {
  launchRun(executionParams: {selector: $selector, executionMetadata: $metadata}) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
  }
}
"""

PARTITIONS_TAB = """
query Partitions($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) { ... on AssetNode {
    assetPartitionStatuses { ... on DefaultPartitionStatuses {
      materializedPartitions failedPartitions unmaterializedPartitions materializingPartitions
    } }
  } }
}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownCheck:
    """A check as an asset's page shows it."""

    partitions: dict[str, list[str]]
    """Status → the partitions that have it; without those that none has."""
    status: str | None
    """Of its last execution, if that was of the last materialization."""
    description: str
    severity: str | None


class WebQueries:
    def __init__(self, deployment: Deployment, process: WorkspaceProcessContext) -> None:
        self._deployment, self._process = deployment, process

    def asset(self, name: str) -> dict[str, Any]:
        return self._ask(ASSET, name)

    def partitions_tab(self, name: str) -> dict[str, list[str]]:
        """Status → the partitions that have it, as the tab of an asset's partitions shows them."""
        return dict(self._ask(PARTITIONS_TAB, name)["assetPartitionStatuses"])

    def _ask(self, query: str, name: str) -> dict[str, Any]:
        key = {"path": list(self._deployment.recipe.key(name).path)}
        with partition_loading_context(dynamic_partitions_store=self._deployment.instance):
            answer = execute_dagster_graphql(self._process.create_request_context(), query, variables={"key": key})
        return dict(answer.data["assetNodeOrError"])

    def partitions(self, name: str) -> tuple[int, int, int]:
        """How many partitions an asset has, how many of them are materialized, and how many have failed."""
        stats = self.asset(name)["partitionStats"]
        return stats["numPartitions"], stats["numMaterialized"], stats["numFailed"]

    def checks(self, name: str) -> dict[str, ShownCheck]:
        return {c["name"]: _shown(c) for c in self.asset(name)["assetChecksOrError"]["checks"]}


def _shown(check: dict[str, Any]) -> ShownCheck:
    execution = check["executionForLatestMaterialization"]
    evaluation = (execution or {}).get("evaluation") or {}
    statuses = check["partitionStatuses"] or {}
    return ShownCheck(
        partitions={name.removesuffix("Partitions"): keys for name, keys in statuses.items() if keys},
        status=None if execution is None else execution["status"],
        description=evaluation.get("description", ""),
        severity=evaluation.get("severity"),
    )


@contextmanager
def web_queries(deployment: Deployment) -> Iterator[WebQueries]:
    file = write_definitions(deployment)
    target = LoadableTargetOrigin(
        executable_path=sys.executable, python_file=str(file), working_directory=str(file.parent), attribute=None
    )
    origin = InProcessCodeLocationOrigin(loadable_target_origin=target, location_name="tiny")
    instance: dg.DagsterInstance = deployment.instance
    with warnings.catch_warnings():
        # Dagster reads a deprecated property of its own schedules when it loads them in this process.
        warnings.simplefilter("ignore", DeprecationWarning)
        with WorkspaceProcessContext(instance, InProcessWorkspaceLoadTarget(origin)) as process:
            yield WebQueries(deployment, process)

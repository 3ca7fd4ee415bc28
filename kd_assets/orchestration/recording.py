"""What Dagster is told of a committed result: one materialization with metadata and provenance, and its checks.

The manifest on disk is the only source; an event of a job never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.contract import CACHES, Asset, Output, WorkUnit
from kd_assets.orchestration.dagster_internals import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    CheckTarget,
    input_tags,
)
from kd_assets.orchestration.recipe import SHARD_PLAN, SHARDS_MANIFEST, Recipe
from kd_assets.store import (
    CheckResult,
    Manifest,
    check_complete,
    check_finite,
    check_recomputed,
    check_schema,
    read_manifest,
)
from kd_assets.store.fingerprint import INPUT_KEY

CHECKS: dict[str, str] = {
    "complete": "Documents and tokens of the part files equal those of the shards manifest.",
    "schema": "Every part file has exactly the schema of FORMAT.md.",
    "finite": "No stored number is NaN or infinite; kept probabilities add up to at most 1.",
    "recomputed": "A seeded sample of documents, computed again one at a time with a plain log_softmax, agrees.",
}


class Recorder:
    """Records each result at most once in a run, and remembers which checks failed."""

    def __init__(
        self, context: dg.AssetExecutionContext, recipe: Recipe, *, plan_hash: str, teacher_version: str | None
    ) -> None:
        """`plan_hash` and `teacher_version` are the data versions of the shard plan and of the asset that makes the
        teacher (None where no asset does) that this run works from."""
        self._context, self._recipe = context, recipe
        self._plan_hash, self._teacher_version = plan_hash, teacher_version
        self._recorded: set[tuple[str, Asset]] = set()
        self.failed_checks: dict[str, list[str]] = {}
        """Partition key → what failed, in words."""

    def record(self, unit: WorkUnit, output: Output, *, reused: bool, facts: Mapping[str, Any]) -> None:
        """Log the materialization and the checks of one committed output, unless this run already has.

        `facts` are metadata of this run rather than of the result: where the log is, for instance.
        """
        if (unit.partition_key, output.asset) in self._recorded:
            return
        folder = Path(output.path)
        manifest = read_manifest(folder)
        self._context.log_event(
            dg.AssetMaterialization(
                self._recipe.key(output.asset),
                partition=unit.partition_key,
                metadata=result_metadata(manifest, folder) | {"reused": reused} | dict(facts),
                tags=self._tags(output.asset, manifest),
            )
        )
        self._recorded.add((unit.partition_key, output.asset))
        if output.asset in CACHES:
            self.record_checks(unit, output)

    def _tags(self, asset: Asset, manifest: Manifest) -> dict[str, str]:
        tags = {
            DATA_VERSION_TAG: manifest.data_version,
            CODE_VERSION_TAG: self._recipe.code_version(asset),
        }
        for upstream, data_version in self._upstream_versions(asset, manifest):
            tags |= input_tags(upstream, data_version, self._latest_storage_id(upstream, manifest.partition_key))
        return tags

    def _upstream_versions(self, asset: Asset, manifest: Manifest) -> list[tuple[dg.AssetKey, str]]:
        """The inputs a result stands for, with their data versions. A reused shard stands for today's plan, whichever
        plan it was made under: its content is what today's plan names."""
        recipe = self._recipe
        if asset == SHARDS_MANIFEST:
            versions = [(recipe.key(SHARD_PLAN), self._plan_hash)]
        else:
            versions = [(recipe.key(SHARDS_MANIFEST), str(manifest.identity[INPUT_KEY]))]
        if recipe.teacher_asset is not None and self._teacher_version is not None:
            versions.append((recipe.teacher_asset, self._teacher_version))
        return versions

    def _latest_storage_id(self, key: dg.AssetKey, partition_key: str) -> int | None:
        partitioned = key == self._recipe.key(SHARDS_MANIFEST)
        records = self._context.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition_key] if partitioned else None), limit=1
        ).records
        return records[0].storage_id if records else None

    def record_checks(self, unit: WorkUnit, output: Output) -> None:
        """Log the selected checks of one committed cache; its materialization must be recorded."""
        partition_key, asset, folder = unit.partition_key, output.asset, Path(output.path)
        (shard_folder,) = unit.inputs[SHARDS_MANIFEST]
        key = self._recipe.key(asset)
        wanted = {c.name for c in self._context.selected_asset_check_keys if c.asset_key == key}
        if not wanted:
            return
        records = self._context.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition_key]), limit=1
        ).records
        # Without the target Dagster shows no status at the partition.
        target = (
            CheckTarget(run_id=records[0].run_id, storage_id=records[0].storage_id, timestamp=records[0].timestamp)
            if records
            else None
        )
        for result in check_results(folder, Path(shard_folder)):
            if result.name not in wanted:
                continue
            self._context.log_event(
                dg.AssetCheckEvaluation(
                    asset_key=key,
                    check_name=result.name,
                    passed=result.passed,
                    partition=partition_key,
                    description=result.description,
                    metadata=dict(result.numbers),
                    target_materialization_data=target,
                )
            )
            if not result.passed:
                self.failed_checks.setdefault(partition_key, []).append(
                    f"{asset}: check {result.name} failed: {result.description}"
                )


def check_results(folder: Path, shard_folder: Path) -> list[CheckResult]:
    """The four checks of a cache's partition, computed now from its files."""
    return [
        check_complete(folder, shard_folder),
        check_schema(folder),
        check_finite(folder),
        check_recomputed(folder),
    ]


def check_specs(recipe: Recipe, partitions: dg.PartitionsDefinition[str]) -> list[dg.AssetCheckSpec]:
    return [
        dg.AssetCheckSpec(name, asset=recipe.key(asset), description=description, partitions_def=partitions)
        for asset in recipe.caches
        for name, description in CHECKS.items()
    ]


def result_metadata(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What the web UI shows of a committed result, the most telling first. Numbers stay numbers: Dagster plots them."""
    facts, provenance = manifest.facts, manifest.provenance
    metadata: dict[str, Any] = {}
    if manifest.n_documents:
        metadata |= {
            "dagster/partition_row_count": manifest.n_documents,
            "documents": manifest.n_documents,
            "tokens": manifest.n_tokens,
            "bytes_per_token": round(manifest.n_bytes / manifest.n_tokens, 2),
        }
    metadata["bytes"] = manifest.n_bytes
    for name in ("tokens_per_s", "wall_s", "joules", "peak_memory_gib", "padding_fraction", "n_bad_records"):
        value = facts.get(name, provenance.get(name))
        if value is not None:
            metadata[name] = value
    metadata |= {
        "dagster/uri": str(folder),
        "folder": dg.MetadataValue.path(str(folder)),
        "variant": manifest.variant,
        "fingerprint": manifest.fingerprint,
        "data_version": manifest.data_version,
    }
    for name in ("teacher", "host", "device", "gpu", "slurm_job_id", "attempt", "code_commit"):
        if provenance.get(name) is not None:
            metadata[name] = provenance[name]
    metadata |= {
        "parameters": dg.MetadataValue.json(dict(manifest.identity)),
        "statistics": dg.MetadataValue.json(dict(manifest.stats)),
        "facts": dg.MetadataValue.json({k: v for k, v in facts.items() if k not in metadata}),
        "provenance": dg.MetadataValue.json(dict(provenance)),
    }
    return metadata


def latest_data_version(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    """The data version an unpartitioned asset's last materialization gave; None when there is none."""
    records = instance.fetch_materializations(key, limit=1).records
    if not records or records[0].asset_materialization is None:
        return None
    return (records[0].asset_materialization.tags or {}).get(DATA_VERSION_TAG)

"""Jobs of the kind `export` over made-up caches, without a control plane."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_assets.contract import CACHES, Asset, ExportParams, JobFile, Output, Reporter, WorkUnit
from kd_assets.store import FORMAT_VERSION, Manifest, committed, plan_output, read_manifest
from kd_assets.store.computing_versions import computing_versions
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import Task
from kd_assets_tests.export import made_up

KEY = "made-up-00000"


def output_of(store: Path, params: ExportParams, folders: Mapping[Asset, Path], key: str = KEY) -> Output:
    """As the planner names it."""
    manifests = {asset: read_manifest(folder) for asset, folder in folders.items()}
    identity = {
        "asset": params.asset,
        "format_version": FORMAT_VERSION,
        **computing_versions(params.asset, {}),
        "params": params.content(),
        "caches": {asset: manifest.variant for asset, manifest in manifests.items()},
        "input": {
            asset: {"fingerprint": manifest.fingerprint, "data_version": manifest.data_version}
            for asset, manifest in manifests.items()
        },
    }
    return plan_output(params.asset, identity, recipe_folder=store / made_up.RECIPE, partition_key=key)


def job_of(
    store: Path,
    folders: Mapping[Asset, Path],
    exports: Sequence[ExportParams] = (ExportParams(asset="export_hf"),),
    key: str = KEY,
) -> JobFile:
    """One task that makes these exports of one partition."""
    unit = WorkUnit(
        partition_key=key,
        inputs={asset: (str(folders[asset]),) for asset in CACHES if asset in folders},
        outputs=tuple(output_of(store, params, folders, key) for params in exports),
    )
    return JobFile(
        kind="export",
        recipe=made_up.RECIPE,
        key="0" * 32,
        recipe_folder=str(store / made_up.RECIPE),
        events_folder=str(store / "events"),
        tasks=((0,),),
        units=(unit,),
        exports=tuple(exports),
        provenance={"sources": []},
    )


def run(job: JobFile, events: Path | None = None) -> int:
    """Run the job's one task here; returns its exit status."""
    with Reporter(events, stream=io.StringIO()) as report:
        return Task(job, job.units, report, StopFlag()).run()


def results(job: JobFile) -> list[tuple[Path, Manifest | None]]:
    """Folder and manifest of each output."""
    outputs = [output for unit in job.units for output in unit.outputs]
    return [(Path(output.path), committed(Path(output.path), output.fingerprint)) for output in outputs]


def main(argv: Sequence[str]) -> int:
    """Run the job in a file, in a process of its own: one that can be killed."""
    from kd_assets.contract import read_job

    return run(read_job(Path(argv[1])), Path(argv[2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))

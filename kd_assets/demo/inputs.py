"""The demo's inputs as assets: the corpus that every CPython carries, and a small teacher trained on it on the spot.

Everything downstream of them is the ordinary recipe beside this file. Both are made by programs of the compute
environment, since this process imports no torch; both are kept and reused.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.model_files.digests import cached_sha256
from kd_assets.model_files.fingerprints import tokenizer_fingerprint, weights_fingerprint
from kd_assets.orchestration.platform import PROJECT_FOLDER, Platform
from kd_assets.store import fingerprint

GROUP = "demo"


class DemoInputs(dg.Component, dg.Model, dg.Resolvable):
    """`demo/corpus` and `demo/teacher`, in KD_HOME/inputs/demo."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        return dg.Definitions(
            assets=[corpus, teacher],
            jobs=[
                dg.define_asset_job(
                    "demo_inputs",
                    selection=dg.AssetSelection.assets(corpus, teacher),
                    description="Write the demo's corpus and train its teacher.",
                )
            ],
        )


def inputs_folder(platform: Platform) -> Path:
    return platform.home_folder / "inputs" / "demo"


@dg.asset(
    key=["demo", "corpus"],
    group_name=GROUP,
    kinds={"python", "dataset"},
    backfill_policy=dg.BackfillPolicy.single_run(),
    description="Python's reference text (pydoc_data.topics) as plain documents and as chats. PSF licence.",
)
def corpus(context: dg.AssetExecutionContext, platform: Platform) -> dg.MaterializeResult[None]:
    folder = inputs_folder(platform) / "corpus"
    last = run_program(context, platform, ["kd_assets.demo.corpus", "--out", str(folder)])
    files = sorted(folder.glob("*.jsonl"))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(fingerprint({f.name: cached_sha256(f, None) for f in files})),
        metadata={**scalars(last), "folder": dg.MetadataValue.path(str(folder))},
    )


@dg.asset(
    key=["demo", "teacher"],
    deps=[corpus],
    group_name=GROUP,
    kinds={"pytorch", "huggingface"},
    backfill_policy=dg.BackfillPolicy.single_run(),
    description="A small Llama-architecture model trained on the corpus.",
)
def teacher(context: dg.AssetExecutionContext, platform: Platform) -> dg.MaterializeResult[None]:
    folder = inputs_folder(platform) / "teacher"
    corpus_folder = inputs_folder(platform) / "corpus"
    last = run_program(
        context, platform, ["kd_assets.demo.teacher", "--corpus", str(corpus_folder), "--out", str(folder)]
    )
    weights, tokenizer = weights_fingerprint(folder, None), tokenizer_fingerprint(folder, None)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(fingerprint({"weights": weights, "tokenizer": tokenizer})),
        metadata={
            **scalars(last),
            "weights_fingerprint": weights,
            "tokenizer_fingerprint": tokenizer,
            "folder": dg.MetadataValue.path(str(folder)),
        },
    )


def run_program(
    context: dg.AssetExecutionContext, platform: Platform, module_and_args: Sequence[str]
) -> dict[str, Any]:
    """Run a module of ours in the compute environment, its JSON lines into the log; returns the last of them."""
    last: dict[str, Any] = {}
    lines: list[str] = []
    with subprocess.Popen(
        [platform.compute_python, "-m", *module_and_args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=PROJECT_FOLDER,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},  # as slurm/task.sbatch, and for its reason
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                context.log.info(line.rstrip())
                lines.append(line.rstrip())
                if line.startswith("{"):
                    last = json.loads(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise dg.Failure(
            description=f"{module_and_args[0]} ended with status {process.returncode}:\n" + "\n".join(lines[-12:])
        )
    return last


def scalars(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if isinstance(v, (int, float, str, bool))}

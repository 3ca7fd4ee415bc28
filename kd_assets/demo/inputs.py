"""The demo's inputs as assets: the corpus that every CPython carries, and a small teacher trained on it on the spot.

Everything downstream of them is the ordinary recipe beside this file. Both are made by programs of the compute
environment, since this process imports no torch; both are kept and reused.
"""

import json
import os
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.durable import atomic_write, read_if_there
from kd_assets.model_files.digests import cached_sha256
from kd_assets.model_files.fingerprints import tokenizer_fingerprint, weights_fingerprint
from kd_assets.orchestration.kept_records import require_kept_records
from kd_assets.orchestration.platform import PROJECT_FOLDER, Platform
from kd_assets.orchestration.recording.loss_picture import loss_picture_markdown
from kd_assets.orchestration.run import as_failure
from kd_assets.store import fingerprint

GROUP = "demo"
SHOWN = (
    *("held_out_loss", "unigram_loss", "uniform_loss", "train_loss"),
    *("steps", "n_parameters", "tokens_per_s", "wall_s", "reused"),
)
"""Of what a training says at its end, rows of their own in the teacher's metadata."""


class DemoInputs(dg.Component, dg.Model, dg.Resolvable):
    """`demo/corpus` and `demo/teacher`, in KD_HOME/inputs/demo."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dg.BetaWarning)  # backfill policies, as in `TeacherCaches.build_defs`
            corpus, teacher = corpus_asset(), teacher_asset()
            job = dg.define_asset_job(
                "demo_inputs",
                selection=dg.AssetSelection.assets(corpus, teacher),
                description="Write the demo's corpus and train its teacher.",
            )
            return dg.Definitions(assets=[corpus, teacher], jobs=[job])


def inputs_folder(platform: Platform) -> Path:
    return platform.home_folder / "inputs" / "demo"


def corpus_asset() -> dg.AssetsDefinition:
    @dg.asset(
        key=["demo", "corpus"],
        group_name=GROUP,
        kinds={"python", "dataset"},
        backfill_policy=dg.BackfillPolicy.single_run(),
        description="Python's reference text (pydoc_data.topics) as plain documents and as chats. PSF licence.",
    )
    def corpus(
        context: dg.AssetExecutionContext, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> dg.MaterializeResult[None]:
        folder = inputs_folder(kd_assets_platform) / "corpus"
        last = run_program(context, kd_assets_platform, ["kd_assets.demo.corpus", "--out", str(folder)])[-1]
        files = sorted(folder.glob("*.jsonl"))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(fingerprint({f.name: cached_sha256(f, None) for f in files})),
            metadata={**scalars(last), "folder": dg.MetadataValue.path(str(folder))},
        )

    return corpus


def teacher_asset() -> dg.AssetsDefinition:
    @dg.asset(
        key=["demo", "teacher"],
        deps=[dg.AssetKey(["demo", "corpus"])],
        group_name=GROUP,
        kinds={"pytorch", "huggingface"},
        backfill_policy=dg.BackfillPolicy.single_run(),
        description="A small Llama-architecture model trained on the corpus.",
    )
    def teacher(
        context: dg.AssetExecutionContext, kd_assets_platform: dg.ResourceParam[Platform]
    ) -> dg.MaterializeResult[None]:
        folder = inputs_folder(kd_assets_platform) / "teacher"
        corpus_folder = inputs_folder(kd_assets_platform) / "corpus"
        said = run_program(
            context,
            kd_assets_platform,
            ["kd_assets.demo.teacher", "--corpus", str(corpus_folder), "--out", str(folder)],
        )
        curve = training_curve(said, inputs_folder(kd_assets_platform) / "teacher_curve.json")
        summary = scalars(said[-1])
        weights, tokenizer = weights_fingerprint(folder, None), tokenizer_fingerprint(folder, None)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(fingerprint({"weights": weights, "tokenizer": tokenizer})),
            metadata={
                **({} if curve is None else {"loss_curve": dg.MetadataValue.md(curve)}),
                **{name: summary[name] for name in SHOWN if name in summary},
                "folder": dg.MetadataValue.path(str(folder)),
                "provenance": dg.MetadataValue.json(
                    {name: value for name, value in summary.items() if name not in SHOWN}
                    | {"weights_fingerprint": weights, "tokenizer_fingerprint": tokenizer}
                ),
            },
        )

    return teacher


def run_program(
    context: dg.AssetExecutionContext, platform: Platform, module_and_args: Sequence[str]
) -> list[dict[str, Any]]:
    """Run a module of ours in the compute environment, its JSON lines into the log; returns them, and at least one."""
    with as_failure():
        require_kept_records(context, platform)
    said: list[dict[str, Any]] = []
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
                    said.append(json.loads(line))
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise dg.Failure(
            description=f"{module_and_args[0]} ended with status {process.returncode}:\n" + "\n".join(lines[-12:])
        )
    return said or [{}]


def training_curve(said: Sequence[dict[str, Any]], file: Path) -> str | None:
    """The picture of a training's loss, by what it says as it goes on; of one that is reused, by what was kept of it in
    `file`. None where neither is there."""
    points = [line for line in said if line.get("event") == "progress"]
    curve = {"steps": [p["step"] for p in points], "loss": [p["loss"] for p in points]}
    if points:
        atomic_write(file, json.dumps(curve).encode())
    elif (kept := read_if_there(file)) is not None:
        curve = json.loads(kept)
    return loss_picture_markdown(curve, of="the teacher") if len(curve["steps"]) > 1 else None


def scalars(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if isinstance(v, (int, float, str, bool))}

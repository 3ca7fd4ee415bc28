"""A small production to disturb: the golden store's texts and chats in a home of its own, and runs over it.

Everything is of the product but the teacher, which remembers: what it would compute it reads from the undisturbed home,
byte for byte, so that a round costs milliseconds. What it does not remember the real one computes. (The rounds at whole
runs have the real teacher in a share of them.)
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from kd_assets.components import TeacherCaches
from kd_assets.contract import CACHES, JobFile, Output, Reporter, WorkUnit
from kd_assets.durable import atomic_write
from kd_assets.model_files.digests import SETTLED_NS, DigestCache
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.recipes.recipe import Recipe
from kd_assets.store import ResultWriter, read_manifest, read_shard
from kd_assets.store.document_index import DocumentRows, index_bytes, together
from kd_assets.store.layout import INDEX_NAME
from kd_assets.store.partfile import PartFile
from kd_assets.teacher.model.load import check_fingerprint
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import Runner, runner_for
from kd_assets_tests.golden.facts import FOLDER as GOLDEN
from kd_assets_tests.golden.facts import RECIPE

ASSETS = ("shards_manifest", *CACHES)
KEYS = (f"{RECIPE}-00000", f"{RECIPE}-00001")
SOURCES = ("texts", "chats")


@dataclass(frozen=True)
class Home:
    """A KD_HOME of the recipe."""

    folder: Path

    @cached_property
    def recipe(self) -> Recipe:
        return TeacherCaches(**recipe_attributes()).to_recipe()

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def recipe_folder(self) -> Path:
        return self.store / RECIPE

    def planner(self) -> Planner:
        """A new one, as each run has."""
        digests, variables = DigestCache(self.folder / "digests.json"), {"KD_HOME": str(self.folder)}
        return Planner(self.recipe, self.recipe_folder, digests, variables)

    def shards_work(self) -> PlannedWork:
        return self.planner().shards_work(KEYS)

    def teacher_work(self) -> PlannedWork:
        return self.planner().teacher_work(KEYS, self.recipe.caches)


def warm_up() -> None:
    """Import what a worker imports late, so that forks of this process need not."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(GOLDEN / "teacher")
    importlib.import_module("kd_assets.sources.shards")
    importlib.import_module("kd_assets.teacher.runner")
    importlib.import_module("kd_assets.worker.telemetry.sampler")


def recipe_attributes() -> dict[str, Any]:
    """The golden recipe without its table and its student: two partitions, one of them in two parts a cache."""
    attributes: dict[str, Any] = yaml.safe_load((GOLDEN / "defs.yaml").read_text())["attributes"]
    # Its texts were planned when control tokens in them were tokens.
    attributes["sources"] = [s | {"control_tokens": "tokens"} for s in attributes["sources"] if s["name"] in SOURCES]
    del attributes["student"]
    return attributes


def make_inputs(folder: Path) -> Home:
    """A home with teacher, sources and plan, and no results."""
    folder.mkdir(parents=True)
    shutil.copytree(GOLDEN / "teacher", folder / "teacher", copy_function=shutil.copyfile)
    (folder / "sources").mkdir()
    for name in SOURCES:
        shutil.copyfile(GOLDEN / "sources" / f"{name}.jsonl", folder / "sources" / f"{name}.jsonl")
    home = Home(folder)
    home.planner().make_plan()
    return home


def remember_digests(home: Home) -> None:
    """Have the digests of the teacher's files kept in digests.json, where files that just changed are not."""
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    home.planner().teacher()


def make_home(folder: Path) -> Home:
    """A home whose two partitions are committed."""
    home = make_inputs(folder)
    for asset in ASSETS:
        for path in (GOLDEN / "store" / RECIPE / asset).glob("*/*"):
            if path.name in KEYS:
                shutil.copytree(path, home.recipe_folder / path.relative_to(GOLDEN / "store" / RECIPE))
    lines = (GOLDEN / "store" / RECIPE / "audit.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["asset"] in ASSETS and json.loads(line)["partition_key"] in KEYS]
    (home.recipe_folder / "audit.jsonl").write_text("".join(kept))
    for manifest_file in home.recipe_folder.rglob("manifest.json"):
        write_index(manifest_file.parent)
    return home


def write_index(folder: Path) -> None:
    """As a commit writes it: the golden store is older than indexes."""
    manifest, rows = read_manifest(folder), []
    for record in manifest.parts:
        with PartFile(folder / record.name) as part:
            rows.append(DocumentRows.of(part.read(["document_id", "n_tokens"])))
            schema = part.schema
    data = index_bytes(asset=manifest.asset, data_version=manifest.data_version, schema=schema, rows=together(rows))
    atomic_write(folder / INDEX_NAME, data)


def outputs_of(home: Home) -> dict[tuple[str, str], Output]:
    """(asset, partition) → the result that the recipe asks for; of a home whose shards are committed."""
    works = (home.shards_work(), home.teacher_work())
    return {(o.asset, u.partition_key): o for work in works for u in work.units for o in u.outputs}


class RememberingTeacher:
    """See `kd_assets.worker.task.Runner`. A fake: it writes the rows of the undisturbed home as its own, one part after
    the other, and notes in `computed` when it begins one and when it has it on disk."""

    def __init__(
        self, job: JobFile, report: Reporter, stop: StopFlag, *, remembered: Mapping[str, Path], computed: Path | None
    ) -> None:
        """`remembered`: fingerprint → undisturbed result folder."""
        assert job.teacher is not None
        check_fingerprint(Path(job.teacher.model), job.teacher, None)
        self._job, self._report, self._stop = job, report, stop
        self._remembered, self._computed = remembered, computed
        self._real: Runner | None = None
        report.emit("teacher_loaded", load_s=0.0, device="none", gpu=None, n_parameters=0)

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        read_shard(Path(unit.inputs["shards_manifest"][0]))
        if any(output.fingerprint not in self._remembered for output in unit.outputs):
            self._real = self._real or runner_for(self._job, self._report, self._stop)
            return self._real.run(unit)
        for output in unit.outputs:
            self._write(output, unit.partition_key)
        return {"partition_key": unit.partition_key}

    def _write(self, output: Output, partition_key: str) -> None:
        source = self._remembered[output.fingerprint]
        manifest = read_manifest(source)
        with ResultWriter(
            output,
            recipe=self._job.recipe,
            recipe_folder=Path(self._job.recipe_folder),
            partition_key=partition_key,
        ) as result:
            for record in manifest.parts:
                if record.index in result.finished:
                    continue
                name = f"{output.asset}/{partition_key}/{record.index}"
                self._note(f"begun {name}")
                with PartFile(source / record.name) as part:
                    rows = part.read(part.schema.names)
                result.write_part(record.index, rows, n_tokens=record.n_tokens, stats=record.stats)
                self._note(f"finished {name}")
            result.commit(
                parts=len(manifest.parts),
                checks=manifest.checks,
                provenance=self._job.provenance,
                facts=manifest.facts,
            )

    def _note(self, line: str) -> None:
        """Outside the home, so that no disturbance counts it."""
        if self._computed is not None:
            with self._computed.open("a") as file:
                file.write(line + "\n")

    def close(self) -> None:
        if self._real is not None:
            self._real.close()

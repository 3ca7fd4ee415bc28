"""A deployment whose jobs run on a real SLURM cluster: twelve tokenised shards, and a stub or a tiny real teacher."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np

from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.platform import Platform
from kd_assets.scheduler import SlurmScheduler, Submission
from kd_assets.store import Documents, ResultWriter, encode_shard, part_stats
from kd_assets_tests.orchestration.deployment import WORDS, Deployment, documents
from kd_assets_tests.slurm.cluster import SlurmCluster
from kd_assets_tests.slurm.stub_teacher import DOCUMENTS_PER_PART, write_python

N_SHARDS = 12
DOCUMENTS_PER_SHARD = 6
PARTS_OF_A_PARTITION = DOCUMENTS_PER_SHARD // DOCUMENTS_PER_PART


def key(i: int) -> str:
    """The partition key of a shard."""
    return f"tiny-{i:05d}"


KEYS = tuple(key(i) for i in range(N_SHARDS))
ALL = (KEYS[0], KEYS[-1])
FIRST_WORD = 2
"""Tokens 0 and 1 are those that begin and end a document."""
PROFILE = {
    "memory_gib": 0.5,  # the cluster's own default is so little that importing pyarrow thrashes, where cgroups limit it
    "poll_interval_s": 0.3,
    "command_timeout_s": 60,
    "visibility_grace_s": 1,
    "absence_grace_s": 6,
}


def one_token_a_word(texts: Mapping[str, str]) -> Documents:
    """Documents by their ids; the tokens are of the tiny teacher's vocabulary."""
    tokens = [[FIRST_WORD + WORDS.index(word) for word in text.split()] for text in texts.values()]
    input_ids = np.array([t for document in tokens for t in document], dtype=np.uint32)
    return Documents(
        document_ids=list(texts),
        offsets=np.cumsum([0, *(len(document) for document in tokens)], dtype=np.int64),
        input_ids=input_ids,
        loss_mask=np.ones(len(input_ids), dtype=np.bool_),
    )


def commit_shards(deployment: Deployment, keys: Sequence[str] | None = None) -> None:
    """Commit shards of the plan, all of them by default, with a token for each word: no tokenizer is loaded."""
    planner = planner_of(deployment.recipe, deployment.platform)
    texts = [json.loads(line)["text"] for line in deployment.corpus.read_text().splitlines()]
    plan, provenance = planner.current_plan(), planner.provenance("shards")
    for unit in planner.shards_work(list(keys or plan.keys)).units:
        (records,), (output,) = unit.records, unit.outputs
        rows = range(records.first_record, records.first_record + records.n_records)
        shard = one_token_a_word({f"d{i}": texts[i] for i in rows})
        table = encode_shard(shard, ["corpus"] * len(rows), np.array(rows, dtype=np.int64))
        with ResultWriter(
            output,
            recipe=deployment.recipe.name,
            recipe_folder=planner.recipe_folder,
            partition_key=unit.partition_key,
        ) as result:
            stats = part_stats(output.asset, table)
            result.write_part(0, table, n_tokens=shard.n_tokens, stats=stats)
            facts = {"n_documents": shard.n_documents, "n_tokens": shard.n_tokens}
            result.commit(parts=1, checks={}, provenance=provenance, facts=facts)


def _written_at(submission: Submission) -> float:
    """When its spec was, which is written once, before it is submitted; one without it is the newest."""
    try:
        return submission.spec_file.stat().st_mtime
    except FileNotFoundError:
        return math.inf


class SlurmDeployment(Deployment):
    """Shards of six documents each, in `n_tasks` tasks. Its plan is made; its shards are committed by
    `commit_shards`, since tokenising is not what is tested, and recorded by a run that finds them there."""

    def __init__(
        self,
        home: Path,
        tiny_teacher: Path,
        instance: dg.DagsterInstance,
        cluster: SlurmCluster,
        *,
        n_tasks: int = 3,
        concurrency: int | None = None,
        processes_per_task: int = 1,
        n_shards: int = N_SHARDS,
        documents_per_shard: int = DOCUMENTS_PER_SHARD,
        records_shards: bool = True,
        stub: bool = True,
        told: dict[str, Any] | None = None,
        profile: dict[str, Any] | None = None,
        slurm: dict[str, Any] | None = None,
        caches: dict[str, Any] | None = None,
        **attributes: Any,
    ) -> None:
        """`concurrency`: all tasks, if left out. `records_shards`: whether Dagster learns of the shards, too. `told`:
        what the stub is to do. `profile`: fields of the cluster profile. `slurm`: what the recipe asks for its teacher
        jobs. `caches`: which ones, top-k only by default."""
        home.mkdir(parents=True, exist_ok=True)
        self.cluster = cluster
        (home / "profile.yaml").write_text(json.dumps(PROFILE | (profile or {})))
        settings: dict[str, Any] = {"home": str(home), "slurm_profile": str(home / "profile.yaml")}
        if stub:
            settings["compute_python"] = str(write_python(home / "python"))
        super().__init__(
            home,
            tiny_teacher,
            instance,
            platform=Platform(scheduler="slurm", **settings),
            documents_per_shard=documents_per_shard,
            caches=caches or {"topk": {"k": 4, "max_length": 64}},
            jobs={
                "teacher": {
                    "n_tasks": n_tasks,
                    "concurrency": concurrency or n_tasks,
                    "processes_per_task": processes_per_task,
                    "slurm": slurm or {},
                }
            },
            **attributes,
        )
        self.tell(told or {})
        self.write(documents(n_shards * documents_per_shard))
        self.plan()
        self.commit_shards()
        if records_shards:
            assert self.run("shards_manifest", partition_range=(KEYS[0], key(n_shards - 1))).success

    def commit_shards(self) -> None:
        """Every shard of the plan."""
        commit_shards(self)

    def tell(self, told: dict[str, Any]) -> None:
        """What the stub teacher is to do from now on, see `stub_teacher`."""
        (self.home / "stub.json").write_text(json.dumps(told))

    @property
    def slurm(self) -> SlurmScheduler:
        """A scheduler of its own, as another process would have."""
        scheduler = self.platform.make_scheduler()
        assert isinstance(scheduler, SlurmScheduler)
        return scheduler

    def submissions(self) -> list[Submission]:
        """Of teacher jobs, oldest first."""
        found = [Submission(folder=f) for f in (self.home / "jobs" / "tiny").glob("teacher-*/[0-9]*")]
        return sorted(found, key=_written_at)

    def recorded(self, run_id: str) -> list[str]:
        """Partitions of the top-k cache that a run recorded, in order; one twice if it was recorded twice."""
        found = self.materializations(run_id, "topk_cache")
        return sorted(str(partition) for (_, partition), made in found.items() for _ in made)

    def n_made(self) -> dict[str, int]:
        """Partition → how often it was committed, by the audit log: a task that is killed right after a commit has no
        time for its event."""
        lines = (self.platform.recipe_folder(self.recipe.name) / "audit.jsonl").read_text().splitlines()
        commits = [json.loads(line) for line in lines]
        return dict(sorted(Counter(c["partition_key"] for c in commits if c["asset"] == "topk_cache").items()))

    def most_at_once(self) -> int:
        """The largest number of task processes at work at the same time."""
        changes = [(e.time, 1) for e in self.job_events("task_started")]
        changes += [(e.time, -1) for e in self.job_events("task_finished")]
        return max(accumulate(change for _, change in sorted(changes)))

    def alive(self) -> list[str]:
        """Tasks of this deployment that SLURM has in its queue, `14_3 RUNNING`."""
        return sorted(f"{job} {state}" for job, state in self._queue("--array", "--format=%F_%K %T|%Z"))

    def array_jobs(self) -> list[str]:
        """Ids and names of all jobs of this deployment that SLURM knows, ended ones too, arrays once."""
        return sorted({f"{job} {name}" for job, name in self._queue("--states=all", "--format=%F %j|%Z")})

    def arrays(self) -> list[dict[str, Any]]:
        """What was written of every sbatch of the newest job, with its answer, if it has one."""
        files = sorted((self.submissions()[-1].folder / "arrays").glob("[0-9][0-9][0-9][0-9].json"))
        records = [(json.loads(f.read_text()), f.with_suffix(".answer.json")) for f in files]
        return [intent | (json.loads(f.read_text()) if f.exists() else {}) for intent, f in records]

    def _queue(self, *options: str) -> list[list[str]]:
        """squeue's lines of our jobs, told by their working folder: other tests' jobs have the same names."""
        lines = (
            line.split("|", maxsplit=1)
            for line in self.cluster.run("squeue", "--noheader", *options).stdout.splitlines()
        )
        return [first.split() for first, folder in lines if folder.startswith(f"{self.home}/")]


def log_of(materialization: dg.AssetMaterialization) -> str:
    """Of the task that made it."""
    provenance: Any = materialization.metadata["provenance"].value
    return str(provenance["job"]["log"])

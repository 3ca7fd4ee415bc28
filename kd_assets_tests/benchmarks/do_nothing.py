"""The worker with a teacher that does nothing: every import of a teacher job, no model, a tiny real result a partition.

Everything else is the worker of production: lease, events, reading and verifying the shard, parts, manifest, commit.

Run in the place of `kd_assets.worker` by the program that `write_python` writes.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd_assets.contract import JobFile, Output, Reporter, WorkUnit
from kd_assets.store import Documents, ResultWriter, encode_embeddings, encode_hidden_states, part_stats, read_shard
from kd_assets.worker.main import main
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import Runner
from kd_assets_tests.slurm.stub_teacher import evenly_likely
from kd_assets_tests.store.examples import RECOMPUTED

IMPORTS = (
    "kd_assets.teacher.runner",
    "safetensors",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
"""What `kd_assets.worker.task.runner_for` and loading a Llama import, torch among them."""


class DoNothingTeacher:
    """See `kd_assets.worker.task.Runner`. Each result has one part: equally likely tokens, hidden states of zero."""

    def __init__(self, job: JobFile, report: Reporter) -> None:
        self._job = job
        report.emit("teacher_loaded", load_s=0.0, device="none", gpu=None, n_parameters=0)

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        shard = read_shard(Path(unit.inputs["shards_manifest"][0]))
        documents = shard.slice(0, len(shard.document_ids))
        for output in unit.outputs:
            rows = rows_of(output, documents)
            with ResultWriter(
                output,
                recipe=self._job.recipe,
                recipe_folder=Path(self._job.recipe_folder),
                partition_key=unit.partition_key,
            ) as result:
                result.write_part(0, rows, n_tokens=documents.n_tokens, stats=part_stats(output.asset, rows))
                result.commit(parts=1, checks={"recomputed": RECOMPUTED}, provenance=self._job.provenance)
        return {"partition_key": unit.partition_key}

    def close(self) -> None:
        return None


def rows_of(output: Output, documents: Documents) -> pa.Table:
    """All rows of a cache, for documents none of which is longer than its `max_length`."""
    params, hidden_size = output.identity["params"], 1
    match output.asset:
        case "topk_cache":
            return evenly_likely(documents, k=int(params["k"]))
        case "hidden_state_cache":
            zeros_NH = np.zeros((documents.n_tokens, hidden_size), dtype=np.uint16)
            return encode_hidden_states(documents, dict.fromkeys(params["blocks"], zeros_NH))
        case _:
            zeros_DH = np.zeros((documents.n_documents, hidden_size), dtype=np.float32)
            return encode_embeddings(documents, mean_DH=zeros_DH, last_token_DH=zeros_DH)


def make_runner(job: JobFile, report: Reporter, stop: StopFlag) -> Runner:
    """See `kd_assets.worker.task.runner_for`: imports only now, when a result is missing."""
    for name in IMPORTS:
        importlib.import_module(name)
    return DoNothingTeacher(job, report)


def write_python(path: Path, *, module: str = "kd_assets_tests.benchmarks.do_nothing") -> None:
    """A program to be named as the compute Python: `-m kd_assets.worker` becomes this module, or another."""
    python = shlex.quote(sys.executable)
    path.write_text(
        "#!/bin/bash\n"
        f'if [ "$2" = kd_assets.worker ]; then shift 2; exec {python} -m {module} "$@"; fi\n'
        f'exec {python} "$@"\n'
    )
    path.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main(sys.argv, make_runner=make_runner))

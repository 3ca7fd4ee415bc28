"""Makes the golden store:   python -m kd_assets_tests.golden.make FOLDER

Tests never run this: the store beside it was made once, in /tmp/kd-golden, on 2026-11-28 by the code of commit 2886d24,
and copied here with `cp -r FOLDER/. kd_assets_tests/golden/`. It stands for everything that was committed by the code
of then; made again, it would prove nothing of it. Host, user and kernel are replaced while it is made, as they would
stand in its manifests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd_assets.demo.tokenizer import train_tokenizer
from kd_assets_tests.golden.deployment import GoldenDeployment, write_project
from kd_assets_tests.golden.facts import EXPECTED_FILE, KEPT, facts_of
from kd_assets_tests.orchestration.deployment import failure_text

NAME = "golden"
"""Host and user in the manifests."""

NEUTRAL_MACHINE = f"""
import platform
import socket

socket.gethostname = lambda: "{NAME}"
platform.platform = lambda *_, **__: "Linux"
"""
"""A `sitecustomize` for the worker's processes."""

RECIPE_YAML = """\
# The recipe that the store beside it was made by. Never edited: it stands for recipes that others have.
type: kd_assets.components.TeacherCaches

attributes:
  recipe: golden
  description: Three tiny shards that were committed before.
  sources:
    - name: texts
      path: $KD_HOME/sources/texts.jsonl
      licence: CC0-1.0
      revision: v1
    - name: chats
      path: $KD_HOME/sources/chats.jsonl
      licence: CC0-1.0
    - name: table
      path: sources/table.parquet
      format: parquet
      text_field: body
  documents_per_shard: 4
  part_documents: 3
  teacher:
    model_id: $KD_HOME/teacher
    dtype: float32
    token_budget: 96
    compile: never
    seed: 7
  caches:
    topk: {k: 4, max_length: 24, draws: 6}
    hidden_states: {blocks: [1, 0], max_length: 6}
    embeddings: {max_length: 32}
  student: {steps: 20, batch_documents: 4, max_length: 24, hidden_size: 32, n_layers: 1, temperature: 1.0}
"""

TEXTS: list[dict[str, Any]] = [
    {"id": "fox", "text": "the quick brown fox jumps over a lazy dog and then it sleeps under an old tree"},
    {"id": 7, "text": "under the old tree the dog sleeps"},
    {
        "text": "Ünïcode: 狐 jumps over 🐕\nand then it sleeps by the river, and sleeps, and sleeps, "
        "and sleeps on and on"
    },
    {"id": "short", "text": "a fox"},
]
CHATS: list[dict[str, Any]] = [
    {
        "id": "who sleeps",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "who sleeps?"},
            {"role": "assistant", "content": "the dog"},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "where?"},
            {"role": "assistant", "content": "under the old tree"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": "it jumps"},
        ]
    },
    {
        "id": "tree",
        "messages": [{"role": "user", "content": "tree?"}, {"role": "assistant", "content": "by the river"}],
    },
]
ROWS: list[dict[str, Any]] = [
    {"id": "row a", "body": "the river sleeps", "unused": 1},
    {"id": "row b", "body": "an old fox jumps over the brown river and the dog", "unused": 2},
    {"id": "row c", "body": "then the quick dog jumps over the lazy fox", "unused": 3},
    {"id": "row d", "body": "sleeps and sleeps", "unused": 4},
]


def make_inputs(home: Path) -> None:
    """Recipe, sources and teacher: a random Llama of two blocks."""
    (home / "defs.yaml").write_text(RECIPE_YAML)
    sources = home / "sources"
    sources.mkdir()
    for name, records in (("texts", TEXTS), ("chats", CHATS)):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (sources / f"{name}.jsonl").write_text("".join(lines))
    pq.write_table(pa.Table.from_pylist(ROWS), sources / "table.parquet")
    tokenizer = train_tokenizer([str(TEXTS[0]["text"])] * 20, vocabulary=300)
    tokenizer.save_pretrained(home / "teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(home / "teacher")


def make_store(home: Path, work: Path) -> dict[str, Any]:
    """Plan and materialize everything; returns the facts. `work` is for what is not kept."""
    (work / "neutral").mkdir()
    (work / "neutral" / "sitecustomize.py").write_text(NEUTRAL_MACHINE)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(work / "neutral"), os.environ.get("PYTHONPATH", os.getcwd())])
    os.environ["LOGNAME"] = NAME
    project = work / "project"
    write_project(project, home / "defs.yaml")
    sys.path.insert(0, str(project))
    (work / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(work / "instance")) as instance:
        deployment = GoldenDeployment(home, project, instance)
        deployment.plan()
        keys = list(instance.get_dynamic_partitions(str(deployment.recipe.partitions.name)))
        result = deployment.run(*deployment.everything, partition_range=(keys[0], keys[-1]))
        assert result.success, failure_text(result)
        code_versions = {asset: deployment.recipe.code_version(asset) for asset in deployment.everything}
        return {"code_versions": code_versions} | facts_of(deployment.recipe_folder)


def drop_what_passes(home: Path) -> None:
    """Jobs, digests under time stamps, and leases: a store is whole without them."""
    for path in home.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for lease in home.rglob(".lease"):
        lease.unlink()


def refuse_traces(home: Path) -> None:
    """Raise when a file names this machine, its user or a folder of it."""
    traces = [socket.gethostname(), os.uname().release, sys.prefix, os.getcwd(), os.path.expanduser("~")]
    for path in filter(Path.is_file, home.rglob("*")):
        data = path.read_bytes()
        if found := [trace for trace in traces if len(trace) > 3 and trace.encode() in data]:
            raise ValueError(f"{path} names {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the golden store.")
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    home: Path = parser.parse_args().folder.absolute()
    home.mkdir()
    make_inputs(home)
    with tempfile.TemporaryDirectory() as work:
        facts = make_store(home, Path(work))
    drop_what_passes(home)
    (home / EXPECTED_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    refuse_traces(home)


if __name__ == "__main__":
    main()

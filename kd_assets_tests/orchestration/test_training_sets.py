"""One recipe over sources of different shapes and formats, from its YAML to caches and a student, for real."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]

from kd_assets.orchestration.recording.metadata import RECORDS
from kd_assets.sources.planning.plan import ShardPlan, read_plan
from kd_assets.store import CacheReader, Manifest, read_manifest, verify
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets_tests.orchestration.deployment import CACHES, Deployment, failure_text, is_reused
from kd_assets_tests.orchestration.training_sets import (
    N_COPIES,
    tool_chat,
    write_calendar_talk,
    write_docstrings,
    write_manual,
    write_names,
    write_tool_chats,
)

pytestmark = pytest.mark.slow

RECIPE = """
sources:
  - name: manual
    path: $KD_HOME/manual.jsonl.zst
    licence: PSF-2.0
    weight: 3
  - name: docstrings
    path: $KD_HOME/docstrings.parquet
    licence: PSF-2.0
    weight: 2
  - name: tool_chats
    path: $KD_HOME/chats/*.jsonl
    licence: CC0-1.0
    ignore_fields: [tool_call_id]
    weight: 2
  - name: names
    path: $KD_HOME/names.csv
    fields: {prompt: question, completion: answer}
    licence: Unicode-3.0
    weight: 1
  - name: calendar
    path: $KD_HOME/calendar talk.json
    licence: CC0-1.0
    weight: 1
tokens_per_shard: 2000
drop_duplicates: true
seed: 3
long_documents: split
overlap: 16
chat_template: $KD_HOME/qwen3.jinja
allowed_licences: [PSF-2.0, CC0-1.0, Unicode-3.0]
caches:
  topk: {k: 4, max_length: 256}
  hidden_states: {blocks: [1], max_length: 16}
  embeddings: {max_length: 256}
"""


@dataclass(frozen=True, kw_only=True)
class Trained:
    deployment: Deployment
    result: dg.ExecuteInProcessResult
    plan: ShardPlan
    written: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.deployment.platform.recipe_folder("tiny")

    def shard_manifests(self) -> list[Manifest]:
        return [read_manifest(folder) for folder in CacheReader(self.folder, "shards_manifest").folders]

    def learned(self) -> dict[str, str]:
        """Document → what is learned of it, as text; windows of one document together."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.deployment.attributes["teacher"]["model_id"])
        ids: dict[str, list[int]] = {}
        for document in documents_of(self.folder):
            name = document["document_id"].partition("/")[0]
            ids.setdefault(name, []).extend(document["input_ids"][document["loss_mask"]].tolist())
        return {name: str(tokenizer.decode(of_document)) for name, of_document in ids.items()}


def documents_of(recipe_folder: Path) -> list[dict[str, Any]]:
    reader = CacheReader(recipe_folder, "shards_manifest")
    return [reader[i] for i in range(len(reader))]


def write_sources(home: Path) -> dict[str, Any]:
    """Everything that the recipe names; returns what each source holds."""
    (home / "chats").mkdir()
    template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    (home / "qwen3.jinja").write_text(template)
    return {
        "manual": write_manual(home / "manual.jsonl.zst"),
        "docstrings": write_docstrings(home / "docstrings.parquet"),
        "tool_chats": write_tool_chats(home / "chats" / "tools 1.jsonl"),
        "names": write_names(home / "names.csv"),
        "calendar": write_calendar_talk(home / "calendar talk.json"),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[Trained]:
    """The recipe, carried out over all its partitions."""
    folder = tmp_path_factory.mktemp("training set")
    written = write_sources(folder)
    (folder / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(folder / "instance")) as instance:
        deployment = Deployment(folder, tiny_teacher, instance, **yaml.safe_load(RECIPE))
        deployment.plan()
        plan = read_plan(deployment.platform.recipe_folder("tiny") / "shard_plan" / "plan.json")
        assert plan is not None
        result = deployment.run(*deployment.everything, partition_range=(plan.keys[0], plan.keys[-1]))
        assert result.success, failure_text(result)
        yield Trained(deployment=deployment, result=result, plan=plan, written=written)


def test_the_recipe_runs_from_sources_to_a_student_and_every_check_passes(trained: Trained) -> None:
    recorded = trained.deployment.materializations(trained.result.run_id)
    keys = trained.plan.keys
    assert len(keys) >= 3
    of_shards = {(asset, key) for asset in ("shards_manifest", *CACHES) for key in keys}
    assert set(recorded) == {*of_shards, ("shard_plan", None), ("student_smoke", None)}
    checks = trained.deployment.checks(trained.result.run_id)
    assert len(checks) >= 4 * len(CACHES) * len(keys)
    assert all(check.passed for check in checks)
    assert not verify(trained.folder).problems


def test_every_shard_is_a_mixture_and_every_document_is_in_all_caches(trained: Trained) -> None:
    for shard in trained.plan:
        assert {records.source for records in shard.records} == set(trained.written)
    documents = [document["document_id"] for document in documents_of(trained.folder)]
    dataset = TeacherCacheDataset.from_recipe(trained.folder)
    assert [document for _, document in dataset.keys] == documents
    assert len(documents) == len(set(documents)) == len(dataset)
    assert all(len(dataset[i]["topk_logprobs"]) for i in range(0, len(dataset), 7))


def test_what_is_learned_is_what_the_assistant_said_as_the_model_would_have_said_it(trained: Trained) -> None:
    learned = trained.learned()
    chats = [chat for chat in trained.written["tool_chats"] if f"{chat['id']}#1" in learned]
    assert chats
    for chat in chats:
        call = chat["messages"][2]["tool_calls"][0]["function"]
        arguments = call["arguments"]
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        result = chat["messages"][3]["content"]
        assert [learned[f"{chat['id']}#{turn}"] for turn in (1, 2, 3)] == [
            f"<think>\nThere is a function {call['name']}.\n</think>\n\n"
            f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {as_text}}}\n</tool_call><|im_end|>\n',
            f"<think>\nIt returned {result}.\n</think>\n\nIt is {result}.<|im_end|>\n",
            "<think>\nThey ask again.\n</think>\n\nSure, it was computed.<|im_end|>\n",
        ]


def test_texts_and_answers_of_the_other_shapes_are_learned_whole(trained: Trained) -> None:
    of_source: dict[str, dict[int, str]] = {}
    for name, text in trained.learned().items():
        source, _, number = name.rpartition("-")
        if number.isdigit() and len(number) == 9:
            of_source.setdefault(source.partition("/")[0], {})[int(number)] = text
    thought = "<think>\n\n</think>\n\n"
    expected: dict[str, Callable[[Any], str]] = {
        "manual": str,
        "docstrings": lambda row: f"{thought}{row['output']}<|im_end|>\n",
        "names": lambda row: str(row[1]),
        "calendar": lambda talk: f"{thought}{talk['conversations'][1]['value']}<|im_end|>\n",
    }
    assert set(of_source) == set(expected)
    for source, documents in of_source.items():
        assert documents == {number: expected[source](trained.written[source][number]) for number in documents}


def test_the_metadata_says_what_became_of_every_record(trained: Trained) -> None:
    recorded = trained.deployment.materializations(trained.result.run_id, "shards_manifest")
    for manifest in trained.shard_manifests():
        ((metadata,),) = [
            [m.metadata for m in found] for (_, key), found in recorded.items() if key == manifest.partition_key
        ]
        ignored = str(metadata["fields ignored"].value)
        assert all(name in ignored for name in ("chapter", "code point", "messages.tool_call_id"))
        assert metadata["licences"].value == "CC0-1.0, PSF-2.0, Unicode-3.0"
        n_chats = sum(row["records"] for row in manifest.facts["source_rows"] if row["source"] == "tool_chats")
        assert manifest.facts["n_fanned_out_turns"] == 2 * n_chats
        assert manifest.facts["n_documents_without_loss"] > 0  # windows that hold nothing but tools
        for name in ("n_fanned_out_turns", "n_split_documents", "n_documents_without_loss"):
            assert f"{RECORDS[name]}: {manifest.facts[name]:,}" in str(metadata["records"].value)
        assert 0 < float(str(metadata["learned_share"].value)) < 1
    n_duplicates = sum(manifest.facts.get("n_duplicates", 0) for manifest in trained.shard_manifests())
    (of_plan,) = [counts for counts in trained.plan.counts if counts.source == "docstrings"]
    assert n_duplicates == of_plan.n_duplicates == N_COPIES


def test_data_that_is_appended_makes_a_new_shard_and_leaves_the_others(trained: Trained) -> None:
    deployment = trained.deployment
    before = {shard.partition_key: shard for shard in trained.plan}
    write_names(deployment.home / "names.csv", n=120)
    (deployment.home / "chats" / "later.jsonl").write_text(
        "".join(json.dumps(tool_chat("isleap", {"year": year}, as_text=False)) + "\n" for year in range(1600, 1612))
    )
    deployment.plan()
    plan = read_plan(trained.folder / "shard_plan" / "plan.json")
    assert plan is not None
    assert {shard.partition_key: shard for shard in plan if shard.partition_key in before} == before
    new = plan.keys[len(before) :]
    assert new
    result = deployment.run("shards_manifest", partition_range=(plan.keys[0], plan.keys[-1]))
    assert result.success, failure_text(result)
    for (_, key), (materialization,) in deployment.materializations(result.run_id).items():
        assert is_reused(materialization) is (key in before)
    assert not verify(trained.folder).problems

"""A real deployment for tests: a recipe over a small corpus and a tiny random teacher, its own Dagster instance on
sqlite, the local scheduler with the real batch script and the real worker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.components import TeacherCaches
from kd_assets.contract import Event, read_events
from kd_assets.dagster_internals import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from kd_assets.orchestration.assets import recipe_definitions
from kd_assets.orchestration.card_asset import CACHE_CARD
from kd_assets.orchestration.platform import Platform

SHARDS = ("tiny-00000", "tiny-00001", "tiny-00002")
CACHES = ("topk_cache", "hidden_state_cache", "embedding_cache")
DOCUMENTS_PER_SHARD = 4
TEXT = "the quick brown fox jumps over a lazy dog and then it sleeps under an old tree by the river"
WORDS = TEXT.split()


def make_tiny_teacher(folder: Path, *, padding: int = 0) -> Path:
    """A random Llama of 3 blocks with a byte-level tokenizer that was trained on a few words; about 100 KB. `padding`:
    rows of its head that no token has."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()) + padding,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def documents(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": f"d{i}", "text": " ".join(WORDS[(i * 7 + j * 3 + seed) % len(WORDS)] for j in range(5 + i % 9))}
        for i in range(n)
    ]


class Deployment:
    """`home` is KD_HOME. The recipe `tiny` reads `home/corpus.jsonl`, four documents a shard."""

    def __init__(
        self,
        home: Path,
        tiny_teacher: Path,
        instance: dg.DagsterInstance,
        *,
        platform: Platform | None = None,
        **changes: Any,
    ) -> None:
        self.home, self.instance = home, instance
        self.platform = platform or Platform(home=str(home))
        self.corpus = home / "corpus.jsonl"
        self.write(documents(len(SHARDS) * DOCUMENTS_PER_SHARD))
        attributes: dict[str, Any] = {
            "recipe": "tiny",
            "sources": [{"name": "corpus", "path": "$KD_HOME/corpus.jsonl", "licence": "CC0-1.0"}],
            "documents_per_shard": DOCUMENTS_PER_SHARD,
            "teacher": {"model_id": str(tiny_teacher), "dtype": "float32", "token_budget": 256},
            "caches": {
                "topk": {"k": 4, "max_length": 64},
                "hidden_states": {"blocks": [1], "max_length": 8},
                "embeddings": {"max_length": 64},
            },
            "student": {"steps": 20, "hidden_size": 32, "max_length": 32, "batch_documents": 4},
        }
        self.attributes = attributes | changes
        self.recipe = TeacherCaches(**self.attributes).to_recipe()
        self.definitions = dg.Definitions.merge(
            recipe_definitions(self.recipe),
            dg.Definitions(
                resources={"kd_assets_platform": self.platform.as_resource()}, executor=dg.in_process_executor
            ),
        )

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        self.corpus.write_text("".join(json.dumps(r) + "\n" for r in records))

    @property
    def everything(self) -> list[str]:
        return ["shard_plan", "shards_manifest", *CACHES, "student_smoke"]

    def run(
        self,
        *assets: str,
        partition: str | None = None,
        partition_range: tuple[str, str] | None = None,
        tags: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> dg.ExecuteInProcessResult:
        """Materialize in one run, in this process; jobs run in processes of their own. Does not raise on failure.

        `settings`: what the Launchpad would have of the caches."""
        all_tags = dict(tags or {})
        if partition_range is not None:
            all_tags |= dict(
                zip((ASSET_PARTITION_RANGE_START_TAG, ASSET_PARTITION_RANGE_END_TAG), partition_range, strict=True)
            )
        job = self.definitions.resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=self.instance,
            asset_selection=[self.recipe.key(a) for a in assets],
            partition_key=partition,
            tags=all_tags,
            run_config=None if settings is None else {"ops": {"tiny__teacher_caches": {"config": settings}}},
            raise_on_error=False,
        )

    def log_lines(self, run_id: str) -> list[str]:
        """What a run has said in its log."""
        return [entry.user_message for entry in self.instance.all_logs(run_id) if entry.dagster_event is None]

    def plan(self) -> None:
        assert self.run("shard_plan").success

    def materializations(
        self, run_id: str, asset: str | None = None
    ) -> dict[tuple[str, str | None], list[dg.AssetMaterialization]]:
        """(asset, partition) → what that run recorded of it, whether it failed or not; of the card, which every run
        makes anew, only where `asset` asks for it."""
        found: dict[tuple[str, str | None], list[dg.AssetMaterialization]] = {}
        for record in self.instance.get_records_for_run(
            run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION
        ).records:
            materialization = record.asset_materialization
            assert materialization is not None
            name = materialization.asset_key.path[-1]
            if asset == name or (asset is None and name != CACHE_CARD):
                found.setdefault((name, materialization.partition), []).append(materialization)
        return found

    def checks(self, run_id: str, *, of_partitions: bool = True) -> list[dg.AssetCheckEvaluation]:
        """What that run recorded of the checks of partitions, or of assets as a whole, whether it failed or not."""
        records = self.instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
        events = [r.event_log_entry.dagster_event for r in records]
        evaluations = [e.asset_check_evaluation_data for e in events if e is not None]
        return [e for e in evaluations if (e.partition is not None) == of_partitions]

    def job_events(self, event_type: str) -> list[Event]:
        """Events of this type of all jobs so far."""
        return [
            event
            for path in sorted((self.home / "jobs").glob("*/*/*/events/*.jsonl"))
            for _, event in read_events(path)
            if isinstance(event, Event) and event.type == event_type
        ]

    def n_teacher_loads(self) -> int:
        return len(self.job_events("teacher_loaded"))


def failure_text(result: dg.ExecuteInProcessResult) -> str:
    """What the failed steps say of themselves in Dagster's log."""
    return "\n".join(
        str(event.step_failure_data.error) + str(event.step_failure_data.user_failure_data)
        for event in result.all_events
        if event.is_step_failure
    )


DEFINITIONS = """
import dagster as dg
from kd_assets.components import TeacherCaches
from kd_assets.orchestration.assets import recipe_definitions
from kd_assets.orchestration.platform import Platform

defs = dg.Definitions.merge(
    recipe_definitions(TeacherCaches(**{attributes}).to_recipe()),
    dg.Definitions(
        resources={{"kd_assets_platform": Platform(**{platform}).as_resource()}}, executor=dg.in_process_executor
    ),
)
"""


def is_reused(materialization: dg.AssetMaterialization) -> bool:
    """Whether its run found the result committed."""
    return bool(_in_json(materialization, "provenance")["reused"])


def folder_of(materialization: dg.AssetMaterialization) -> Path:
    return Path(_in_json(materialization, "identity")["folder"])


def _in_json(materialization: dg.AssetMaterialization, name: str) -> dict[str, Any]:
    value = materialization.metadata[name]
    assert isinstance(value, dg.JsonMetadataValue)
    assert isinstance(value.data, dict)
    return value.data


def write_definitions(deployment: Deployment) -> Path:
    """The deployment as a file that the dagster command line can load."""
    path = deployment.home / "tiny_definitions.py"
    path.write_text(
        DEFINITIONS.format(attributes=deployment.attributes, platform=dataclasses.asdict(deployment.platform))
    )
    return path

"""What the worker is tried on: a small random teacher, real English text, and job files.

Job files are as the control plane writes them, which itself needs dagster; a GPU machine has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd_assets.contract import (
    Asset,
    EmbeddingParams,
    HiddenStateParams,
    JobFile,
    Output,
    ShardsParams,
    TeacherParams,
    TopkParams,
    WorkUnit,
)
from kd_assets.demo.tokenizer import train_tokenizer
from kd_assets.model_files.fingerprints import tokenizer_fingerprint, weights_fingerprint
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.spec import Sharding, SourceSpec
from kd_assets.store import FORMAT_VERSION, INPUT_KEY, plan_output, read_manifest
from kd_assets.store.params_in_identity import params_in_identity
from kd_assets_tests.benchmarks.teacher import passages

RECIPE = "first_minutes"
N_DOCUMENTS = 480
PART_DOCUMENTS = 8
MAX_LENGTH = 96
BLOCKS = (0, 3)


def make_teacher(folder: Path) -> None:
    """A random Llama of four blocks in bfloat16, with a tokenizer that is trained here."""
    tokenizer = train_tokenizer(passages()[:400], vocabulary=1000)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,  # large enough for peaked distributions
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def write_source(path: Path) -> None:
    """Real texts, and every fourth document a chat of them."""
    texts = passages()[:N_DOCUMENTS]
    records: list[dict[str, Any]] = [
        {"text": text}
        if n % 4
        else {"messages": [{"role": "user", "content": text[:60]}, {"role": "assistant", "content": text[60:]}]}
        for n, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def job_of(
    folder: Path, units: Sequence[WorkUnit], *, shards: ShardsParams | None = None, teacher: TeacherParams | None = None
) -> JobFile:
    """One task with everything in it, and the recipe's folder, which the plan is in before any job: without it a share
    is away."""
    (folder / "store" / RECIPE).mkdir(parents=True, exist_ok=True)
    return JobFile(
        kind="shards" if teacher is None else "teacher",
        recipe=RECIPE,
        key=folder.name,
        recipe_folder=str(folder / "store" / RECIPE),
        events_folder=str(folder / "events"),
        tasks=(tuple(range(len(units))),),
        units=tuple(units),
        shards=shards,
        teacher=teacher,
    )


def output_of(asset: Asset, variant: Mapping[str, Any], *, folder: Path, partition_key: str, input_hash: str) -> Output:
    identity = {"asset": asset, "format_version": FORMAT_VERSION, **variant, INPUT_KEY: input_hash}
    identity = json.loads(json.dumps(identity))  # as the worker reads it back
    return plan_output(asset, identity, recipe_folder=folder / "store" / RECIPE, partition_key=partition_key)


def shards_job(folder: Path, source: Path, teacher: Path) -> JobFile:
    """One shard of all documents."""
    params = ShardsParams(
        tokenizer=str(teacher), tokenizer_fingerprint=tokenizer_fingerprint(teacher, None), max_length=MAX_LENGTH
    )
    spec = SourceSpec(name="manual", path=str(source), file_format="jsonl", licence="PSF-2.0")
    (shard,) = plan_shards([spec], Sharding(documents_per_shard=N_DOCUMENTS), shard_prefix=RECIPE).shards
    variant = {"tokenizer_fingerprint": params.tokenizer_fingerprint, "max_length": MAX_LENGTH}
    output = output_of(
        "shards_manifest", variant, folder=folder, partition_key=shard.partition_key, input_hash=shard.input_hash
    )
    return job_of(
        folder, [WorkUnit(partition_key=shard.partition_key, records=shard.records, outputs=(output,))], shards=params
    )


def teacher_params(teacher: Path) -> TeacherParams:
    return TeacherParams(
        model=str(teacher),
        weights_fingerprint=weights_fingerprint(teacher, None),
        tokenizer_fingerprint=tokenizer_fingerprint(teacher, None),
        dtype="bfloat16",
        compile="never",
        part_documents=PART_DOCUMENTS,
        topk=TopkParams(k=8, max_length=MAX_LENGTH, draws=16),
        hidden_states=HiddenStateParams(blocks=BLOCKS, max_length=MAX_LENGTH),
        embeddings=EmbeddingParams(max_length=MAX_LENGTH),
    )


def teacher_job(folder: Path, shard: Path, params: TeacherParams) -> JobFile:
    """All three caches of the shard."""
    assert params.topk is not None
    assert params.hidden_states is not None
    assert params.embeddings is not None
    manifest = read_manifest(shard)
    caches: tuple[tuple[Asset, dict[str, object]], ...] = (
        ("topk_cache", params_in_identity(params.topk, seed=params.seed)),
        ("hidden_state_cache", params_in_identity(params.hidden_states, seed=params.seed)),
        ("embedding_cache", params_in_identity(params.embeddings, seed=params.seed)),
    )
    outputs = tuple(
        output_of(
            asset,
            {"weights_fingerprint": params.weights_fingerprint, "dtype": params.dtype, "params": kept},
            folder=folder,
            partition_key=manifest.partition_key,
            input_hash=manifest.data_version,
        )
        for asset, kept in caches
    )
    unit = WorkUnit(partition_key=manifest.partition_key, inputs={"shards_manifest": (str(shard),)}, outputs=outputs)
    return job_of(folder, [unit], teacher=params)

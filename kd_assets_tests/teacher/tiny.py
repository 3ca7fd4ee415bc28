"""Tiny teachers with random weights, shards and jobs for them, made on the spot: the real thing, only small.

Imports neither dagster nor anything of the control plane, so that these tests run on a node's environment, too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from kd_assets.contract import (
    CACHES,
    Asset,
    EmbeddingParams,
    HiddenStateParams,
    JobFile,
    Output,
    TeacherParams,
    TopkParams,
    WorkUnit,
)
from kd_assets.identity import weights_fingerprint
from kd_assets.report import Reporter, StopFlag
from kd_assets.store import Documents, ResultWriter, Shard, encode_shard, part_stats, plan_output, read_shard
from kd_assets.store.documents import offsets_of
from kd_assets.teacher.runner import TeacherRunner

VOCABULARY = 200
HIDDEN_SIZE = 32
N_BLOCKS = 3
RECIPE = "tiny"

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough for peaked distributions: with the default of 0.02 all logits are about 0 and nothing is tested.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 16, "head_dim": 8}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24, **_EXPERTS}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "olmo2": ("Olmo2Config", {}),
}
"""Name → configuration class of transformers and what it needs beyond `_COMMON`."""


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}
"""Rotary frequencies that change for batches with a document of more than 32 tokens."""


def tiny_config(architecture: str, **changes: Any) -> Any:
    name, special = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**{**_COMMON, **special, **changes})


def tiny_model(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model, the same each time."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=dtype)
    return model.eval()


def save_teacher(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    tiny_model(architecture, **changes).save_pretrained(folder)
    return folder


def tiny_documents(lengths: Sequence[int], *, vocabulary: int = VOCABULARY, seed: int = 0) -> Documents:
    n = sum(lengths)
    return Documents(
        document_ids=[f"doc-{i:03d}" for i in range(len(lengths))],
        offsets=offsets_of(np.array(lengths, dtype=np.int64)),
        input_ids=np.random.default_rng(seed).integers(0, vocabulary, n).astype(np.uint32),
        loss_mask=np.ones(n, dtype=np.bool_),
    )


def tiny_params(folder: Path, **changes: Any) -> TeacherParams:
    """All three caches of a saved teacher, in small windows."""
    defaults: dict[str, Any] = {
        "model": str(folder),
        "weights_fingerprint": weights_fingerprint(folder, None),
        "tokenizer_fingerprint": "0" * 64,
        "dtype": "float32",
        "token_budget": 128,
        "part_documents": 5,
        "part_tokens": 10_000,
        "topk": TopkParams(k=4, max_length=64),
        "hidden_states": HiddenStateParams(blocks=(1,), max_length=64),
        "embeddings": EmbeddingParams(max_length=64),
    }
    return TeacherParams(**{**defaults, **changes})


class Desk:
    """A store in a folder, with shards to read and jobs to run against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_folder = folder / "store" / RECIPE
        self.events_file = folder / "events.jsonl"

    def commit_shard(self, documents: Documents, partition_key: str = "shard-00000") -> Path:
        output = plan_output(
            "shards_manifest", {"input": partition_key}, recipe_folder=self.recipe_folder, partition_key=partition_key
        )
        n = documents.n_documents
        table = encode_shard(documents, ["tiny"] * n, np.arange(n, dtype=np.int64))
        with self.writer(output, partition_key) as writer:
            writer.write_part(0, table, n_tokens=documents.n_tokens, stats=part_stats("shards_manifest", table))
            writer.commit(parts=1, checks={}, provenance={})
        return Path(output.path)

    def read_shard(self, documents: Documents) -> Shard:
        return read_shard(self.commit_shard(documents))

    def writer(self, output: Output, partition_key: str = "shard-00000") -> ResultWriter:
        return ResultWriter(output, recipe=RECIPE, recipe_folder=self.recipe_folder, partition_key=partition_key)

    def unit(
        self, shard_folder: Path, params: TeacherParams, assets: Sequence[Asset] = CACHES, key: str = "shard-00000"
    ) -> WorkUnit:
        identity = {"input": key, "teacher": params.weights_fingerprint}
        outputs = tuple(
            plan_output(a, {**identity, "asset": a}, recipe_folder=self.recipe_folder, partition_key=key)
            for a in assets
        )
        return WorkUnit(partition_key=key, inputs={"shards_manifest": (str(shard_folder),)}, outputs=outputs)

    def fresh_output(self, output: Output, *, run: int, partition_key: str = "shard-00000") -> Output:
        """The same output under another identity: a result that is not there yet."""
        return plan_output(
            output.asset, {**output.identity, "run": run}, recipe_folder=self.recipe_folder, partition_key=partition_key
        )

    def job(self, params: TeacherParams, units: Sequence[WorkUnit]) -> JobFile:
        return JobFile(
            kind="teacher",
            recipe=RECIPE,
            key="tiny-teacher",
            recipe_folder=str(self.recipe_folder),
            events_folder=str(self.folder / "events"),
            tasks=(tuple(range(len(units))),),
            units=tuple(units),
            teacher=params,
            provenance={"seen_by": "the control plane"},
        )

    def run(self, params: TeacherParams, unit: WorkUnit, stop: StopFlag | None = None) -> dict[str, Any]:
        """Load the teacher and run one unit in this process, as the worker does."""
        with Reporter(self.events_file, stream=io.StringIO()) as report:
            runner = TeacherRunner(self.job(params, [unit]), report, StopFlag() if stop is None else stop)
            try:
                return runner.run(unit)
            finally:
                runner.close()

    def events(self, event_type: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.events_file.read_text().splitlines()]
        return [record["data"] for record in records if record["type"] == event_type]


def part_bytes(unit: WorkUnit) -> dict[str, bytes]:
    """The bytes of every part file of a unit's outputs, by asset and name."""
    return {
        f"{output.asset}/{path.name}": path.read_bytes()
        for output in unit.outputs
        for path in sorted(Path(output.path).glob("part-*"))
    }


def bfloat16_values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """What bits of bfloat16 stand for: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

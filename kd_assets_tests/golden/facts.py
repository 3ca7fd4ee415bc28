"""What the golden store holds, as plain facts that can be written down and compared: names, hashes and digests.

Needs no dagster. What lies on disk is read with `json` alone, so that it can be compared whatever becomes of the
package; only the numbers go through its readers, which are what is tested.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_assets.contract import CACHES
from kd_assets.sources.planning.plan import read_plan
from kd_assets.store import CacheReader, Ragged
from kd_assets.student.dataset import TeacherCacheDataset, collate

FOLDER = Path(__file__).parent
RECIPE = "golden"
EXPECTED_FILE = "expected.json"
KEPT = ("teacher", "sources", "defs.yaml", "store")
"""What KD_HOME held when the store was made, and the recipe."""


def expected() -> dict[str, Any]:
    """The facts as they were when the store was made."""
    facts: dict[str, Any] = json.loads((FOLDER / EXPECTED_FILE).read_bytes())
    return facts


def results_of(recipe_folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """asset → partition → variant, fingerprint, data version and the hash of every part."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(recipe_folder.glob("*/*/*/*/manifest.json")):
        manifest = json.loads(path.read_bytes())
        found.setdefault(manifest["asset"], {})[manifest["partition_key"]] = {
            "variant": manifest["variant"],
            "fingerprint": manifest["fingerprint"],
            "data_version": manifest["data_version"],
            "parts": {part["name"]: part["sha256"] for part in manifest["parts"]},
        }
    return found


def documents_of(recipe_folder: Path, asset: str) -> dict[str, str]:
    """`<partition>/<document id>` → digest of all that a reader gives of the document."""
    reader = CacheReader(recipe_folder, asset)
    return {f"{d['partition_key']}/{d['document_id']}": digest(d) for d in (reader[i] for i in range(len(reader)))}


def samples_of(recipe_folder: Path) -> dict[str, str]:
    """`<partition>/<document id>` → digest of the document's training sample, all caches joined."""
    dataset = TeacherCacheDataset.from_recipe(recipe_folder)
    return {f"{s['partition_key']}/{s['document_id']}": digest(s) for s in (dataset[i] for i in range(len(dataset)))}


def batch_of(recipe_folder: Path) -> dict[str, str]:
    """Field → digest, of one training batch of all documents, cut to their first 16 tokens."""
    dataset = TeacherCacheDataset.from_recipe(recipe_folder, max_length=16)
    batch = collate([dataset[i] for i in range(len(dataset))])
    return {name: digest({name: value}) for name, value in sorted(batch.items())}


def first_prediction(recipe_folder: Path) -> dict[str, Any]:
    """A few numbers of the first document, as they are."""
    document = CacheReader(recipe_folder, "topk_cache")[0]
    hidden = TeacherCacheDataset.from_recipe(recipe_folder)[0]["hidden_block_1"]
    return {
        "document_id": document["document_id"],
        "input_ids": document["input_ids"].tolist(),
        "topk_ids": document["topk_ids"][0].tolist(),
        "topk_logprobs": document["topk_logprobs"][0].tolist(),
        "logsumexp": document["logsumexp"][0].item(),
        "target_logprob": document["target_logprob"][0].item(),
        "sampled_ids": document["sampled_ids"][0].tolist(),
        "sampled_counts": document["sampled_counts"][0].tolist(),
        "hidden_block_1": hidden[0, :4].tolist(),
    }


def digest(values: Mapping[str, Any]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over names, dtypes, shapes and every bit, names sorted."""
    sha256 = hashlib.sha256()
    for name, value in sorted(_flat(values).items()):
        sha256.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        sha256.update(np.ascontiguousarray(value).tobytes())
    return sha256.hexdigest()[:16]


def _flat(values: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in values.items():
        if isinstance(value, Ragged):
            arrays |= {f"{name}.values": value.values, f"{name}.lengths": value.lengths}
        elif isinstance(value, torch.Tensor):  # numpy has no bfloat16: its bits
            arrays[name] = (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
        elif isinstance(value, str):
            arrays[name] = np.frombuffer(value.encode(), np.uint8)
        else:
            arrays[name] = np.asarray(value)
    return arrays


def facts_of(recipe_folder: Path) -> dict[str, Any]:
    """All facts that a store shows by itself."""
    plan = read_plan(recipe_folder / "shard_plan" / "plan.json")
    assert plan is not None
    return {
        "plan_hash": plan.plan_hash,
        "input_hashes": {shard.partition_key: shard.input_hash for shard in plan},
        "results": results_of(recipe_folder),
        "documents": {asset: documents_of(recipe_folder, asset) for asset in ("shards_manifest", *CACHES)},
        "samples": samples_of(recipe_folder),
        "batch": batch_of(recipe_folder),
        "first_prediction": first_prediction(recipe_folder),
    }

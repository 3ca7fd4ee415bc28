"""What the web UI shows of a committed result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from kd_assets.contract import EXPORTS
from kd_assets.orchestration.recording.telemetry_picture import telemetry_picture_markdown
from kd_assets.store import Manifest
from kd_assets.store.vocabulary import mean_outside_mass

NUMBERS = (
    "tokens_per_s",
    "wall_s",
    "joules",
    "gpu_utilisation_percent",
    "peak_memory_gib",
    "padding_fraction",
    "token_budget",
    "n_bad_records",
    "n_truncated_documents",
    "n_split_documents",
    "n_dropped_documents",
    "n_duplicates",
    "n_fanned_out_turns",
    "n_unlearned_turns",
    "n_documents_without_loss",
    "learned_share",
    "median_document_tokens",
    "p95_document_tokens",
    "max_document_tokens",
)
"""Facts that Dagster plots over partitions, where they are known."""

WORDS = (
    "teacher",
    "quantization",
    "trust_remote_code",
    "placement",
    "n_devices",
    "compiled",
    "host",
    "device",
    "gpu",
    "slurm_job_id",
    "attempt",
    "code_commit",
)
"""Provenance keys shown as metadata of their own."""


LOADED_BY: Mapping[str, str] = {
    "axolotl": "datasets: [{{path: {folder}, type: completion}}], skip_prepare_dataset: true",
    "distillkit": "distillkit-pack-logits --dataset {folder} --split train",
    "distillkit with pack_to": "disk_path: {folder}, prepacked: true, functionary_packing: true",
    "hf": 'datasets.load_dataset("{folder}", split="train")',
    "modelopt": 'torch.load("{folder}/00000000.pt")',
    "original": "the trainer's data folder: {folder}",
    "safetensors": 'safetensors.safe_open("{folder}/section-00000.safetensors", "pt")',
    "specforge": "data.hidden_states_path={folder}",
    "specforge_dflash": "data.hidden_states_path={folder}",
    "speculators": "--data-path {folder}",
}
"""Format → how its tool is told of an export."""


def export_metadata(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What the web UI shows of an export first: its parts have no documents, since a document may be in several."""
    facts = manifest.facts
    n_documents, n_tokens = int(facts["n_documents"]), int(facts["n_tokens"])
    splits = facts.get("splits") or {}
    data = folder / "data" / next(iter(splits), "")
    shown: dict[str, Any] = {
        "format": facts["format"],
        "dagster/partition_row_count": n_documents,
        "documents": n_documents,
        "tokens": n_tokens,
    }
    if n_tokens:
        shown["bytes_per_token"] = round(manifest.n_bytes / n_tokens, 2)
    if n_documents:
        is_packed = manifest.params.get("pack_to") is not None
        how = LOADED_BY[str(facts["format"]) + (" with pack_to" if is_packed else "")]
        shown |= {"data": dg.MetadataValue.path(str(data)), "how_to_load": how.format(folder=data)}
    return shown | {f"documents in {split}": n for split, n in splits.items()}


def result_metadata(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What the web UI shows of a committed result, the most telling first. Numbers stay numbers: Dagster plots them."""
    facts, provenance = manifest.facts, manifest.provenance
    metadata: dict[str, Any] = {}
    if manifest.n_documents:
        metadata |= {
            "dagster/partition_row_count": manifest.n_documents,
            "documents": manifest.n_documents,
            "tokens": manifest.n_tokens,
            "bytes_per_token": round(manifest.n_bytes / manifest.n_tokens, 2),
        }
    if manifest.asset in EXPORTS:
        metadata |= export_metadata(manifest, folder)
    metadata["bytes"] = manifest.n_bytes
    for name in NUMBERS:
        value = facts.get(name, provenance.get(name))
        if value is not None:
            metadata[name] = value
    metadata |= outside_numbers(manifest)
    if (picture := telemetry_picture_markdown(facts.get("telemetry"))) is not None:
        metadata["telemetry"] = dg.MetadataValue.md(picture)
    if ignored := fields_in_words(facts.get("passed_over_fields")):
        metadata["fields ignored"] = ignored
    if licences := facts.get("licences"):
        metadata["licences"] = ", ".join(map(str, licences))
    metadata |= {
        "dagster/uri": str(folder),
        "folder": dg.MetadataValue.path(str(folder)),
        "variant": manifest.variant,
        "fingerprint": manifest.fingerprint,
        "data_version": manifest.data_version,
    }
    for name in WORDS:
        if provenance.get(name) is not None:
            metadata[name] = provenance[name]
    metadata |= {
        "parameters": dg.MetadataValue.json(dict(manifest.identity)),
        "statistics": dg.MetadataValue.json(dict(manifest.stats)),
        "facts": dg.MetadataValue.json({k: v for k, v in facts.items() if k not in (*metadata, "telemetry")}),
        "provenance": dg.MetadataValue.json(dict(provenance)),
    }
    return metadata


def outside_numbers(manifest: Manifest) -> dict[str, float]:
    """Of a cache that is cut to a student's vocabulary: the probability that the teacher gives to other ids."""
    mean = mean_outside_mass(manifest.stats)
    return {} if mean is None else {"mean_outside_mass": mean, "max_outside_mass": manifest.stats["max_outside_mass"]}


def fields_in_words(counts: Mapping[str, int] | None) -> str:
    """`meta (10,000 documents), url (1 document)`: fields of records that nothing was made of, the most frequent
    first."""
    ordered = sorted((counts or {}).items(), key=lambda field: (-field[1], field[0]))
    return ", ".join(f"{name} ({n:,} document{'' if n == 1 else 's'})" for name, n in ordered)

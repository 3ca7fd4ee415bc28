"""What the web UI shows of a committed result: a dozen rows that a person reads, and the rest folded into two.

The invariant: a number of its own is one that differs from partition to partition and is worth a plot, with its unit in
its name; nothing is there twice, and nothing that is not known. `identity` has where the result is and its hashes,
`provenance` its parameters, where it comes from and all that was counted: JSON, which the web UI shows when asked if it
is long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import dagster as dg

from kd_assets.cards.words import bytes_in_words
from kd_assets.contract import CACHES, EXPORTS
from kd_assets.orchestration.recording.telemetry_picture import telemetry_picture_markdown
from kd_assets.recipes.recipe import SHARDS_MANIFEST
from kd_assets.store import CheckResult, Manifest
from kd_assets.store.layout import recipe_folder_of
from kd_assets.store.ragged_topk import mean_kept_mass, mean_kept_tokens
from kd_assets.store.recorded_checks import measured_on
from kd_assets.store.vocabulary import mean_outside_mass

LARGEST_DIFFERENCES: Mapping[str, str] = {
    "max_abs_logprob_difference": "largest_logprob_difference_nats",
    "max_relative_hidden_difference": "largest_relative_state_difference",
    "max_relative_embedding_difference": "largest_relative_embedding_difference",
}
"""What the check `recomputed` recorded → its name as a plot: how exact the cache is."""

RECORDS: Mapping[str, str] = {
    "n_bad_records": "left out as bad",
    "n_duplicates": "left out as duplicates",
    "n_dropped_documents": "dropped as too long",
    "n_truncated_documents": "cut to max_length",
    "n_split_documents": "split into windows",
    "n_fanned_out_turns": "made of further turns of a chat",
    "n_unlearned_turns": "turns not learned",
    "n_documents_without_loss": "without a learned token",
}
"""Facts of shards → what they say in words; those that are 0 are not said."""

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

OF_SLURM = ("slurm_job_id", "slurm_array_job_id", "slurm_array_task_id", "slurm_nodelist", "slurm_partition")
"""Provenance that the local scheduler has, too, since it runs the same batch script; it says nothing there."""


def result_metadata(
    manifest: Manifest, folder: Path, *, job: Mapping[str, Any] = MappingProxyType({}), reused: bool = False
) -> dict[str, Any]:
    """What the web UI shows of a committed result, the most telling first.

    `job`: what `job_table` knows of the task that made it; `reused`: an earlier run did.
    """
    facts = manifest.facts
    metadata: dict[str, Any] = export_metadata(manifest, folder) if manifest.asset in EXPORTS else {}
    if (contents := contents_in_words(manifest)) is not None:
        metadata |= {"contents": contents, "dagster/size_bytes": manifest.n_bytes}
    metadata |= plotted_numbers(manifest, job)
    metadata |= shard_words(facts)
    if "recoded_from" in manifest.provenance:
        metadata |= recoded_from(manifest, folder)
    if made_by := made_by_in_words(manifest, job):
        metadata["made_by"] = f"reused: {made_by}" if reused else made_by
    if (picture := telemetry_picture_markdown(facts.get("telemetry"))) is not None:
        metadata["telemetry"] = dg.MetadataValue.md(picture)
    return metadata | {
        "identity": dg.MetadataValue.json(identity_of(manifest, folder)),
        "provenance": dg.MetadataValue.json({"reused": reused, **provenance_of(manifest, job)}),
    }


def contents_in_words(manifest: Manifest) -> str | None:
    """`512 documents, 154,021 tokens, 1.2 GB`; None of what is no documents, and of nothing at all."""
    if manifest.asset not in (SHARDS_MANIFEST, *CACHES, *EXPORTS):
        return None
    facts = manifest.facts if manifest.asset in EXPORTS else {}  # a document of an export may be in several parts
    n_documents = int(facts.get("n_documents", manifest.n_documents))
    n_tokens = int(facts.get("n_tokens", manifest.n_tokens))
    if not n_documents and not manifest.n_bytes:
        return None
    documents = "document" if n_documents == 1 else "documents"
    return f"{n_documents:,} {documents}, {n_tokens:,} tokens, {bytes_in_words(manifest.n_bytes)}"


def plotted_numbers(manifest: Manifest, job: Mapping[str, Any]) -> dict[str, float]:
    """What Dagster plots over partitions: how exact, how much is kept, how fast, at what cost, how long it waited."""
    facts = {**manifest.provenance, **manifest.facts}
    recomputed = manifest.checks.get("recomputed")
    checked = recomputed if isinstance(recomputed, Mapping) else {}
    n_tokens = int(facts.get("n_tokens", 0)) if manifest.asset in EXPORTS else manifest.n_tokens
    joules, n_computed = facts.get("joules"), facts.get("computed_tokens")
    numbers: dict[str, Any] = {
        "bytes_per_token": manifest.n_bytes / n_tokens if n_tokens and manifest.asset in (*CACHES, *EXPORTS) else None,
        **{name: checked.get(recorded) for recorded, name in LARGEST_DIFFERENCES.items()},
        "kept_mass": mean_kept_mass(part.stats for part in manifest.parts),
        "mean_kept_tokens": mean_kept_tokens(manifest.stats),
        "mean_outside_mass": mean_outside_mass(manifest.stats),
        "learned_share": facts.get("learned_share"),
        "tokens_per_s": facts.get("tokens_per_s"),
        "joules_per_token": joules / n_computed if joules and n_computed else None,
        "queue_wait_s": job.get("queue_wait_s") if is_of_slurm(maker_of(manifest)) else None,
    }
    return {name: rounded(value) for name, value in numbers.items() if is_number(value)}


SAME_EVERYWHERE = frozenset(("expected_documents", "expected_tokens", "n_columns", "n_non_finite", "seed"))
"""Numbers of a check that say of a good result only that it is good, or are the recipe's own."""
OF_THE_SAMPLE = ("recomputed", "rebuilt")
"""Checks of as many documents as the recipe says."""


def check_metadata(partition_key: str, check: CheckResult) -> dict[str, Any]:
    """What the run's page and the check's page show of an evaluation. A number there is a plot over time; one that is
    always the same is text."""
    same = SAME_EVERYWHERE | ({"n_documents"} if check.name in OF_THE_SAMPLE else set())
    shown = {name: str(value) if name in same else readable(value) for name, value in check.numbers.items()}
    return {"partition": partition_key, **shown}


def readable(value: Any) -> Any:
    """`rounded`, of a number that is not whole."""
    return rounded(value) if isinstance(value, float) and math.isfinite(value) else value


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def rounded(value: float) -> float:
    """Five digits: more than a person reads or a plot shows."""
    return float(f"{value:.5g}")


def shard_words(facts: Mapping[str, Any]) -> dict[str, str]:
    """What became of a shard's records, how long its documents are, and whose they are."""
    words = {}
    if longest := facts.get("max_document_tokens"):
        p95 = facts.get("p95_document_tokens")
        below = "" if p95 is None else f", 95 % up to {p95:,.0f}"
        words["document_tokens"] = f"median {facts['median_document_tokens']:,.0f}{below}, longest {longest:,.0f}"
    if counted := [f"{said}: {facts[name]:,}" for name, said in RECORDS.items() if facts.get(name)]:
        words["records"] = ", ".join(counted)
    if ignored := fields_in_words(facts.get("passed_over_fields")):
        words["fields ignored"] = ignored
    if licences := facts.get("licences"):
        words["licences"] = ", ".join(map(str, licences))
    return words


def export_metadata(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What the web UI shows of an export first: what it is made of, what is not in it, and how its tool is told of
    it."""
    facts = manifest.facts
    splits = facts.get("splits") or {}
    data = folder / "data" / next(iter(splits), "")
    variants = manifest.identity["caches"]
    shown: dict[str, Any] = {
        "format": facts["format"],
        "made of": ", ".join(f"{cache} (variant {variants[cache]})" for cache in CACHES if cache in variants),
    }
    if states := facts.get("states"):
        shown["states exported"] = ", ".join(map(str, states))
    left_out = [f"{said['n_documents']:,}, {why}" for why, said in (facts.get("left_out") or {}).items()]
    if left_out:
        shown["documents left out"] = "; ".join(left_out)
    if cut := facts.get("n_cut_to_the_shortest_cache"):
        shown["documents cut to the shortest cache"] = f"{cut:,}"
    if len(splits) > 1:
        shown["documents in splits"] = ", ".join(f"{n:,} {split}" for split, n in splits.items())
    if facts["n_documents"]:
        is_packed = manifest.params.get("pack_to") is not None
        how = LOADED_BY[str(facts["format"]) + (" with pack_to" if is_packed else "")]
        shown["how_to_load"] = how.format(folder=data)
    return shown


# ---------------------------------------------------------------------- where it comes from


def maker_of(manifest: Manifest) -> Mapping[str, Any]:
    """Provenance of the task that wrote the result: of a recoded one, not of the one that asked the teacher."""
    recoded_by = manifest.provenance.get("recoded_by")
    return recoded_by if isinstance(recoded_by, Mapping) else manifest.provenance


def is_of_slurm(maker: Mapping[str, Any]) -> bool:
    """The local scheduler's tasks have numbers for SLURM's, and no partition."""
    return maker.get("slurm_partition") is not None


def made_by_in_words(manifest: Manifest, job: Mapping[str, Any]) -> str:
    """`2026-11-29 20:01 UTC, SLURM job 14_3 on n01 (4 × NVIDIA H100), in 41 s, 2 restarts, log /…`."""
    maker = maker_of(manifest)
    words = []
    if node := job.get("node") or maker.get("slurm_nodelist") or maker.get("host"):
        gpu = manifest.provenance.get("gpu") if maker is manifest.provenance else None
        with_gpus = "" if gpu is None else f" ({manifest.provenance.get('n_devices', 1)} × {gpu})"
        task_id = job.get("job_id") or task_id_of(maker)
        words.append((f"SLURM job {task_id} on " if is_of_slurm(maker) and task_id else "on ") + f"{node}{with_gpus}")
    wall_s: Any = manifest.facts.get("wall_s", manifest.provenance.get("wall_s"))
    if maker is manifest.provenance and is_number(wall_s):
        words.append(f"in {wall_s:,.0f} s" if wall_s >= 10 else f"in {wall_s:.2g} s")
    if restarts := job.get("restarts", maker.get("attempt")):
        words.append(f"{restarts} restart{'' if restarts == 1 else 's'}")
    if log := job.get("log"):
        words.append(f"log {log}")
    return ", ".join([f"{manifest.created_at[:16].replace('T', ' ')} UTC", *words]) if words else ""


def task_id_of(maker: Mapping[str, Any]) -> str | None:
    array_job_id, task = maker.get("slurm_array_job_id"), maker.get("slurm_array_task_id")
    return f"{array_job_id}_{task}" if array_job_id and task else maker.get("slurm_job_id")


def identity_of(manifest: Manifest, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "variant": manifest.variant,
        "fingerprint": manifest.fingerprint,
        "data_version": manifest.data_version,
    }


def provenance_of(manifest: Manifest, job: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's own, its parameters, the task's, and all facts and statistics; without what is not known or is a
    picture."""
    dropped = () if is_of_slurm(maker_of(manifest)) else OF_SLURM
    own = {name: value for name, value in manifest.provenance.items() if name not in dropped}
    facts = {name: value for name, value in manifest.facts.items() if name != "telemetry"}
    folded = own | {
        "created_at": manifest.created_at,
        "parameters": manifest.identity,
        "job": job,
        "facts": facts,
        "statistics": manifest.stats,
    }
    return {name: found for name, value in folded.items() if (found := without_unknown(value)) not in (None, {})}


def without_unknown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: without_unknown(v) for name, v in value.items() if v is not None}
    return value


def recoded_from(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Of a result that was made of one in another codec: which, and what of its checks was measured there."""
    source = manifest.provenance.get("recoded_from")
    if not isinstance(source, Mapping):
        return {}
    words = f"{source['codec']}, {recipe_folder_of(folder) / str(source['folder'])}"
    if forms := {name: form for name in manifest.checks if (form := measured_on(manifest, name)) is not None}:
        words += "; checks measured on it: " + ", ".join(f"{name} ({form})" for name, form in forms.items())
    return {"recoded_from": words}


def fields_in_words(counts: Mapping[str, int] | None) -> str:
    """`meta (10,000 documents), url (1 document)`: fields of records that nothing was made of, the most frequent
    first."""
    ordered = sorted((counts or {}).items(), key=lambda field: (-field[1], field[0]))
    return ", ".join(f"{name} ({n:,} document{'' if n == 1 else 's'})" for name, n in ordered)

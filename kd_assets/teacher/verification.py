"""Documents of committed caches once more by the plain path: the check `recomputed`, at any time and of any sample.

Used by `kd-assets verify --recompute`, which loads it by name: the store and the command line need no torch. The
teacher is where the manifests say, or where one is told, and has to be of the weights that the caches were made with.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_assets.contract import CACHES, Asset, EmbeddingParams, HiddenStateParams, TeacherParams
from kd_assets.errors import MissingInputError, RecipeError
from kd_assets.store import Manifest, read_manifest
from kd_assets.store.recorded_checks import codec_name, top_p_of
from kd_assets.store.schema import FINAL_CONVENTIONS
from kd_assets.store.vocabulary import vocabulary_of
from kd_assets.teacher.model.load import Teacher, load_teacher
from kd_assets.teacher.recompute import (
    Comparison,
    Row,
    positions_of,
    reference,
    sampled_documents,
    sampled_positions,
    stored_row,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputedResult:
    """What came of one result."""

    folder: Path
    asset: Asset
    record: dict[str, Any]
    """As a manifest's `checks["recomputed"]`."""

    @property
    def passed(self) -> bool:
        return self.record["passed"] is True


def recompute_stored(
    folders: Sequence[Path],
    *,
    n_documents: int,
    seed: int,
    teacher_folder: Path | None = None,
    device: str | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Iterator[RecomputedResult]:
    """Recompute a seeded sample of documents of each result, in this order but for one teacher after the other.

    `folders`: of caches; others are passed over. Raises MissingInputError for a teacher that is not there,
    TeacherChangedError for one of other weights, RecipeError for one whose own Python code would have to run.
    """
    by_teacher: dict[tuple[Any, ...], list[tuple[Path, Manifest]]] = {}
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest.asset in CACHES and manifest.n_documents:
            key = tuple(repr(manifest.identity.get(name)) for name in ("weights_fingerprint", "dtype", "quantization"))
            by_teacher.setdefault(key, []).append((folder, manifest))
    for results in by_teacher.values():
        teacher = _load(results, teacher_folder, device, warn)
        for folder, manifest in results:
            yield _recomputed(teacher, folder, manifest, n_documents=n_documents, seed=seed)


def _load(
    results: Sequence[tuple[Path, Manifest]],
    teacher_folder: Path | None,
    device: str | None,
    warn: Callable[[str], None],
) -> Teacher:
    """The teacher of these results, with whatever any of them keeps found in it."""
    folder, manifest = results[0]
    identity, provenance = manifest.identity, manifest.provenance
    if identity.get("trust_remote_code"):
        raise RecipeError(
            f"{folder} was made by a teacher that brings Python code of its own, which is not run because a manifest "
            "says so: materialize its check in the recipe's deployment instead"
        )
    named = teacher_folder or provenance.get("teacher_folder") or provenance.get("teacher")
    weights = identity.get("weights_fingerprint")
    if not named or not isinstance(weights, str):
        raise MissingInputError(f"{folder} does not say which teacher made it: it cannot be recomputed")
    blocks = tuple(sorted({int(block) for _, m in results for block in m.params.get("blocks", ())}))
    final = tuple(name for name in FINAL_CONVENTIONS if any(name in m.params.get("final", ()) for _, m in results))
    params = TeacherParams(
        model=str(named),
        dtype=identity.get("dtype", "bfloat16"),
        quantization=identity.get("quantization"),
        weights_fingerprint=weights,
        tokenizer_fingerprint=str(identity.get("tokenizer_fingerprint", "")),
        hidden_states=HiddenStateParams(blocks=blocks, final=final, max_length=1) if blocks or final else None,
        embeddings=EmbeddingParams(max_length=1),
    )
    with contextlib.redirect_stdout(sys.stderr):  # how far the hashing is: standard output may be somebody's JSON
        return load_teacher(params, digests=None, warn=warn, device=None if device is None else torch.device(device))


def _recomputed(teacher: Teacher, folder: Path, manifest: Manifest, *, n_documents: int, seed: int) -> RecomputedResult:
    asset: Asset = next(cache for cache in CACHES if cache == manifest.asset)
    comparison = Comparison(
        asset=asset,
        dtype=teacher.dtype,
        seed=int(manifest.params.get("seed", seed)),  # of the draws
        quantisation=teacher.quantisation,
        token_ids=vocabulary_of(manifest, folder),
        routed=teacher.routed,
        codec=codec_name(manifest),
        top_p=top_p_of(manifest),
    )
    firsts = np.cumsum([0, *(part.n_documents for part in manifest.parts)])
    sample = sampled_documents(manifest.n_documents, n_documents, seed=seed, partition_key=manifest.partition_key)
    ids = []
    for document in sample:
        part = int(np.searchsorted(firsts, document, side="right")) - 1
        row = stored_row(folder / manifest.parts[part].name, document - int(firsts[part]))
        ids.append(str(row["document_id"][0]))
        comparison.add(row, _reference(teacher, manifest, row, seed=seed))
    return RecomputedResult(folder=folder, asset=asset, record=comparison.result(ids))


def _reference(teacher: Teacher, manifest: Manifest, row: Row, *, seed: int) -> Any:
    """The document by the plain path, as far as it is compared."""
    positions_P = np.arange(0)
    if manifest.asset == "topk_cache":
        kept_M = positions_of(row, len(row["input_ids"]) - 1)
        positions_P = kept_M[sampled_positions(len(kept_M), seed=seed, document_id=str(row["document_id"][0]))]
    params = manifest.params
    return reference(
        teacher,
        row["input_ids"],
        [int(block) for block in params.get("blocks", ())],
        positions_P,
        final=params.get("final", ()),
    )

"""What a manifest itself says of its result's worth: the statistics of what was stored, and the recomputation.

Anyone in `kd_assets` may ask. The invariant: a result that has failed is never its partition's current one, whoever
committed or reused it, and no reader gives its documents without being told to. What was never recorded has not failed:
the checks (`kd_assets.store.checking.checks`) refuse that, too, as they have the files to look at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from kd_assets.contract import CACHES
from kd_assets.store.codecs.codec import PLAIN, require_known
from kd_assets.store.codecs.state_codec import CODED, RAW, largest_error
from kd_assets.store.codecs.topk_compact import divergence_limit
from kd_assets.store.codecs.topk_schema import COMPACT
from kd_assets.store.manifest import Manifest

PROBABILITY_TOLERANCE = 4e-3
"""Σp of the kept tokens may exceed 1 by this: float16 rounds a logprob between -8 and -16 by up to 2⁻⁸, and all of the
mass may lie there (uniform logits over 3,000 tokens and more, all kept). Below -16 there is too little of it."""


def failed_check(manifest: Manifest) -> str | None:
    """The first check that the result is recorded to have failed, and how; None where none is."""
    if manifest.asset not in CACHES:
        return None
    if all("n_non_finite" in part.stats for part in manifest.parts) and (why := finite_failure(manifest)):
        return f"check finite failed: {why}"
    if "recomputed" in manifest.checks and (why := recomputed_failure(manifest)):
        return f"check recomputed failed: {why}"
    for name, failure in (("codec", codec_failure), ("rebuilt", rebuilt_failure), ("recoded", recoded_failure)):
        if why := failure(manifest):
            return f"check {name} failed: {why}"
    return None


def finite_failure(manifest: Manifest) -> str | None:
    """The first part whose stored numbers cannot be right, by the statistics that were taken of its encoded rows: after
    every conversion, so of what is in the file."""
    for part in manifest.parts:
        n_non_finite = part.stats.get("n_non_finite", math.nan)
        if n_non_finite != 0:
            found = "an unknown number of" if math.isnan(n_non_finite) else f"{n_non_finite:.0f}"
            return f"{part.name} has {found} values that are NaN or infinite"
        if manifest.asset == "topk_cache" and not part.stats.get("max_probability_sum", math.nan) <= (
            1 + PROBABILITY_TOLERANCE
        ):
            return f"{part.name}: probabilities add up to {part.stats.get('max_probability_sum', math.nan):.6f}"
        if draws := draws_of(manifest):
            n_draws, expected = part.stats.get("n_draws", 0), draws * part.stats["n_positions"]
            if n_draws != expected:
                return f"{part.name} has {n_draws:.0f} draws, expected {draws} a position: {expected:.0f}"
        least, most = (part.stats.get(f"{which}_outside_mass", 0.0) for which in ("min", "max"))
        if not 0 <= least <= most <= 1:
            return f"{part.name} has masses outside of the student's vocabulary from {least:.6g} to {most:.6g}"
    return None


def recomputed_failure(manifest: Manifest) -> str | None:
    """Why the recorded recomputation of a sample does not stand for the result; None where it does."""
    record = manifest.checks.get("recomputed")
    if not isinstance(record, dict):
        return "there is no record of a recomputation"
    if manifest.n_documents and not record.get("n_documents"):
        return "no document was recomputed"
    for name, value in record.items():
        if name.startswith("max_") and not isinstance(value, (int, float)):
            return f"{name} is {value}"
    if record.get("passed") is not True:
        worst = record.get("worst_over_tolerance")
        by_how_much = f" ({worst:.3g} times its tolerance)" if isinstance(worst, (int, float)) else ""
        return f"the recomputation was recorded as failed{by_how_much}"
    return None


def rebuilt_failure(manifest: Manifest) -> str | None:
    """Why the recorded comparison of final states with top-k log-probabilities speaks against the result; None where it
    does not, or was not made: few caches have it (see `not_made_of`)."""
    record = manifest.checks.get("rebuilt")
    if record is None or not_made_of(record) is not None:
        return None
    if not isinstance(record, dict):
        return f"its record is {record!r:.40}"
    if not record.get("n_positions"):
        return "no position was compared"
    for name in ("worst_over_tolerance", "mean_kl", "max_abs_logprob_difference"):
        if not isinstance(record.get(name), (int, float)):
            return f"{name} is {record.get(name)}"
    if record.get("passed") is not True:
        worst = record.get("worst_over_tolerance")
        by_how_much = f" ({worst:.3g} times the tolerance)" if isinstance(worst, (int, float)) else ""
        return f"log-probabilities rebuilt from the final states are not those of the top-k cache{by_how_much}"
    return None


def is_rebuilt_with(manifest: Manifest, other: Manifest) -> bool:
    """Whether `other` has a record of the check `rebuilt`, and a good one, that is of this result or of one that this
    was recoded from: the check is recorded in one cache of the two."""
    record = other.checks.get("rebuilt")
    if not isinstance(record, dict) or not_made_of(record) is not None or rebuilt_failure(other) is not None:
        return False
    compared_with = record.get("compared_with")
    return compared_with == manifest.fingerprint or any(
        source.get("fingerprint") == compared_with for source in _recoded_from(manifest)
    )


def recoded_failure(manifest: Manifest) -> str | None:
    """Why a result that was made of another one is not what its source says; None where it is, and for one that the
    teacher's pass made."""
    record = manifest.checks.get("recoded")
    if record is None:
        return None
    if not isinstance(record, dict):
        return f"its record is {record!r:.40}"
    if (record.get("n_parts"), record.get("n_documents")) != (len(manifest.parts), manifest.n_documents):
        return f"{record.get('n_parts')} parts with {record.get('n_documents')} documents were compared"
    if record.get("passed") is not True:
        return f"decoded again, it is not its source: {record.get('difference', 'no difference is recorded')}"
    return None


def measured_on(manifest: Manifest, name: str) -> str | None:
    """The form of the result that a recorded check measured, where that is another one than this: of a recoded result,
    what it was made of. None where it is the result itself."""
    record = manifest.checks.get(name)
    of_result = record.get("of_result") if isinstance(record, dict) else None
    if of_result in (None, manifest.fingerprint):
        return None
    for source in _recoded_from(manifest):
        if source.get("fingerprint") == of_result:
            return str(source.get("codec"))
    return f"result {of_result}"


def _recoded_from(manifest: Manifest) -> Iterator[Mapping[str, Any]]:
    """What a result was made of, and that in turn; the nearest first."""
    source = manifest.provenance.get("recoded_from")
    while isinstance(source, dict):
        yield source
        source = source.get("recoded_from")


def codec_failure(manifest: Manifest) -> str | None:
    """The first part that its codec has changed by more than it may, by what was measured when it was written; None
    where there is none, and for a result without a codec."""
    codec = codec_name(manifest)
    names: tuple[str, ...]
    if codec == COMPACT:
        limit, names = divergence_limit(int(manifest.params.get("k", 1))), ("max_codec_kl", "max_codec_mean_kl")
    elif codec in CODED:
        limit, names = largest_error(codec), ("max_codec_state_error", "max_codec_relative_rms")
    else:
        return None
    for part in manifest.parts:
        for name in names:
            found = part.stats.get(name, math.nan)
            if not found <= limit:
                return f"{part.name}: {name} is {found:.2g}, and coding can cost {limit:.2g} at most"
    return None


def codec_name(manifest: Manifest) -> str:
    """The codec of a result's files; `plain` of those that have none."""
    found = str(manifest.params.get("codec", PLAIN))
    return PLAIN if found == RAW else found


def vocabulary_size_of(manifest: Manifest) -> int | None:
    """How many token ids the teacher has, where the result says so."""
    found = manifest.facts.get("vocab_size")
    return found if isinstance(found, int) else None


def require_readable(manifest: Manifest) -> None:
    """Raise UnknownCodecError for a result whose codec this version of kd_assets does not know."""
    recoded_by = manifest.provenance.get("recoded_by")
    wrote_it = recoded_by if isinstance(recoded_by, dict) else manifest.provenance
    require_known(manifest.asset, codec_name(manifest), made_by=wrote_it.get("kd_assets"))


def not_made_of(record: object) -> str | None:
    """Why a check that has a record could not be made; None where it was."""
    if isinstance(record, dict) and record.get("passed") is None and isinstance(record.get("not_made"), str):
        return str(record["not_made"])
    return None


def draws_of(manifest: Manifest) -> int:
    """Token ids that a cache holds of each position as random draws: 0 for one without, and for other assets."""
    return int(manifest.params.get("draws", 0))


def top_p_of(manifest: Manifest) -> float | None:
    """Of a top-k cache whose positions keep as many tokens as have this mass; None where all keep k."""
    found = manifest.params.get("top_p")
    return None if found is None else float(found)

"""Two caches are compared document by document: equal ones by nothing, others by what a dense computation gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kd_assets import cli
from kd_assets.contract import CACHES, Asset
from kd_assets.errors import VariantConflictError
from kd_assets.store import CacheReader, Documents, encode_hidden_states, encode_topk, part_stats
from kd_assets.store.comparing import compare, topk_numbers
from kd_assets_tests.store import examples
from kd_assets_tests.store.examples import VOCABULARY

RNG = np.random.default_rng(0)


def committed(
    store: Path, asset: Asset, table: Any, n_tokens: int, *, name: int, params: Mapping[str, Any] | None = None
) -> CacheReader:
    """A result of this table, of a variant of its own."""
    out = examples.output(store, asset, params={**examples.PARAMS[asset], **(params or {}), "max_length": 100 + name})
    with examples.writer(store, out) as writer:
        writer.write_part(0, table, n_tokens=n_tokens, stats=part_stats(asset, table))
        writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={})
    return CacheReader.from_folders([Path(out.path)], allow_failed=True)


def topk_of(docs: Documents, logits_MV: npt.NDArray[np.float64], k: int) -> Any:
    logsumexp = np.log(np.exp(logits_MV).sum(axis=1))
    logprobs = logits_MV - logsumexp[:, None]
    top = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    return encode_topk(
        docs,
        topk_ids_Mk=top.astype(np.uint32),
        topk_logprobs_Mk=np.take_along_axis(logprobs, top, axis=1).astype(np.float16),
        logsumexp_M=logsumexp.astype(np.float32),
        target_logprob_M=np.take_along_axis(logprobs, examples.targets(docs)[:, None], axis=1)[:, 0].astype(np.float32),
    )


@pytest.mark.parametrize("asset", CACHES)
def test_a_cache_differs_from_itself_by_exactly_nothing(store: Path, asset: Asset) -> None:
    folder, manifest = examples.commit(store, asset)
    reader = CacheReader.from_folders([folder])
    found = compare(reader, CacheReader.from_folders([folder]))
    assert found.n_documents == manifest.n_documents
    assert (found.only_in_first, found.only_in_second, found.other_tokens) == ([], [], [])
    assert found.worst == []
    for name, measure in found.measures.items():
        expected = 1.0 if name.startswith("cosine") else 0.0
        assert measure.mean == pytest.approx(expected, abs=1e-12), name
        assert measure.n_not_finite == 0


@pytest.mark.parametrize("seed", range(5))
def test_kl_is_that_of_the_whole_distributions_where_every_id_is_kept(store: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    docs = examples.documents((4, 1, 9, 2), seed=seed)
    n_positions = docs.n_tokens - docs.n_documents
    logits, other = rng.normal(0, 2, (2, n_positions, VOCABULARY))
    one_reader = committed(store, "topk_cache", topk_of(docs, logits, VOCABULARY), docs.n_tokens, name=1)
    other_reader = committed(store, "topk_cache", topk_of(docs, other, VOCABULARY), docs.n_tokens, name=2)
    found = compare(one_reader, other_reader)
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (logits, other))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    assert found.measures["kl"].mean == pytest.approx(kl.mean(), rel=2e-3)
    assert found.measures["kl"].n == n_positions == found.n_positions
    assert found.measures["top1_differs"].mean == pytest.approx((p.argmax(1) != q.argmax(1)).mean())
    assert found.measures["ids_differ"].mean == 0
    assert found.measures["logprob"].largest == pytest.approx(np.abs(p - q).max(), rel=2e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_kl_of_cut_caches_is_that_of_the_common_ids_and_one_bucket(store: Path, k: int) -> None:
    docs = examples.documents((6, 3))
    logits, other = RNG.normal(0, 2, (2, docs.n_tokens - docs.n_documents, VOCABULARY))
    one = committed(store, "topk_cache", topk_of(docs, logits, k), docs.n_tokens, name=1)
    two = committed(store, "topk_cache", topk_of(docs, other, k + 1), docs.n_tokens, name=2)
    found = compare(one, two, n_worst=1)
    expected = []
    for i in range(len(one)):
        a, b = one[i], two[i]
        for ids, logprobs, ids2, logprobs2 in zip(
            a["topk_ids"], a["topk_logprobs"], b["topk_ids"], b["topk_logprobs"], strict=True
        ):
            q = dict(zip(ids2.tolist(), logprobs2.astype(float).tolist(), strict=True))
            common = [(float(lp), q[int(t)]) for t, lp in zip(ids, logprobs, strict=True) if int(t) in q]
            rest = [1 - sum(np.exp(pair[side]) for pair in common) for side in (0, 1)]
            kl = sum(np.exp(x) * (x - y) for x, y in common) + rest[0] * np.log(rest[0] / rest[1])
            expected.append(kl)
    assert found.measures["kl"].mean == pytest.approx(np.mean(expected), rel=1e-6)
    assert len(found.worst) == 1


def test_documents_of_one_cache_alone_and_of_other_tokens_are_counted_and_named(store: Path) -> None:
    docs = examples.documents((5, 3, 7))
    logits = RNG.normal(0, 2, (docs.n_tokens - docs.n_documents, VOCABULARY))
    one = committed(store, "topk_cache", topk_of(docs, logits, 4), docs.n_tokens, name=1)
    cut = docs.slice(0, 3, max_length=4)
    renamed = Documents(
        document_ids=["document-0", "document-1", "another"],
        offsets=cut.offsets,
        input_ids=cut.input_ids,
        loss_mask=cut.loss_mask,
    )
    logits = RNG.normal(0, 2, (cut.n_tokens - cut.n_documents, VOCABULARY))
    two = committed(store, "topk_cache", topk_of(renamed, logits, 4), cut.n_tokens, name=2)
    found = compare(one, two)
    assert found.n_documents == 1
    assert found.only_in_first == [(examples.PARTITION, "document-2")]
    assert found.only_in_second == [(examples.PARTITION, "another")]
    assert found.other_tokens == [(examples.PARTITION, "document-0")]


def test_the_document_that_was_spoiled_is_the_worst(store: Path) -> None:
    docs = examples.documents((5, 8, 6, 4))
    states = RNG.normal(0, 1, (docs.n_tokens, 16)).astype(np.float32)
    spoiled = states.copy()
    spoiled[5:13] *= 1.5
    bits = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (states, spoiled)]
    readers = [
        committed(
            store,
            "hidden_state_cache",
            encode_hidden_states(docs, {2: b}),
            docs.n_tokens,
            name=n,
            params={"blocks": [2]},
        )
        for n, b in enumerate(bits)
    ]
    found = compare(*readers)
    assert found.worst[0].document_id == "document-1"
    assert found.worst[0].difference == pytest.approx(0.5, rel=0.02)
    assert found.measures["cosine hidden_block_2"].mean == pytest.approx(1, abs=1e-4)
    assert found.measures["distance hidden_block_2"].largest == pytest.approx(0.5, rel=0.03)


def test_numbers_that_are_none_are_counted_and_their_document_is_the_worst(store: Path) -> None:
    docs = examples.documents((3, 3))
    bits = np.full((docs.n_tokens, 4), 0x3F80, np.uint16)
    broken = bits.copy()
    broken[4, 0] = 0x7FC0  # NaN
    readers = [
        committed(
            store,
            "hidden_state_cache",
            encode_hidden_states(docs, {2: b}),
            docs.n_tokens,
            name=n,
            params={"blocks": [2]},
        )
        for n, b in enumerate((bits, broken))
    ]
    found = compare(*readers)
    assert found.measures["distance hidden_block_2"].n_not_finite == 1
    assert found.worst[0].document_id == "document-1"


def test_ids_of_different_rows_are_not_mixed() -> None:
    def document(ids: list[list[int]]) -> dict[str, Any]:
        shape = (len(ids), len(ids[0]))
        return {
            "topk_ids": np.array(ids, np.uint32),
            "topk_logprobs": np.full(shape, np.log(1 / shape[1]), np.float16),
            "target_logprob": np.zeros(len(ids), np.float32),
            "logsumexp": np.zeros(len(ids), np.float32),
        }

    found = topk_numbers(document([[1, 2], [3, 4294967295]]), document([[3, 4], [4294967295, 3]]))
    assert found["ids_differ"].tolist() == [1.0, 0.0]


def test_caches_of_different_assets_are_refused(store: Path) -> None:
    readers = [CacheReader.from_folders([examples.commit(store, asset)[0]]) for asset in CACHES[:2]]
    with pytest.raises(VariantConflictError, match="topk_cache cannot be compared with hidden_state_cache"):
        compare(*readers)


def test_the_command_compares_results_variants_and_recipes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = examples.documents((5, 8))
    logits, other = RNG.normal(0, 2, (2, docs.n_tokens - docs.n_documents, VOCABULARY))
    one = committed(store, "topk_cache", topk_of(docs, logits, 4), docs.n_tokens, name=1)
    two = committed(store, "topk_cache", topk_of(docs, other, 4), docs.n_tokens, name=2)
    result, variant = one.folders[0], two.folders[0].parents[1]
    assert cli.main(["diff", str(result), str(variant)]) == 0
    out = capsys.readouterr().out
    assert f"topk_cache: {one.variant} and {two.variant}, 2 documents, 11 positions" in out
    assert "kl " in out
    assert "[tiny-00000]  kl " in out
    assert cli.main(["diff", str(result), str(variant), "--json", "--fail-above", "0.001"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["measures"]["kl"]["mean"] > 0.001
    assert cli.main(["diff", str(result), str(result), "--fail-above", "0"]) == 0
    capsys.readouterr()
    assert cli.main(["diff", str(store / "tiny"), str(result)]) == 2
    assert "say with --asset which of its caches" in capsys.readouterr().err
    assert cli.main(["diff", str(store / "tiny"), str(result), "--asset", "topk_cache"]) == 1
    assert "several variants" in capsys.readouterr().err

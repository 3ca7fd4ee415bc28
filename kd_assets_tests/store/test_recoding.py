"""Results made of others that differ by their codec alone: the same bytes as the teacher's pass gives, or a refusal."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kd_assets import cli
from kd_assets.contract import Asset, Output
from kd_assets.durable import file_sha256
from kd_assets.errors import (
    CodecRangeError,
    CorruptPartError,
    FailedCheckError,
    NoSourceError,
    RecipeError,
    StorageUnavailableError,
)
from kd_assets.store import (
    CacheReader,
    Documents,
    Manifest,
    ResultFiles,
    ResultWriter,
    check_all,
    coded,
    encode_hidden_states,
    failed_check,
    part_stats,
    plan_output,
    plan_parts,
    put_aside,
    read_head,
    read_manifest,
    verify,
)
from kd_assets.store.codecs import states
from kd_assets.store.codecs.coded import Coded
from kd_assets.store.codecs.state_codec import CODED, largest_error
from kd_assets.store.codecs.topk_compact import divergence_limit
from kd_assets.store.computing_versions import computing_versions
from kd_assets.store.layout import recipe_folder_of
from kd_assets.store.partfile import PartFile
from kd_assets.store.recoding.recode import RecodingProgress, bytes_after, bytes_finished, recode, source_in
from kd_assets.store.recoding.sources import candidates, find_source
from kd_assets.store.recorded_checks import measured_on
from kd_assets.store.superseded import superseded
from kd_assets_tests.store import examples
from kd_assets_tests.store.test_coded_draws import in_the_old_dress

SIZE = 128
BLOCKS = (0, 2)
OWN = {"host": "another", "kd_assets": "9.9.9"}
PLAIN: dict[str, Any] = {"k": examples.K, "max_length": examples.MAX_LENGTH}


def state_params(codec: str) -> dict[str, Any]:
    coded_as = {} if codec == "raw" else {"codec": codec}
    return {"blocks": list(BLOCKS), "max_length": examples.MAX_LENGTH, **coded_as}


def commit_states(
    store: Path, codec: str, *, size: int = SIZE, scale: float = 1.0, stats: Mapping[str, float] | None = None
) -> tuple[Path, Manifest]:
    """What the teacher's pass writes with this codec, two documents a part."""
    docs = examples.documents().slice(0, len(examples.LENGTHS), examples.MAX_LENGTH)
    rng = np.random.default_rng(0)
    exact = {
        block: states.float32_to_bfloat16((rng.normal(0, 1, (docs.n_tokens, size)) * scale).astype(np.float32))
        for block in BLOCKS
    }
    out = examples.output(store, "hidden_state_cache", params=state_params(codec))
    with examples.writer(store, out) as writer:
        plans = plan_parts(docs.n_tokens_D, max_documents=2, max_tokens=10**6)
        for plan in plans:
            part = docs.slice(plan.first_document, plan.n_documents)
            rows = slice(
                int(docs.offsets[plan.first_document]), int(docs.offsets[plan.first_document + plan.n_documents])
            )
            made = coded(encode_hidden_states(part, {b: bits[rows] for b, bits in exact.items()}), codec)
            found = part_stats("hidden_state_cache", made.decoded) | made.error | {"min_token_budget": 64.0}
            writer.write_part(plan.index, made.stored, n_tokens=part.n_tokens, stats=found | dict(stats or {}))
        manifest = writer.commit(
            parts=len(plans), checks={"recomputed": examples.RECOMPUTED}, provenance={"host": "a node", "teacher": "t"}
        )
    return Path(out.path), manifest


def wanted_states(store: Path, codec: str) -> Output:
    return examples.output(store, "hidden_state_cache", params=state_params(codec))


def wanted_topk(store: Path, **params: Any) -> Output:
    return examples.output(store, "topk_cache", params={**PLAIN, **params})


def recoded(wanted: Output) -> Manifest:
    search = find_source(wanted)
    assert search.source is not None, search.why_none
    return recode(search.source, wanted, made_by=OWN, clock=examples.fixed_clock)


def files_of(folder: Path) -> dict[str, str]:
    """Part files and the index, with the hashes of their bytes."""
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith(("part-", "documents", "vocabulary")))
    return {name: file_sha256(folder / name) for name in names}


def assert_as_the_teacher_writes_it(found: Path, expected: Path) -> None:
    made, by_teacher = read_manifest(found), read_manifest(expected)
    assert files_of(found) == files_of(expected)
    assert found.relative_to(found.parents[4]) == expected.relative_to(expected.parents[4])
    for name in ("fingerprint", "variant", "data_version", "parts", "stats", "n_bytes", "identity", "facts"):
        assert getattr(made, name) == getattr(by_teacher, name), name


# --------------------------------------------------------------------------------------------------------- same bytes


@pytest.mark.parametrize("asked", [{}, {"draws": examples.DRAWS, "seed": 0}])
@pytest.mark.parametrize("form", [{"codec": "compact"}, {"codec": "compact", "logsumexp": False}])
def test_a_compact_cache_recoded_from_a_plain_one_is_the_one_that_the_teacher_writes(
    tmp_path: Path, asked: dict[str, Any], form: dict[str, Any]
) -> None:
    expected, _ = examples.commit(tmp_path / "teacher", "topk_cache", params={**PLAIN, **asked, **form})
    source, before = examples.commit(tmp_path / "store", "topk_cache", params={**PLAIN, **asked})
    old = files_of(source)
    wanted = wanted_topk(tmp_path / "store", **asked, **form)
    made = recoded(wanted)
    assert_as_the_teacher_writes_it(Path(wanted.path), expected)
    assert made.checks["recoded"] == {
        "max_kl": pytest.approx(made.stats["max_codec_kl"], abs=1e-7),
        "passed": True,
        "is_exact": False,
        "n_parts": 2,
        "n_documents": 4,
        "source_data_version": before.data_version,
    }
    assert 0 < made.stats["max_codec_kl"] <= divergence_limit(examples.K)
    assert (files_of(source), read_manifest(source), read_head(source.parent)) == (old, before, source)
    assert read_head(Path(wanted.path).parent) == Path(wanted.path)
    report = verify(tmp_path / "store")
    assert (report.problems, report.notes) == ((), ())


def test_of_a_compact_cache_the_logsumexp_alone_can_be_left_out(tmp_path: Path) -> None:
    """Nothing is rounded again."""
    form = {"codec": "compact", "logsumexp": False}
    expected, _ = examples.commit(tmp_path / "teacher", "topk_cache", params={**PLAIN, **form})
    examples.commit(tmp_path / "store", "topk_cache", params=examples.COMPACT)
    wanted = wanted_topk(tmp_path / "store", **form)
    made = recoded(wanted)
    assert_as_the_teacher_writes_it(Path(wanted.path), expected)
    assert made.provenance["recoded_from"]["codec"] == "compact"
    assert made.checks["recoded"]["is_exact"] is True


@pytest.mark.parametrize(
    ("before", "after"), [("split", "raw"), ("split", "fp8"), *(("raw", codec) for codec in CODED)]
)
def test_states_recoded_from_exact_ones_are_those_that_the_teacher_writes(
    tmp_path: Path, before: str, after: str
) -> None:
    expected, _ = commit_states(tmp_path / "teacher", after)
    commit_states(tmp_path / "store", before)
    wanted = wanted_states(tmp_path / "store", after)
    made = recoded(wanted)
    assert_as_the_teacher_writes_it(Path(wanted.path), expected)
    assert made.checks["recoded"]["is_exact"] is (after in ("raw", "split"))
    assert made.stats.get("max_codec_state_error", 0.0) <= largest_error(after)
    assert made.checks["recoded"].get("max_state_error", 0.0) == made.stats.get("max_codec_state_error", 0.0)
    assert made.stats["min_token_budget"] == 64.0
    shard, _ = examples.commit(tmp_path / "store", "shards_manifest")
    checks = {c.name: c.passed for c in check_all(ResultFiles(Path(wanted.path)), ResultFiles(shard))}
    coding = {} if after == "raw" else {"codec": True}
    assert checks == {"complete": True, "schema": True, "finite": True, "recomputed": True, "recoded": True, **coding}


def as_before(patch: pytest.MonkeyPatch) -> None:
    """Results are written as they were before random draws were coded."""

    def in_old_dress(plain: pa.Table, codec: str) -> Coded:
        return dataclasses.replace(coded(plain, codec), stored=in_the_old_dress(plain))

    patch.setattr(examples, "coded", in_old_dress)
    patch.setattr(examples, "computing_versions", lambda asset, params: {})


@pytest.mark.parametrize("form", [{}, {"logsumexp": False}])
def test_a_compact_cache_of_before_draws_were_coded_becomes_the_one_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    asked = {"codec": "compact", "draws": examples.DRAWS, "seed": 0}
    expected, _ = examples.commit(tmp_path / "teacher", "topk_cache", params={**PLAIN, **asked, **form})
    with monkeypatch.context() as before:
        as_before(before)
        examples.commit(tmp_path / "store", "topk_cache", params={**PLAIN, **asked})
    wanted = wanted_topk(tmp_path / "store", **asked, **form)
    made = recoded(wanted)
    assert_as_the_teacher_writes_it(Path(wanted.path), expected)
    assert made.provenance["recoded_from"]["codec"] == "compact, its draws not coded"
    assert made.checks["recoded"]["is_exact"] is True


def test_files_beside_the_parts_come_along(tmp_path: Path) -> None:
    beside = {"vocabulary.json": b"[[0,11]]\n"}
    expected, _ = examples.commit(tmp_path / "teacher", "topk_cache", params=examples.COMPACT, beside=beside)
    source, _ = examples.commit(tmp_path / "store", "topk_cache", params=PLAIN, beside=beside)
    wanted = wanted_topk(tmp_path / "store", codec="compact")
    recoded(wanted)
    assert_as_the_teacher_writes_it(Path(wanted.path), expected)
    examples.flip_byte(source / "vocabulary.json")
    with pytest.raises(CorruptPartError, match=r"vocabulary\.json was changed"):
        recoded(wanted_topk(tmp_path / "store", codec="compact", logsumexp=False))


def test_a_cache_without_documents_is_recoded_into_one_without(tmp_path: Path) -> None:
    nothing = Documents(
        document_ids=[],
        offsets=np.zeros(1, np.int64),
        input_ids=np.zeros(0, np.uint32),
        loss_mask=np.zeros(0, np.bool_),
    )
    examples.commit(tmp_path, "topk_cache", docs=nothing)
    assert recoded(wanted_topk(tmp_path, codec="compact")).checks["recoded"]["passed"] is True


# ---------------------------------------------------------------------------------------------------- where it is from


def test_a_recoded_result_says_what_it_is_made_of_and_stays_the_teachers(tmp_path: Path) -> None:
    source, before = commit_states(tmp_path, "raw")
    split = recoded(wanted_states(tmp_path, "split"))
    assert {name: split.provenance[name] for name in before.provenance} == before.provenance
    assert split.provenance["recoded_from"] == {
        "codec": "raw",
        "fingerprint": before.fingerprint,
        "data_version": before.data_version,
        "folder": str(source.relative_to(tmp_path / examples.RECIPE)),
        "n_bytes": before.n_bytes,
        "created_at": before.created_at,
    }
    by = split.provenance["recoded_by"]
    assert (by["host"], by["kd_assets"]) == ("another", "9.9.9")
    assert by["wall_s"] >= 0
    (source / "manifest.json").unlink()
    fp8 = recoded(wanted_states(tmp_path, "fp8"))
    assert fp8.provenance["recoded_from"]["codec"] == "split"
    assert fp8.provenance["recoded_from"]["recoded_from"] == split.provenance["recoded_from"]


def test_the_sources_checks_come_along_and_say_of_which_result_they_are(tmp_path: Path) -> None:
    checks = {"recomputed": examples.RECOMPUTED, "rebuilt": examples.REBUILT}
    _, before = examples.commit(tmp_path, "topk_cache", checks=checks)
    made = recoded(wanted_topk(tmp_path, codec="compact"))
    for name, record in checks.items():
        assert made.checks[name] == {**record, "of_result": before.fingerprint}
    assert failed_check(made) is None


def test_what_was_measured_on_the_source_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = {"recomputed": examples.RECOMPUTED, "rebuilt": examples.REBUILT}
    folder, before = examples.commit(tmp_path, "topk_cache", checks=checks)
    wanted = wanted_topk(tmp_path, codec="compact")
    made = recoded(wanted)
    assert (measured_on(before, "recomputed"), measured_on(made, "recomputed")) == (None, "plain")
    assert (measured_on(made, "rebuilt"), measured_on(made, "recoded")) == ("plain", None)
    shard, _ = examples.commit(tmp_path, "shards_manifest")
    said = {c.name: c.description for c in check_all(ResultFiles(Path(wanted.path)), ResultFiles(shard))}
    assert said["recomputed"].endswith("measured on plain, of which this was made")
    assert said["rebuilt"].endswith("measured on plain, of which this was made")
    for path, expected in ((Path(wanted.path), True), (folder, False)):
        assert cli.main(["inspect", str(path), "--documents", "0"]) == 0
        assert ("passed in 1 of 1 partitions, measured on plain" in capsys.readouterr().out) is expected


@pytest.mark.parametrize(
    "change",
    [
        {"passed": False, "difference": "part-00000.parquet: topk_ids of documents 0 to 1 is not that of the source"},
        {"n_parts": 1},
        {"n_documents": 3},
    ],
)
def test_a_result_that_is_not_its_source_has_failed_a_check(tmp_path: Path, change: dict[str, Any]) -> None:
    examples.commit(tmp_path, "topk_cache")
    made = recoded(wanted_topk(tmp_path, codec="compact"))
    damaged = dataclasses.replace(made, checks=made.checks | {"recoded": made.checks["recoded"] | change})
    assert str(failed_check(damaged)).startswith("check recoded failed")


def test_a_part_that_is_on_disk_otherwise_than_it_was_made_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codec that loses something it should not is found by what is read, whatever it says of itself."""
    commit_states(tmp_path, "raw")
    wanted = wanted_states(tmp_path, "split")

    def lossy(bits_NH: states.Uint16Array) -> tuple[states.Uint8Array, states.Uint8Array]:
        high, low = split_planes(bits_NH)
        low[-1, -1] ^= 1
        return high, low

    split_planes = states.split_planes
    monkeypatch.setattr(states, "split_planes", lossy)
    words = r"not committed: check recoded failed: .*part-00000\.arrow: hidden_block_0 of documents 0 to 1"
    with pytest.raises(FailedCheckError, match=words):
        recoded(wanted)
    assert not (Path(wanted.path) / "manifest.json").exists()
    monkeypatch.undo()
    assert recoded(wanted).checks["recoded"]["passed"] is True


@pytest.mark.parametrize("codec", ["compact", "fp8"])
def test_what_is_further_from_the_source_than_coding_can_cost_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """An encoder that is content with itself is measured by what the disk gives back."""
    is_topk = codec == "compact"
    _ = examples.commit(tmp_path, "topk_cache") if is_topk else commit_states(tmp_path, "raw")
    wanted = wanted_topk(tmp_path, codec=codec) if is_topk else wanted_states(tmp_path, codec)
    limit = "divergence_limit" if is_topk else "largest_error"
    monkeypatch.setattr(f"kd_assets.store.recoding.measuring.{limit}", lambda of: 0.0)
    with pytest.raises(FailedCheckError, match="and coding can cost 0 at most"):
        recoded(wanted)
    assert not (Path(wanted.path) / "manifest.json").exists()


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("asset", "before", "after", "why"),
    [
        ("topk_cache", examples.COMPACT, PLAIN, "rounded already by compact"),
        (
            "topk_cache",
            {**examples.COMPACT, "logsumexp": False},
            examples.COMPACT,
            "has no logsumexp, which only the teacher can give",
        ),
    ],
)
def test_what_was_rounded_is_not_recoded(
    tmp_path: Path, asset: Asset, before: dict[str, Any], after: dict[str, Any], why: str
) -> None:
    folder, _ = examples.commit(tmp_path, asset, params=before)
    wanted = examples.output(tmp_path, asset, params=after)
    search = find_source(wanted)
    assert search.source is None
    assert why in search.why_none
    assert str(folder) in search.why_none
    with pytest.raises(NoSourceError, match=why):
        source_in(folder, wanted)


@pytest.mark.parametrize(
    ("before", "after"), [("fp8", "raw"), ("fp8", "int8_32"), ("int8_32", "split"), ("int8_128", "int8_32")]
)
def test_rounded_states_are_not_recoded(tmp_path: Path, before: str, after: str) -> None:
    commit_states(tmp_path, before)
    search = find_source(wanted_states(tmp_path, after))
    assert search.source is None
    assert f"rounded already by {before}" in search.why_none


def test_without_any_other_form_it_is_said_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / examples.RECIPE).mkdir()
    search = find_source(wanted_states(tmp_path, "fp8"))
    assert (search.source, search.looked_for) == (None, ("raw", "split"))
    assert "no committed result of raw or split is there" in search.why_none
    nothing = find_source(examples.output(tmp_path, "embedding_cache"))
    assert "it has no codec" in nothing.why_none


def test_another_teacher_shard_or_parameter_is_no_source(tmp_path: Path) -> None:
    examples.commit(tmp_path, "topk_cache")
    for change in ({"weights_fingerprint": "1" * 64}, {"input": "another"}, {"params": {**examples.COMPACT, "k": 3}}):
        wanted = wanted_topk(tmp_path, codec="compact")
        identity = wanted.identity | change
        other = plan_output(
            "topk_cache", identity, recipe_folder=tmp_path / examples.RECIPE, partition_key=examples.PARTITION
        )
        assert find_source(other).source is None
    with pytest.raises(NoSourceError, match="is not the same as"):
        source_in(Path(other.path), wanted_topk(tmp_path, codec="compact"))


def test_a_source_that_failed_a_check_is_refused_by_name(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache", checks={"recomputed": {**examples.RECOMPUTED, "passed": False}})
    wanted = wanted_topk(tmp_path, codec="compact")
    search = find_source(wanted)
    assert search.source is None
    assert "check recomputed failed" in search.why_none
    with pytest.raises(FailedCheckError, match="check recomputed failed"):
        source_in(folder, wanted)


def test_what_was_put_aside_is_not_made_of_the_same_source_again(tmp_path: Path) -> None:
    """A bad result that was recoded comes from a bad source, and its bytes would come back."""
    folder, _ = examples.commit(tmp_path, "topk_cache")
    wanted = wanted_topk(tmp_path, codec="compact")
    recoded(wanted)
    recipe_folder = tmp_path / examples.RECIPE
    (aside,) = put_aside(recipe_folder, [examples.PARTITION], ["topk_cache"], why="bad", variant=wanted.variant)
    for again in (wanted, wanted_topk(tmp_path, codec="compact", logsumexp=False)):
        search = find_source(again)
        assert search.source is None
        for words in (str(folder), f"{aside.folder}, which was recoded from it, is in quarantine", "recode: false"):
            assert words in search.why_none
        with pytest.raises(NoSourceError, match="is in quarantine: either put it aside"):
            source_in(folder, again)


def test_which_of_the_variants_is_put_aside_must_be_said_and_how_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, before = examples.commit(tmp_path, "topk_cache")
    made = recoded(wanted_topk(tmp_path, codec="compact"))
    command = ["quarantine", str(tmp_path / examples.RECIPE), examples.PARTITION, "--why", "bad"]
    assert cli.main(command) != 0
    said = capsys.readouterr().err
    for words in (
        f"{before.variant}, plain",
        f"{made.variant}, compact recoded from plain",
        "--variant VARIANT",
        "--all-variants",
    ):
        assert words in said
    assert cli.main([*command, "--all-variants"]) == 0
    assert "2 results are aside" in capsys.readouterr().out


def test_a_damaged_manifest_of_a_source_is_named(tmp_path: Path) -> None:
    folder, _ = examples.commit(tmp_path, "topk_cache")
    examples.flip_byte(folder / "manifest.json")
    assert "the result of plain is damaged" in find_source(wanted_topk(tmp_path, codec="compact")).why_none


@pytest.mark.parametrize("codec", ["compact", "fp8"])
def test_a_flipped_bit_of_the_source_ends_the_recoding_and_names_the_file(tmp_path: Path, codec: str) -> None:
    is_topk = codec == "compact"
    folder, _ = examples.commit(tmp_path, "topk_cache") if is_topk else commit_states(tmp_path, "raw")
    wanted = wanted_topk(tmp_path, codec=codec) if is_topk else wanted_states(tmp_path, codec)
    part = sorted(folder.glob("part-00001.*"))[0]
    examples.flip_byte(part)
    with pytest.raises(
        CorruptPartError, match=f"damaged source: .*{part.name} was changed after its commit"
    ) as refused:
        recoded(wanted)
    ways = f"kd-assets quarantine {tmp_path / examples.RECIPE} {examples.PARTITION} --assets {wanted.asset} --variant"
    assert ways in str(refused.value)
    assert "or say recode: false in the recipe" in str(refused.value)
    assert not (Path(wanted.path) / "manifest.json").exists()


def test_numbers_beyond_the_codec_name_part_and_document(tmp_path: Path) -> None:
    commit_states(tmp_path, "raw", scale=2.0**45)
    with pytest.raises(CodecRangeError, match=r"part-00000\.arrow: hidden_block_0 of document 'document-0', vector 0"):
        recoded(wanted_states(tmp_path, "fp8"))


def test_groups_that_do_not_divide_a_state_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    commit_states(tmp_path, "raw", size=48)
    wanted = wanted_states(tmp_path, "int8_32")
    with pytest.raises(RecipeError, match="groups of 32 do not divide the teacher's hidden size 48"):
        recoded(wanted)
    assert not Path(wanted.path).exists()


def test_a_full_disk_is_named_before_the_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_states(tmp_path, "raw")
    wanted = wanted_states(tmp_path, "split")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("kd_assets.store.recoding.recode.shutil.disk_usage", lambda path: usage(10, 0, 10))
    with pytest.raises(StorageUnavailableError, match=r"will take about [0-9,]+ bytes more, and 10 are free"):
        recoded(wanted)
    assert not list(Path(wanted.path).glob("part-*"))


# ------------------------------------------------------------------------------------------- kills, and what is beside


class _StopError(Exception):
    pass


def test_a_recoding_that_was_stopped_goes_on_after_its_last_part_and_ends_the_same(tmp_path: Path) -> None:
    commit_states(tmp_path / "a", "raw")
    commit_states(tmp_path / "b", "raw")
    undisturbed = wanted_states(tmp_path / "a", "int8_32")
    recoded(undisturbed)
    wanted = wanted_states(tmp_path / "b", "int8_32")

    def stop(progress: RecodingProgress) -> None:
        raise _StopError

    source = find_source(wanted).source
    assert source is not None
    with pytest.raises(_StopError):
        recode(source, wanted, made_by=OWN, on_part=stop)
    first = Path(wanted.path) / "part-00000.arrow"
    written = first.stat().st_mtime_ns
    seen: list[RecodingProgress] = []
    recode(source, wanted, made_by=OWN, on_part=seen.append, clock=examples.fixed_clock)
    assert first.stat().st_mtime_ns == written
    assert [(p.n_parts, p.of_parts, p.n_documents) for p in seen] == [(1, 2, 2), (2, 2, 4)]
    assert_as_the_teacher_writes_it(Path(wanted.path), Path(undisturbed.path))


@pytest.mark.parametrize(
    "where",
    ["recoding._difference", "writer.atomic_write", "writer.write_head", "writer.remove_file"],
)
def test_killed_anywhere_and_called_again_it_ends_with_the_same_bytes(tmp_path: Path, where: str) -> None:
    """The process kills itself at the entry of the step: the moment is exact, the SIGKILL is real."""
    examples.commit(tmp_path / "a", "topk_cache")
    examples.commit(tmp_path / "b", "topk_cache")
    undisturbed, wanted = (wanted_topk(tmp_path / store, codec="compact") for store in "ab")
    recoded(undisturbed)
    script = f"""
import os, signal, sys
from pathlib import Path
from kd_assets.store.recoding import recode as recoding
from kd_assets.store.writing import writer
from kd_assets_tests.store import test_recoding
wanted = test_recoding.wanted_topk(Path(sys.argv[1]), codec="compact")
{where} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
test_recoding.recoded(wanted)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "b")], check=False)
    assert killed.returncode == -signal.SIGKILL
    recoded(wanted)
    assert_as_the_teacher_writes_it(Path(wanted.path), Path(undisturbed.path))
    assert not (Path(wanted.path) / "journal.jsonl").exists()
    report = verify(tmp_path / "b")
    assert (report.problems, report.notes) == ((), ())


def leave_a_part(store: Path, *, shift: float, recoded_from: str | None = None) -> Path:
    """What a pass that was killed after its first part has left of the compact cache: its log-probabilities are those
    of another node, lower by `shift`."""
    docs = examples.documents().slice(0, len(examples.LENGTHS), examples.MAX_LENGTH).slice(0, 2)
    other, _ = examples.commit(store.with_name("other"), "topk_cache", docs=docs)
    wanted = wanted_topk(store, codec="compact")
    with PartFile(other / "part-00000.parquet") as part:
        table = part.read(part.names)
    column = table["topk_logprobs"].combine_chunks()
    lower = (column.flatten().flatten().to_numpy() - shift).astype(np.float16)
    inner = pa.FixedSizeListArray.from_arrays(pa.array(lower), type=column.type.value_type)
    changed = pa.ListArray.from_arrays(column.offsets, inner, type=column.type)
    at = table.schema.get_field_index("topk_logprobs")
    made = coded(table.set_column(at, table.schema.field(at), changed), "compact")
    with ResultWriter(
        wanted,
        recipe=examples.RECIPE,
        recipe_folder=store / examples.RECIPE,
        partition_key=examples.PARTITION,
        recoded_from=recoded_from,
    ) as writer:
        stats = part_stats("topk_cache", made.decoded) | made.error
        writer.write_part(0, made.stored, n_tokens=docs.n_tokens, stats=stats)
    return Path(wanted.path)


def test_parts_that_a_killed_pass_of_the_teacher_has_left_are_made_anew_of_the_source(tmp_path: Path) -> None:
    expected, _ = examples.commit(tmp_path / "teacher", "topk_cache", params=examples.COMPACT)
    examples.commit(tmp_path / "store", "topk_cache", params=PLAIN)
    folder = leave_a_part(tmp_path / "store", shift=1.0)
    made = recoded(wanted_topk(tmp_path / "store", codec="compact"))
    assert made.checks["recoded"]["passed"] is True
    assert_as_the_teacher_writes_it(folder, expected)


def test_a_part_of_a_killed_recoding_that_is_not_the_source_is_written_anew(tmp_path: Path) -> None:
    """[F105] The source was made again since, or another node wrote the part otherwise."""
    expected, _ = examples.commit(tmp_path / "teacher", "topk_cache", params=examples.COMPACT)
    _, source = examples.commit(tmp_path / "store", "topk_cache", params=PLAIN)
    folder = leave_a_part(tmp_path / "store", shift=1.0, recoded_from=source.fingerprint)
    assert recoded(wanted_topk(tmp_path / "store", codec="compact")).checks["recoded"]["passed"] is True
    assert_as_the_teacher_writes_it(folder, expected)


def test_the_teacher_does_not_go_on_behind_the_parts_of_a_killed_recoding(tmp_path: Path) -> None:
    """[F17, F19]"""
    wanted = wanted_topk(tmp_path, codec="compact")
    leave_a_part(tmp_path, shift=1.0, recoded_from="f" * 64)
    with examples.writer(tmp_path, wanted) as writer:
        assert not writer.finished
        assert writer.forgotten == ("part-00000.parquet: made by recoding",)
    with examples.writer(tmp_path, wanted) as writer:  # it is said once
        assert writer.forgotten == ()
    leave_a_part(tmp_path, shift=1.0)
    with examples.writer(tmp_path, wanted) as writer:
        assert set(writer.finished) == {0}


def test_of_a_recoded_result_that_was_damaged_the_teacher_keeps_no_part(tmp_path: Path) -> None:
    examples.commit(tmp_path, "topk_cache")
    wanted = wanted_topk(tmp_path, codec="compact")
    recoded(wanted)
    examples.flip_byte(Path(wanted.path) / "part-00000.parquet")
    with examples.writer(tmp_path, wanted) as writer:
        assert not writer.finished
        assert len(writer.forgotten) == 2


def test_what_is_committed_already_is_given_as_it_is(tmp_path: Path) -> None:
    examples.commit(tmp_path, "topk_cache")
    _, by_teacher = examples.commit(tmp_path, "topk_cache", params=examples.COMPACT)
    assert recoded(wanted_topk(tmp_path, codec="compact")) == by_teacher


def test_readers_tools_and_gc_take_both_as_they_are(tmp_path: Path) -> None:
    source, _ = examples.commit(tmp_path, "topk_cache")
    wanted = wanted_topk(tmp_path, codec="compact")
    recoded(wanted)
    plain, compact = (CacheReader.from_folders([folder]) for folder in (source, Path(wanted.path)))
    assert plain.document_ids == compact.document_ids
    for i in range(len(plain)):
        assert np.array_equal(plain[i]["topk_ids"], compact[i]["topk_ids"])
        assert np.allclose(plain[i]["topk_logprobs"], compact[i]["topk_logprobs"], atol=0.1)
    paths = [item.path for item in superseded(tmp_path / examples.RECIPE)]
    assert len(paths) == 1  # of one second: which of the two is older cannot be told


def test_the_first_source_that_will_do_is_taken_and_no_manifest_is_read_for_nothing(tmp_path: Path) -> None:
    raw, _ = commit_states(tmp_path, "raw")
    others = [commit_states(tmp_path, codec)[0] for codec in ("split", "int8_32")]
    for folder in others:
        examples.flip_byte(folder / "manifest.json")
    search = find_source(wanted_states(tmp_path, "fp8"))
    assert search.source is not None
    assert (search.source.output.path, search.refused) == (str(raw), ())
    (raw / "manifest.json").unlink()
    why = find_source(wanted_states(tmp_path, "fp8")).why_none
    assert "the result of split is damaged" in why
    assert f"{others[1]} is of int8_32, and its numbers are rounded already" in why


def test_what_a_killed_recoding_has_finished_takes_no_more_room(tmp_path: Path) -> None:
    commit_states(tmp_path, "raw")
    wanted = wanted_states(tmp_path, "fp8")

    def stop(progress: RecodingProgress) -> None:
        raise _StopError

    source = find_source(wanted).source
    assert source is not None
    assert bytes_finished(source, wanted) == 0
    with pytest.raises(_StopError):
        recode(source, wanted, made_by=OWN, on_part=stop)
    assert bytes_finished(source, wanted) == (Path(wanted.path) / "part-00000.arrow").stat().st_size


def test_the_bytes_after_are_told_about_before(tmp_path: Path) -> None:
    _, before = commit_states(tmp_path, "raw")
    for codec, most in (("split", 1.0), ("fp8", 0.8), ("int8_32", 0.8)):
        wanted = wanted_states(tmp_path, codec)
        search = find_source(wanted)
        assert search.source is not None
        assert 0.3 * before.n_bytes < bytes_after(search.source, wanted) < most * before.n_bytes


def test_every_form_is_a_candidate_once_and_what_has_no_codec_comes_first(tmp_path: Path) -> None:
    def forms(found: Sequence[Any]) -> list[str]:
        return [candidate.form.in_words for candidate in found]

    assert forms(candidates(wanted_topk(tmp_path, codec="compact"))) == ["plain", "compact without logsumexp"]
    assert forms(candidates(wanted_states(tmp_path, "fp8"))) == ["raw", "split", "int8_32", "int8_128"]
    assert candidates(examples.output(tmp_path, "embedding_cache")) == []


def test_the_version_of_coded_draws_follows_the_form_and_not_the_source(tmp_path: Path) -> None:
    params = {**PLAIN, "draws": examples.DRAWS, "seed": 0}
    examples.commit(tmp_path, "topk_cache", params=params)
    without = wanted_topk(tmp_path, draws=examples.DRAWS, seed=0, codec="compact")
    identity = {**without.identity, **computing_versions("topk_cache", {**params, "codec": "compact"})}
    assert identity["draws_codec_version"] == 2
    wanted = plan_output(
        "topk_cache", identity, recipe_folder=recipe_folder_of(Path(without.path)), partition_key=examples.PARTITION
    )
    source = find_source(wanted).source
    assert source is not None
    assert "draws_codec_version" not in source.output.identity

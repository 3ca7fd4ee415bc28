"""A card says what is in the store: no more, no less, and nothing of it is markup that somebody wrote into a name."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kd_assets.cards.contents import contents_of
from kd_assets.cards.croissant import croissant
from kd_assets.cards.current import Coverage
from kd_assets.cards.front_matter import source_line
from kd_assets.cards.page import card, readme, strip
from kd_assets.cards.passes import Passes, Work
from kd_assets.cards.write import README_NAME, write_card
from kd_assets.cli import main
from kd_assets.errors import NotCommittedError
from kd_assets.store import CacheReader, Manifest, append_audit, read_manifest, variants_of
from kd_assets.store.checking.verify import verify
from kd_assets.store.current_variants import say_current
from kd_assets.store.ragged_topk import mean_kept_mass
from kd_assets.store.reading.summary import view_documents
from kd_assets_tests.store import examples
from kd_assets_tests.store.planned import commit, commit_partition, hash_of, write_plan

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Four planned partitions: one made, one made of another shard, one that failed a check, one missing."""
    folder = tmp_path / examples.RECIPE
    write_plan(folder, {"a": "first", "b": "second", "c": "third", "d": "fourth"})
    commit_partition(tmp_path, "a", "first")
    commit_partition(tmp_path, "b", "an earlier second")
    shard = commit(tmp_path, "shards_manifest", "c", hash_of("third"))
    commit(tmp_path, "topk_cache", "c", shard, passed=False)
    return folder


def test_coverage_tells_made_missing_stale_and_failed_apart(recipe: Path) -> None:
    topk = next(cache for cache in contents_of(recipe).caches if cache.asset == "topk_cache")
    assert topk.coverage == {"a": "made", "b": "stale", "c": "failed", "d": "missing"}
    page = card(contents_of(recipe))
    assert "| `topk_cache` | `█▒✗░` | 1 of 4, 1 failed, 1 missing, 1 stale |" in page


def test_a_partition_that_was_made_well_after_it_failed_is_made(tmp_path: Path) -> None:
    folder = tmp_path / examples.RECIPE
    write_plan(folder, {"a": "first", "b": "second"})
    for key in ("a", "b"):
        commit(tmp_path, "topk_cache", key, hash_of("made badly"), passed=False)
    commit_partition(tmp_path, "a", "first")
    topk = next(cache for cache in contents_of(folder).caches if cache.asset == "topk_cache")
    assert topk.coverage == {"a": "made", "b": "failed"}


def test_a_strip_of_many_partitions_shows_the_worst_of_each_stretch() -> None:
    coverage: list[Coverage] = ["made"] * 10_000
    coverage[17], coverage[9_999] = "failed", "missing"
    assert strip(coverage) == "✗" + "█" * 38 + "░"
    assert strip([]) == ""


def test_totals_are_those_of_the_manifests(recipe: Path) -> None:
    contents = contents_of(recipe)
    of_shards = contents.of_documents
    assert of_shards.asset == "shards_manifest"
    # a, b and c have three current shards of equal lengths
    assert of_shards.summary.n_documents == 3 * len(examples.LENGTHS)
    assert of_shards.summary.n_tokens == 3 * sum(examples.LENGTHS)
    assert f"{3 * len(examples.LENGTHS):,} documents, {3 * sum(examples.LENGTHS):,} tokens" in card(contents)


def test_the_vocabulary_is_that_of_the_newest_cache(tmp_path: Path) -> None:
    for key, size in (("a", 300), ("b", 200)):
        out = examples.output(tmp_path, "topk_cache", partition_key=key)
        with examples.writer(tmp_path, out, partition_key=key) as writer:
            writer.commit(parts=0, checks={}, provenance={}, facts={"vocab_size": size})
    assert contents_of(tmp_path / examples.RECIPE).vocab_size == 300  # of equal times, the larger one


def test_equal_stores_have_equal_cards_and_a_written_one_is_not_touched_again(recipe: Path) -> None:
    paths = write_card(contents_of(recipe)).files
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    write_card(contents_of(recipe))
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


@pytest.mark.parametrize("name", ["README.md", "croissant.json", "worth.svg"])
@pytest.mark.parametrize(
    "theirs",
    [b"mine", b"{}", b"\xff", b"[" * 100_000, b"tags:\n- teacher-cache\n"],
    ids=lambda theirs: repr(theirs)[:9],
)
def test_a_file_of_somebody_else_is_kept_and_named(recipe: Path, name: str, theirs: bytes) -> None:
    (recipe / name).write_bytes(theirs)
    written = write_card(contents_of(recipe))
    assert (recipe / name).read_bytes() == theirs
    assert written.kept == (recipe / name,)
    assert {path.name for path in written.files} == {"README.md", "croissant.json", "worth.svg"} - {name}


@pytest.mark.parametrize(("name", "said"), [("README.md", "# Teacher"), ("croissant.json", "teacher-caches-tiny")])
def test_our_file_that_a_user_changed_is_kept_and_one_as_we_left_it_made_anew(
    recipe: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    write_card(contents_of(recipe), description="an earlier one")
    assert write_card(contents_of(recipe), description="a later one").kept == ()
    path = recipe / name
    assert "a later one" in path.read_text()
    path.write_text(changed := path.read_text().replace(said, "edited", 1))
    assert main(["card", str(recipe), "--write"]) == 0
    out, err = capsys.readouterr()
    assert path.read_text() == changed
    assert str(path) not in out
    assert str(path) in err


def test_texts_that_are_no_unicode_and_those_beyond_two_bytes_are_written(recipe: Path) -> None:
    yaml = pytest.importorskip("yaml")
    contents = contents_of(recipe)
    object.__setattr__(contents, "sources", ({"name": "s \udc80", "licence": "free \U0001f600 \udc80"},))
    write_card(contents, description="a \udc80 <b>\n# b \U0001f600")
    text = (recipe / README_NAME).read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license_name"] == "free \U0001f600 \\udc80"
    assert "a \\\\udc80 \\<b\\> \\# b \U0001f600\n" in text
    assert json.loads((recipe / "croissant.json").read_text())["license"] == ["free \U0001f600 \\udc80"]


def test_a_card_has_no_picture_but_in_its_readme_and_no_path_of_this_machine(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_card(contents_of(recipe))
    assert main(["card", str(recipe)]) == 0
    for page in (written.page, capsys.readouterr().out):
        assert "![" not in page
        assert "base64" not in page
        assert len(page) < 10_000
    text = (recipe / README_NAME).read_text()
    assert written.page.rstrip() in text
    assert text.count("](worth.svg)") == 1
    for path in written.files:
        assert str(recipe.parent) not in path.read_text()


def test_the_documents_on_a_card_open_only_the_results_they_are_in(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    from_folders = CacheReader.from_folders

    def counted(folders: Sequence[Path], **kwargs: Any) -> CacheReader:
        opened.extend(folders)
        return from_folders(folders, **kwargs)

    monkeypatch.setattr(CacheReader, "from_folders", counted)
    (topk,) = [cache.summary for cache in contents_of(recipe).caches if cache.asset == "topk_cache"]
    card(contents_of(recipe))
    assert opened == [topk.folders[0]]
    n = len(examples.LENGTHS)
    assert [view.partition_key for view in view_documents(topk, n + 1)] == ["a"] * n + ["b"]
    assert len(view_documents(topk, 1_000)) == 2 * n
    assert view_documents(topk, 0) == []


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"name": "my_corpus", "licence": "cc-by-4.0"}, "- my_corpus: cc-by-4.0"),
        ({"name": "a/b (c) #1", "licence": "MIT", "revision": "v1~2"}, "- a/b (c) #1: MIT, revision v1~2"),
        ({"name": "s"}, "- s: no licence stated"),
        ({"name": "s", "licence": "unknown"}, "- s: unknown"),
        ({"name": "s", "licence": "unknown", "licence_accepted": "ours"}, "- s: unknown (accepted: ours)"),
        ({"name": "s", "licence_accepted": "ours"}, "- s: ours"),
        ({"name": "# [x](y)", "licence": "<b>\n*`"}, "- \\# \\[x\\](y): \\<b\\>\\\\n\\*\\`"),
    ],
)
def test_a_source_is_a_line_in_which_nothing_is_markup(raw: dict[str, str], line: str) -> None:
    assert source_line(raw) == line


@pytest.mark.parametrize(
    ("description", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "\\<img src=x onerror=alert\\(1\\)\\>"),
        ("a\n\n# b\n```sh\nrm\n```", "a \\# b \\`\\`\\`sh rm \\`\\`\\`"),
        ("- one\n- two", "\\- one - two"),
        ("1. one", "1\\. one"),
        ("--- \nx: y", "\\--- x: y"),
        ("[here](javascript:x)", "\\[here\\]\\(javascript:x\\)"),
        ("    code | x", "code \\| x"),
    ],
)
def test_markup_in_a_description_stays_text(recipe: Path, description: str, shown: str) -> None:
    page = card(contents_of(recipe), description=description)
    assert page.split("\n\n")[1] == shown
    head = readme(contents_of(recipe), page).split("\n---\n")[0]
    assert description not in head


def test_markup_in_the_teachers_path_stays_text(recipe: Path) -> None:
    hostile = contents_of(recipe)
    object.__setattr__(hostile, "provenance", {"teacher": "/m`<b>|x`\n# no", "teacher_revision": "`r`"})
    (line,) = [line for line in card(hostile).splitlines() if line.startswith("Teacher ")]
    assert line.startswith("Teacher `/m'<b>¦x'\\n# no` at `'r'`")
    assert line.count("`") == 4


def test_coded_parquet_is_offered_as_no_plain_data_set(tmp_path: Path) -> None:
    """Also where a plain variant lies in the same folder, which is another cache than the recipe's."""
    for params in ({}, {"codec": "compact"}):
        examples.commit(tmp_path, "topk_cache", params=examples.PARAMS["topk_cache"] | params)
    for codec in ("plain", "compact"):

        def is_of_recipe(manifest: Manifest, codec: str = codec) -> bool:
            return bool(manifest.params.get("codec", "plain") == codec)

        contents = contents_of(tmp_path / examples.RECIPE, is_of_recipe=is_of_recipe)
        (topk,) = contents.caches
        assert topk.n_other_variants == 1
        assert topk.summary.params.get("codec", "plain") == codec
        head = readme(contents, card(contents)).split("\n---\n")[0]
        assert (f"topk_cache/{topk.summary.variant}/" in head) == (codec == "plain")


def test_a_card_beside_the_caches_is_nothing_that_verify_minds(tmp_path: Path) -> None:
    folder = tmp_path / examples.RECIPE
    write_plan(folder, {"a": "first"})
    commit_partition(tmp_path, "a", "first")
    write_card(contents_of(folder))
    assert verify(folder).ok


def test_the_head_is_that_of_a_data_set_on_the_hub(recipe: Path) -> None:
    contents = contents_of(recipe)
    head, _, page = readme(contents, card(contents)).removeprefix("---\n").partition("\n---\n")
    assert "license: cc0-1.0" in head
    assert "size_categories:\n- n<1K" in head
    assert '    path:\n    - "topk_cache/' in head
    assert page.lstrip().startswith("# Teacher caches of tiny")


def test_markup_in_a_licence_stays_text(recipe: Path) -> None:
    plan = recipe / "shard_plan" / "plan.json"
    hostile = contents_of(recipe)
    object.__setattr__(hostile, "sources", ({"name": "s", "licence": "<script>|`x`[y](z)\n# no", "n_records": 4},))
    page = card(hostile)
    assert "\\<script\\>\\|\\`x\\`\\[y\\]\\(z\\)\\\\n\\# no" in page
    assert "\n# no" not in page
    assert plan.exists()


def test_croissant_names_files_and_columns_of_every_cache(recipe: Path) -> None:
    said = croissant(contents_of(recipe))
    assert {files["@id"] for files in said["distribution"]} == {
        "shards_manifest-files", "topk_cache-files", "hidden_state_cache-files", "embedding_cache-files",
    }  # fmt: skip
    topk = next(records for records in said["recordSet"] if records["@id"] == "topk_cache")
    shapes = {field["name"]: (field["dataType"], field.get("arrayShape")) for field in topk["field"]}
    assert shapes["document_id"] == ("sc:Text", None)
    assert shapes["topk_logprobs"] == ("sc:Float", f"-1,{examples.K}")


def test_a_result_that_failed_before_it_was_made_anew_is_made(tmp_path: Path) -> None:
    folder = tmp_path / examples.RECIPE
    write_plan(folder, {"a": "first"})
    commit(tmp_path, "topk_cache", "a", hash_of("an earlier one"), passed=False)
    commit_partition(tmp_path, "a", "first")
    topk = next(cache for cache in contents_of(folder).caches if cache.asset == "topk_cache")
    assert topk.coverage == {"a": "made"}


def test_what_was_replaced_and_other_variants_are_not_read(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one result of each variant: a card must not cost more with every night that has passed."""
    commit_partition(recipe.parent, "a", "an earlier first")
    commit_partition(recipe.parent, "a", "first")
    for key in ("a", "b"):
        other = examples.output(recipe.parent, "topk_cache", partition_key=key, params={"k": 3, "max_length": 5})
        with examples.writer(recipe.parent, other, partition_key=key) as writer:
            writer.commit(parts=0, checks={}, provenance={})
    n_read = Counter[str]()

    def counted(folder: Path) -> Manifest:
        n_read[str(folder.relative_to(recipe))] += 1
        return read_manifest(folder)

    monkeypatch.setattr("kd_assets.cards.current.read_manifest", counted)
    contents = contents_of(recipe, is_of_recipe=lambda m: m.params.get("k") != 3)
    topk = next(cache for cache in contents.caches if cache.asset == "topk_cache")
    assert topk.n_other_variants == 1
    assert sum(other.variant in name for name in n_read) == 1
    made = [name for name in n_read if f"topk_cache/{topk.summary.variant}/a/" in name]
    assert made == [str(topk.summary.folders[0].relative_to(recipe))], "the earlier one of a is not read"
    # Each once, but for the one of a variant that was asked whose it is.
    assert max(n_read.values()) == 2
    assert sum(n == 2 for n in n_read.values()) == len(contents.caches)


def test_old_work_of_a_recoded_cache_is_none_of_the_last_night(recipe: Path) -> None:
    (folder,) = (recipe / "topk_cache").glob("*/a/*/")
    made = read_manifest(folder)
    old = dataclasses.replace(
        made,
        created_at="2026-01-01T00:00:00+00:00",
        provenance={"submission_key": "s", "attempt": 0},
        facts={"wall_s": 3600.0, "n_gpus": 2},
    )
    recoded_from = {"created_at": "2026-01-02T00:00:00+00:00", "recoded_from": {"created_at": old.created_at}}
    tonight = "2026-06-01T00:00:00+00:00"
    coded = dataclasses.replace(old, created_at=tonight, provenance=old.provenance | {"recoded_from": recoded_from})
    of_tonight = dataclasses.replace(old, created_at=tonight, partition_key="b")
    for order in ([old, coded, of_tonight], [coded, old, of_tonight], [coded, of_tonight]):
        passes = Passes()
        for manifest in order:
            passes.add(manifest)
        assert passes.work().gpu_hours == 4.0
        assert passes.work(since="2026-05-31").gpu_hours == 2.0


def test_work_whose_results_are_gone_stands_in_the_log(recipe: Path) -> None:
    line = {
        "event": "commit",
        "time": "2026-01-01T00:00:00+00:00",
        "path": "topk_cache/000000000000/z/0000000000000000",
        "asset": "topk_cache",
        "variant": "000000000000",
        "partition_key": "z",
        "n_tokens": 7,
        "provenance": {
            "submission_key": "s",
            "attempt": 0,
            "wall_s": 1800.0,
            "gpu": "H",
            "n_devices": 4,
            "joules": 9.0,
        },
    }
    append_audit(recipe, line)
    contents = contents_of(recipe)
    assert contents.in_all == Work(n_passes=1, n_tokens=7, wall_s=1800.0, gpu_hours=2.0, joules=9.0)
    assert contents.last_night == Work()
    assert "GPU-hours, in all | 2 |" in card(contents)


def test_the_probability_that_is_kept_is_on_the_card(recipe: Path) -> None:
    topk = next(cache for cache in contents_of(recipe).caches if cache.asset == "topk_cache")
    n, mass = topk.summary.stats["n_positions"], topk.summary.stats["n_kept_mass"]
    assert topk.kept_mass == pytest.approx(mass / n)
    assert f"| `topk_cache`, probability that is kept | {mass / n:.4f} on average |" in card(contents_of(recipe))
    of_before = {"n_positions": 9.0}
    assert mean_kept_mass([of_before, {"n_positions": 2.0, "n_kept_mass": 1.5}]) == 0.75
    assert mean_kept_mass([of_before]) is None


def test_a_recipe_without_results_has_no_card(tmp_path: Path) -> None:
    write_plan(tmp_path / examples.RECIPE, {"a": "first"})
    with pytest.raises(NotCommittedError, match="materialize"):
        contents_of(tmp_path / examples.RECIPE)


def test_the_command_prints_the_card_or_writes_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(recipe)]) == 0
    assert "## What it holds" in capsys.readouterr().out
    assert main(["card", str(recipe), "--write"]) == 0
    assert capsys.readouterr().out.split() == [
        str(recipe / name) for name in ("README.md", "croissant.json", "worth.svg")
    ]


def test_the_table_of_worth_is_that_of_the_readme(recipe: Path) -> None:
    table = (PROJECT / "kd_assets" / "cards" / "worth.md").read_text()
    assert table.rstrip() in (PROJECT / "README.md").read_text()
    assert table.rstrip() in card(contents_of(recipe))
    write_card(contents_of(recipe))
    assert "](worth.svg)" in (recipe / README_NAME).read_text()
    assert (recipe / "worth.svg").read_bytes() == (PROJECT / "kd_assets" / "cards" / "worth.svg").read_bytes()


def test_a_card_of_a_folder_alone_is_of_the_variant_that_readers_get(tmp_path: Path) -> None:
    for params in ({}, {"codec": "compact"}):
        examples.commit(tmp_path, "topk_cache", params=examples.PARAMS["topk_cache"] | params)
    folder = tmp_path / examples.RECIPE
    for codec in ("plain", "compact"):
        variant = next(
            name
            for name, partitions in variants_of(folder / "topk_cache").items()
            if read_manifest(next(iter(partitions.values()))).params.get("codec", "plain") == codec
        )
        say_current(folder, "topk_cache", variant)
        (topk,) = contents_of(folder).caches
        assert topk.summary.variant == variant

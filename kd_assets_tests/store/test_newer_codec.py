"""A cache of a later version's codec, in the manifest and in its parts, and an index of another commit: what everybody
who meets one says. Nobody gives a number; what needs no number goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from kd_assets.cli import main
from kd_assets.errors import EXIT_FAILED, UnknownCodecError
from kd_assets.export.exporting import export_recipe
from kd_assets.export.format import ExportOptions
from kd_assets.replay.cache import open_cache
from kd_assets.store import CacheReader, Documents, choose, coded, part_stats, plain_table
from kd_assets.store.layout import INDEX_NAME
from kd_assets.store.superseded import superseded
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.loading.loader import TrainingLoader
from kd_assets.student.loading.stream import TeacherCacheStream
from kd_assets_tests.store import examples

NEWER, SINCE = "entropy", "7.1.0"


def renamed(table: pa.Table) -> pa.Table:
    """A part as a later version would write it."""
    metadata = dict(table.schema.metadata)
    return table.replace_schema_metadata(
        metadata | {b"kd_assets.codec": NEWER.encode(), b"kd_assets.codec_since": SINCE.encode()}
    )


def commit(store: Path, *, in_manifest: bool) -> Path:
    """A top-k cache whose parts are of the codec, which its manifest names or knows nothing of; its recipe's folder."""
    docs = examples.documents().slice(0, len(examples.LENGTHS), examples.MAX_LENGTH)
    params = examples.COMPACT | ({"codec": NEWER} if in_manifest else {})
    output = examples.output(store, "topk_cache", params=params)
    examples.commit(store, "shards_manifest")
    with pytest.MonkeyPatch.context() as later_version, examples.writer(store, output) as writer:
        later_version.setattr("kd_assets.store.partfile.codec_of", lambda schema: None)
        made = coded(examples.table("topk_cache", docs), "compact")
        stats = part_stats("topk_cache", made.decoded) | made.error
        writer.write_part(0, renamed(made.stored), n_tokens=docs.n_tokens, stats=stats)
        writer.commit(parts=1, checks={"recomputed": examples.RECOMPUTED}, provenance={"kd_assets": SINCE})
    return store / examples.RECIPE


def dataset(recipe: Path) -> TeacherCacheDataset:
    return TeacherCacheDataset.from_recipe(recipe, assets=["topk_cache"])


READERS: dict[str, Callable[[Path], object]] = {
    "reader": lambda recipe: CacheReader(recipe, "topk_cache")[0],
    "data set": lambda recipe: dataset(recipe)[0],
    "loader": lambda recipe: next(iter(TrainingLoader(dataset(recipe), batch_size=1, num_workers=0))),
    "stream": lambda recipe: next(iter(TeacherCacheStream(dataset(recipe), batch_size=1))),
    "export": lambda recipe: export_recipe("safetensors", recipe, recipe.parent / "to", options=ExportOptions()),
    "replay": open_cache,
    "plain table": lambda recipe: plain_table(renamed(coded(examples.table("topk_cache", docs()), "compact").stored)),
}


def docs() -> Documents:
    return examples.documents()


@pytest.fixture(scope="module", params=[True, False], ids=["in the manifest", "in the parts alone"])
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commit(tmp_path_factory.mktemp("store"), in_manifest=request.param)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_a_newer_codec_by_its_name_and_version(recipe: Path, name: str) -> None:
    with pytest.raises(UnknownCodecError, match=rf"{NEWER}.*kd_assets 7\.1\.0 and later read it.*install a version"):
        READERS[name](recipe)
    assert not (recipe.parent / "to").exists() or not list((recipe.parent / "to").rglob("*.safetensors"))


@pytest.mark.parametrize("command", ["verify", "inspect", "export", "diff", "index"])
def test_commands_that_read_rows_name_it_and_fail(
    recipe: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (choose(recipe, "topk_cache").folders[0] / INDEX_NAME).unlink(missing_ok=True)
    words = {
        "verify": ["verify", str(recipe)],
        "inspect": ["inspect", str(recipe)],
        "export": ["export", "safetensors", str(recipe), "--to", str(recipe.parent / "to")],
        "diff": ["diff", str(recipe), str(recipe), "--asset", "topk_cache"],
        "index": ["index", str(recipe)],
    }
    assert main(words[command]) == EXIT_FAILED
    said = "".join(capsys.readouterr())
    assert NEWER in said
    assert SINCE in said


def test_what_needs_no_row_goes_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Last of all, as it puts the result aside."""
    assert superseded(recipe) == []
    assert main(["gc", str(recipe), "--dry-run"]) == 0
    assert main(["inspect", str(recipe), "--documents", "0"]) == 0
    assert "codec=" in capsys.readouterr().out
    assert main(["quarantine", str(recipe), examples.PARTITION, "--why", "made by a later version"]) == 0


def test_an_index_of_another_commit_is_named_by_verify_and_passed_over_by_readers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = examples.commit(tmp_path / "store", "topk_cache", params=examples.COMPACT)
    examples.commit(tmp_path / "store", "shards_manifest")
    other = examples.documents((2, 2, 2, 2), seed=5)
    elsewhere, _ = examples.commit(tmp_path / "other", "topk_cache", params=examples.COMPACT, docs=other)
    recipe = tmp_path / "store" / examples.RECIPE
    before = [repr(READERS[name](recipe)) for name in ("reader", "data set", "loader", "stream")]
    (folder / INDEX_NAME).write_bytes((elsewhere / INDEX_NAME).read_bytes())
    assert main(["verify", str(recipe)]) == EXIT_FAILED
    assert "is of another commit: its data_version is" in capsys.readouterr().out
    assert [repr(READERS[name](recipe)) for name in ("reader", "data set", "loader", "stream")] == before
    READERS["export"](recipe)
    READERS["replay"](recipe)
    assert main(["index", str(recipe)]) == 0
    assert main(["verify", str(recipe)]) == 0

"""What `model_files.fingerprints` promises: content decides, location does not, and the digest cache never lies."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_assets.errors import InputError, MissingInputError
from kd_assets.model_files.digests import DigestCache, cached_sha256
from kd_assets.model_files.fingerprints import tokenizer_fingerprint, weights_fingerprint
from kd_assets.model_files.folder import model_folder

LONG_AGO_NS = 1_700_000_000_000_000_000
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")


def settled(path: Path, content: bytes, mtime_ns: int = LONG_AGO_NS) -> Path:
    """A file that was written long ago, so that its digest may be kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def kept(cache_file: Path) -> dict[str, str]:
    return {path: entry["sha256"] for path, entry in json.loads(cache_file.read_bytes())["files"].items()}


# ---------------------------------------------------------------- digests of files


def test_a_digest_is_that_of_the_bytes_with_and_without_cache(tmp_path: Path) -> None:
    path = settled(tmp_path / "a", b"x" * 5_000_000)
    cache = DigestCache(tmp_path / "cache" / "digests.json")
    assert (
        cached_sha256(path, None)
        == cached_sha256(path, cache)
        == cached_sha256(path, cache)
        == sha256(b"x" * 5_000_000)
    )
    assert kept(tmp_path / "cache" / "digests.json") == {str(path): sha256(b"x" * 5_000_000)}


def test_an_unchanged_file_is_not_read_again_by_another_process(tmp_path: Path) -> None:
    path = settled(tmp_path / "a", b"weights")
    cached_sha256(path, DigestCache(tmp_path / "digests.json"))
    recorded = json.loads((tmp_path / "digests.json").read_bytes())
    recorded["files"][str(path)]["sha256"] = "f" * 64  # a marker that no reading of the file could give
    (tmp_path / "digests.json").write_text(json.dumps(recorded))
    assert cached_sha256(path, DigestCache(tmp_path / "digests.json")) == "f" * 64


def test_a_changed_file_of_the_same_size_is_noticed_by_its_time(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    assert cached_sha256(settled(tmp_path / "a", b"one"), cache) == sha256(b"one")
    assert cached_sha256(settled(tmp_path / "a", b"two", LONG_AGO_NS + 1), cache) == sha256(b"two")


def test_a_replaced_file_of_the_same_size_and_time_is_noticed_by_its_inode(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    assert cached_sha256(settled(tmp_path / "a", b"one"), cache) == sha256(b"one")
    os.replace(settled(tmp_path / "b", b"two"), tmp_path / "a")
    assert cached_sha256(tmp_path / "a", cache) == sha256(b"two")


def test_the_digest_of_a_file_written_just_now_is_not_kept(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    (tmp_path / "a").write_bytes(b"one")
    cached_sha256(tmp_path / "a", cache)
    assert not (tmp_path / "digests.json").exists()


def test_links_to_one_blob_are_hashed_once(tmp_path: Path) -> None:
    blob = settled(tmp_path / "blobs" / "x", b"blob")
    (tmp_path / "link").symlink_to(blob)
    cache = DigestCache(tmp_path / "digests.json")
    assert cached_sha256(tmp_path / "link", cache) == cached_sha256(blob, cache)
    assert list(kept(tmp_path / "digests.json")) == [str(blob)]


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"files": []}',
        b'{"files": {"a": null}}',
        b'{"files": {"a": {"sha256": 3}}}',
        b"[" * 100_000,
    ],
)
def test_a_corrupt_cache_is_ignored_and_rebuilt(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "digests.json").write_bytes(junk)
    path = settled(tmp_path / "a", b"one")
    assert cached_sha256(path, DigestCache(tmp_path / "digests.json")) == sha256(b"one")
    assert kept(tmp_path / "digests.json") == {str(path): sha256(b"one")}


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    settled(tmp_path / "file", b"in the way")
    cache = DigestCache(tmp_path / "file" / "digests.json")
    path = settled(tmp_path / "a", b"one")
    assert cached_sha256(path, cache) == sha256(b"one")
    assert cache.get(path, path.stat()) == sha256(b"one")  # for this process it is still remembered


@needs_permissions
def test_an_unreadable_cache_folder_does_not_break_hashing(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o000)
    try:
        assert cached_sha256(settled(tmp_path / "a", b"one"), DigestCache(folder / "digests.json")) == sha256(b"one")
    finally:
        folder.chmod(0o700)


def hash_some(cache_file: Path, folder: Path, first: int) -> None:
    cache = DigestCache(cache_file)
    for i in range(first, first + 25):
        cached_sha256(folder / f"{i:03d}", cache)


def test_concurrent_writers_lose_no_digest_and_leave_no_rubbish(tmp_path: Path) -> None:
    for i in range(100):
        settled(tmp_path / "files" / f"{i:03d}", b"%d" % i)
    context = multiprocessing.get_context("spawn")
    cache_file = tmp_path / "cache" / "digests.json"
    writers = [
        context.Process(target=hash_some, args=(cache_file, tmp_path / "files", first)) for first in (0, 25, 50, 75)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert kept(cache_file) == {str(tmp_path / "files" / f"{i:03d}"): sha256(b"%d" % i) for i in range(100)}
    assert sorted(path.name for path in cache_file.parent.iterdir()) == [".digests.json.lock", "digests.json"]
    assert cache_file.stat().st_mode & 0o777 == 0o640


def test_a_missing_file_a_folder_and_a_loop_of_links_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("absent", ".", "loop"):
        with pytest.raises(MissingInputError, match=r"cannot be read|not a file") as e:
            cached_sha256(tmp_path / name, None)
        assert str(tmp_path) in str(e.value)


# ---------------------------------------------------------------- where a model lies


def make_hub(home: Path, model: str = "org/tiny", commit: str = "c" * 40, **refs: str) -> Path:
    repository = home / "hub" / f"models--{model.replace('/', '--')}"
    (repository / "snapshots" / commit).mkdir(parents=True)
    for ref, target in {"main": commit, **refs}.items():
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(target)
    return repository / "snapshots" / commit


def test_a_folder_is_the_model_whatever_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a model").mkdir()
    assert model_folder(str(tmp_path / "a model"), "main") == tmp_path / "a model"
    monkeypatch.chdir(tmp_path)
    assert model_folder("a model", None) == tmp_path / "a model"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "c" * 40])
def test_a_hub_id_leads_to_its_snapshot_by_branch_tag_and_commit(tmp_path: Path, revision: str | None) -> None:
    snapshot = make_hub(tmp_path, **{"v1.0": "c" * 40})
    assert model_folder("org/tiny", revision, environment={"HF_HOME": str(tmp_path)}) == snapshot


def test_the_cache_is_found_by_the_rules_of_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_hub(tmp_path / "huggingface", "tiny")
    hub = str(tmp_path / "huggingface" / "hub")
    for environment in (
        {"HF_HUB_CACHE": hub, "HF_HOME": "/nowhere"},
        {"HUGGINGFACE_HUB_CACHE": hub},
        {"HF_HOME": str(tmp_path / "huggingface")},
        {"XDG_CACHE_HOME": str(tmp_path)},
    ):
        assert model_folder("tiny", None, environment=environment) == snapshot
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".cache").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert model_folder("tiny", None, environment={}).samefile(snapshot)


def test_a_model_that_is_not_here_is_refused_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    make_hub(tmp_path)
    with pytest.raises(MissingInputError, match=r"hf download org/other --revision v2.*HF_HOME"):
        model_folder("org/other", "v2", environment={"HF_HOME": str(tmp_path)})
    with pytest.raises(MissingInputError, match="revision v2"):
        model_folder("org/tiny", "v2", environment={"HF_HOME": str(tmp_path)})


@pytest.mark.parametrize(
    "model",
    ["", "/no/such/folder", "./nowhere", "a/b/c", "../../no-such", "~nobody-here/x", "org/..", "a\0b", "~/no-such"],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(MissingInputError, match="no model folder"):
        model_folder(model, None, environment={"HF_HOME": str(tmp_path)})


@pytest.mark.parametrize("revision", ["../../..", "..", ".", "/", "\0"])
def test_a_revision_cannot_lead_out_of_the_cache(tmp_path: Path, revision: str) -> None:
    make_hub(tmp_path)
    with pytest.raises(MissingInputError):
        model_folder("org/tiny", revision, environment={"HF_HOME": str(tmp_path)})


# ---------------------------------------------------------------- fingerprints


def make_model(folder: Path, *, weights: bytes = b"weights", **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_equal_weights_have_an_equal_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    one = make_model(tmp_path / "one", transformers_version="5.17", _name_or_path="/home/me", text={"a": 1, "b": 2})
    two = make_model(tmp_path / "two", text={"b": 2, "_name_or_path": "there", "a": 1}, transformers_version="5.23")
    (two / "README.md").write_text("unrelated")
    assert weights_fingerprint(one, None) == weights_fingerprint(two, DigestCache(tmp_path / "digests.json"))
    assert len(weights_fingerprint(one, None)) == 64


def test_weights_configuration_and_file_names_each_change_the_fingerprint(tmp_path: Path) -> None:
    folders = [
        make_model(tmp_path / "base"),
        make_model(tmp_path / "weights", weights=b"Weights"),
        make_model(tmp_path / "config", hidden_size=16),
        make_model(tmp_path / "name"),
        make_model(tmp_path / "more"),
    ]
    (folders[3] / "model.safetensors").rename(folders[3] / "other.safetensors")
    (folders[4] / "extra.safetensors").write_bytes(b"")
    assert len({weights_fingerprint(folder, None) for folder in folders}) == 5


def test_incomplete_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingInputError, match=r"model-2\.safetensors"):
        weights_fingerprint(folder, None)
    (folder / "model-2.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(MissingInputError, match=r"model-2\.safetensors is a Git LFS pointer.*git lfs pull"):
        weights_fingerprint(folder, None)
    (folder / "model-2.safetensors").write_bytes(b"more")
    assert len(weights_fingerprint(folder, None)) == 64


def test_a_folder_without_weights_or_configuration_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"config\.json"):
        weights_fingerprint(tmp_path / "absent", None)
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MissingInputError, match="safetensors"):
        weights_fingerprint(folder, None)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        weights_fingerprint(folder, None)


def test_every_file_of_a_tokenizer_changes_its_fingerprint_and_no_other_does(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "name_or_path": "x"}))
    base = tokenizer_fingerprint(folder, None)
    seen = {base}
    for name in ("chat_template.jinja", "special_tokens_map.json", "tokenizer.model", "merges.txt", "vocab.json"):
        (folder / name).write_text("new")
        seen.add(tokenizer_fingerprint(folder, None))
        (folder / name).unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("new")
    seen.add(tokenizer_fingerprint(folder, None))
    (folder / "additional_chat_templates" / "rag.jinja").unlink()
    assert len(seen) == 7
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "y", "bos_token": "<s>"}))
    (folder / "config.json").write_text("{}")
    assert tokenizer_fingerprint(folder, None) == base


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(MissingInputError, match="holds no tokenizer"):
        tokenizer_fingerprint(tmp_path, None)
    with pytest.raises(MissingInputError, match="no model folder"):
        tokenizer_fingerprint(tmp_path / "absent", None)


def test_only_the_standard_library_is_needed() -> None:
    code = (
        "import sys, kd_assets.model_files.fingerprints\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    third_party = {"numpy", "pyarrow", "torch", "transformers", "huggingface_hub", "dagster", "pydantic"}
    assert not third_party & set(done.stdout.split())

"""What `model_files.fingerprints` promises: content decides, location does not. Digests of files: `test_digests.py`."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_assets.errors import InputError, MissingInputError, StorageUnreachableError
from kd_assets.model_files import digests
from kd_assets.model_files.digests import DigestCache, hashed_sha256
from kd_assets.model_files.fingerprints import known_weights_fingerprint, tokenizer_fingerprint, weights_fingerprint
from kd_assets.model_files.folder import model_folder
from kd_assets.model_files.reading import read_json
from kd_assets.model_files.weight_files import named_weights, weights_read
from kd_assets.sources.tokenise import vocabulary_size
from kd_assets.sources.tokenizer_proof import own_encoding
from kd_assets_tests.model_files.hub_cache import link_blob


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
    write_shards(folders[3], "model.safetensors")
    (folders[4] / "model.safetensors").unlink()
    write_shards(folders[4], "model-00001-of-00001.safetensors")
    assert len({weights_fingerprint(folder, None) for folder in folders}) == 5


def write_shards(folder: Path, *names: str) -> Path:
    """An index that names these files, and each of them."""
    for name in names:
        (folder / name).write_bytes(name.encode())
    write_index(folder, *names)
    return folder


def write_index(folder: Path, *names: str) -> None:
    weight_map = {f"layers.{i}.weight": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def make_sharded(folder: Path) -> Path:
    make_model(folder)
    (folder / "model.safetensors").unlink()
    return write_shards(folder, ONE, TWO)


def test_incomplete_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    (folder / TWO).unlink()
    with pytest.raises(MissingInputError, match=f"lacks {TWO}, which its index names"):
        weights_fingerprint(folder, None)
    (folder / TWO).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(MissingInputError, match=rf"{TWO} is a Git LFS pointer.*git lfs pull"):
        weights_fingerprint(folder, None)
    (folder / TWO).write_bytes(b"more")
    assert len(weights_fingerprint(folder, None)) == 64


# ---------------------------------------------------------------- one answer to which files are the weights


def test_a_stale_file_beside_shards_and_their_index_is_refused(tmp_path: Path) -> None:
    """transformers would run the stale one."""
    folder = make_sharded(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"stale")
    with pytest.raises(InputError, match=f"two sets of weights: model.safetensors, .* such as {ONE}: move away"):
        weights_fingerprint(folder, None)
    with pytest.raises(InputError, match="two sets of weights"):
        known_weights_fingerprint(folder, None)


def test_shards_that_nothing_names_are_refused(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"of another save")
    with pytest.raises(InputError, match=r"model-00003-of-00003.safetensors, which its index does not name"):
        weights_fingerprint(folder, None)
    folder = make_model(tmp_path / "n")
    (folder / ONE).write_bytes(b"its index was not downloaded yet")
    with pytest.raises(InputError, match=rf"model\.safetensors, and {ONE}, which no index names"):
        weights_fingerprint(folder, None)


def test_an_index_that_names_the_one_file_is_one_answer(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    write_index(folder, "model.safetensors")
    assert len(weights_fingerprint(folder, None)) == 64


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]"])
def test_an_index_that_names_nothing_is_refused(tmp_path: Path, index: str) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="lists no weights"):
        weights_fingerprint(folder, None)


def test_files_that_are_not_read_are_not_in_the_fingerprint(tmp_path: Path) -> None:
    for folder in (make_model(tmp_path / "one"), make_sharded(tmp_path / "sharded")):
        before = weights_fingerprint(folder, None)
        for name in ("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "x.gguf"):
            (folder / name).write_bytes(b"the same weights in another form")
        assert weights_fingerprint(folder, None) == before


def test_fingerprints_of_folders_with_one_answer_are_what_they_were(tmp_path: Path) -> None:
    one, sharded = make_model(tmp_path / "one"), make_sharded(tmp_path / "sharded")
    assert weights_fingerprint(one, None).startswith("709be689527736a4")
    assert weights_fingerprint(sharded, None).startswith("e1220b7fd65a2037")


def test_weights_under_a_name_that_nothing_reads_are_missing(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(MissingInputError, match=r"holds model\.fp16\.safetensors and neither model\.safetensors nor"):
        weights_fingerprint(folder, None)


def test_an_adapter_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter.*merge_and_unload"):
        weights_fingerprint(folder, None)


def test_a_configuration_that_names_other_weights_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", transformers_weights="other.safetensors")
    (folder / "other.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match=r"names weights of its own \(transformers_weights: 'other\.safetensors'\)"):
        weights_fingerprint(folder, None)


# ---------------------------------------------------------------- no files, and no configuration


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_named_pipe_in_a_files_place_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(MissingInputError, match=rf"{name} cannot be read: it is a named pipe and no file"):
        model_folder(str(folder), None)
    (tmp_path / "link").symlink_to(folder / name)
    for read in (
        lambda: read_json(tmp_path / "link", "it says what it is"),
        lambda: hashed_sha256(folder / name, None),
    ):
        with pytest.raises(MissingInputError, match="it is a named pipe"):
            read()


READERS: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: weights_fingerprint(folder, None),
    "known weights": lambda folder: known_weights_fingerprint(folder, None),
    "tokenizer": lambda folder: tokenizer_fingerprint(folder, None),
    "files of the weights": weights_read,
    "names of the weights": named_weights,
    "folder": lambda folder: model_folder(str(folder), None),
    "vocabulary": vocabulary_size,
    "tokenizer's own encoding": own_encoding,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ESTALE, StorageUnreachableError), (errno.EIO, StorageUnreachableError), (errno.EACCES, MissingInputError)],
)
def test_a_file_system_that_fails_is_an_answer_whatever_is_asked_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, number: int, expected: type[Exception]
) -> None:
    """Fake: no file system here fails on demand."""
    folder = make_model(tmp_path / "m")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(folder / "config.json"))

    for name in ("stat", "is_dir", "is_file", "exists", "glob", "iterdir"):
        monkeypatch.setattr(Path, name, fail)
    with pytest.raises(expected, match=r"cannot (be )?read"):
        READERS[reader](folder)


def test_a_device_and_a_socket_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises(MissingInputError, match=r"config\.json cannot be read: it is a device"):
        weights_fingerprint(folder, None)
    (folder / "config.json").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "config.json"))
    with pytest.raises(MissingInputError, match=r"it is a socket"):
        weights_fingerprint(folder, None)


@pytest.mark.parametrize("depth", [200, 900, 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_json_that_is_nested_without_end_is_refused(tmp_path: Path, name: str, depth: int) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    (folder / name).write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(InputError, match=rf"{name} has lists and objects more than 100 deep"):
        tokenizer_fingerprint(folder, None) if name.startswith("tok") else weights_fingerprint(folder, None)


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


def test_tekken_counts_where_it_decides_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text('{"version": 1}')
    one = tokenizer_fingerprint(tmp_path, None)
    (tmp_path / "tekken.json").write_text('{"version": 2}')
    assert tokenizer_fingerprint(tmp_path, None) != one
    (tmp_path / "tokenizer.json").write_text("{}")
    beside = tokenizer_fingerprint(tmp_path, None)
    (tmp_path / "tekken.json").unlink()
    assert tokenizer_fingerprint(tmp_path, None) == beside


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(MissingInputError, match="holds no tokenizer"):
        tokenizer_fingerprint(tmp_path, None)
    with pytest.raises(MissingInputError, match="no model folder"):
        tokenizer_fingerprint(tmp_path / "absent", None)


# ---------------------------------------------------------------- without reading weights again


def test_weights_in_the_hugging_face_cache_have_the_fingerprint_that_reading_them_gives(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", weights=b"w" * 100)
    in_the_cache = link_blob(tmp_path / "hub", "model.safetensors", b"w" * 100).parent
    (in_the_cache / "config.json").write_bytes((plain / "config.json").read_bytes())
    said: list[str] = []
    assert weights_fingerprint(in_the_cache, None, say=said.append) == weights_fingerprint(plain, None)
    assert said == [], "nothing was read"


def test_a_known_fingerprint_takes_no_reading_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    folder, cache = make_model(tmp_path / "m"), DigestCache(tmp_path / "digests.json")
    assert known_weights_fingerprint(folder, cache) is None
    said: list[str] = []
    found = weights_fingerprint(folder, cache, say=said.append)
    assert said == [f"hashing {folder}/model.safetensors: 0.0 GB, once for as long as nothing changes"]
    assert known_weights_fingerprint(folder, cache) == found
    (folder / "model.safetensors").write_bytes(b"more")
    assert known_weights_fingerprint(folder, cache) is None

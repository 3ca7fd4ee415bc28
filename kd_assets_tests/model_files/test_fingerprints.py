"""What `model_files.fingerprints` promises: content decides, location does not. Digests of files: `test_digests.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd_assets.errors import InputError, MissingInputError
from kd_assets.model_files import digests
from kd_assets.model_files.digests import DigestCache
from kd_assets.model_files.fingerprints import known_weights_fingerprint, tokenizer_fingerprint, weights_fingerprint
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
    (folder / "more.safetensors").write_bytes(b"more")
    assert known_weights_fingerprint(folder, cache) is None

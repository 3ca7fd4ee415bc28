"""What a teacher and its tokenizer are, as hashes of what their files hold; never of their names.

Anyone may import it, so that the service node can name a 70B teacher's weights without torch. The invariant: two
folders have equal fingerprints exactly when everything that determines the teacher's numbers (weights and
configuration) or a document's tokens (vocabulary, merges, special tokens, chat template) is equal; where the folder
lies, when it was written and by which library version do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_assets.durable import open_file
from kd_assets.errors import MissingInputError
from kd_assets.model_files.digests import (
    DigestCache,
    HashingProgress,
    Say,
    cached_sha256,
    hashed_sha256,
    known_sha256,
)
from kd_assets.model_files.reading import os_reason, read_json, reads_folder
from kd_assets.model_files.weight_files import INDEX_NAME, weights_read

VOLATILE_KEYS = frozenset({"transformers_version", "_name_or_path", "name_or_path", "_commit_hash"})
"""Keys of Hugging Face JSON files that say where a file came from, not what it means; dropped at any depth."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
)
"""Patterns of the files that `AutoTokenizer` reads."""

TEKKEN = "tekken.json"
"""Mistral's own, which decides where there is no tokenizer.json (see `tokenizer_proof`); beside one it says the same
again, and does not count."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@reads_folder
def weights_fingerprint(
    folder: Path, cache: DigestCache | None, *, remote_code: bool = False, say: Say | None = None
) -> str:
    """SHA-256 (hex) of what determines a model's numbers: its configuration and the weight files that are read
    (see `weight_files`); with
    `remote_code` also every `*.py` file in the folder and below, since they may run.

    The configuration counts as parsed, without `VOLATILE_KEYS`. Files whose hash is not known (see `known_sha256`) are
    read, which takes minutes for 140 GB: `say` is told how far it is. Raises MissingInputError when `config.json` or
    the weights are missing or incomplete (a shard that the index names, a Git LFS pointer in a file's place).
    """
    config = read_json(folder / "config.json", "a model folder holds one beside its weights")
    files = weight_files(folder, remote_code=remote_code)
    known = {path: known_sha256(path, cache) for path in files}
    unknown = [path for path, digest in known.items() if digest is None]
    read = HashingProgress(unknown, say).read if unknown and say is not None else lambda n_bytes: None
    digests = {path: digest or hashed_sha256(path, cache, read=read) for path, digest in known.items()}
    return _weights_fingerprint(folder, config, digests)


@reads_folder
def known_weights_fingerprint(folder: Path, cache: DigestCache | None, *, remote_code: bool = False) -> str | None:
    """`weights_fingerprint` where it takes no reading of weights; None where some would have to be hashed."""
    config = read_json(folder / "config.json", "a model folder holds one beside its weights")
    known = {path: known_sha256(path, cache) for path in weight_files(folder, remote_code=remote_code)}
    digests = {path: digest for path, digest in known.items() if digest is not None}
    return _weights_fingerprint(folder, config, digests) if len(digests) == len(known) else None


@reads_folder
def weight_files(folder: Path, *, remote_code: bool = False) -> list[Path]:
    """The files whose bytes are in `weights_fingerprint`. Raises what it raises for what is missing."""
    weights = weights_read(folder)
    for path in weights:
        _refuse_lfs_pointer(path)
    code = sorted(_glob(folder, "**/*.py")) if remote_code else []
    return [path for path in (*weights, folder / INDEX_NAME, *code) if path.exists()]


def _weights_fingerprint(folder: Path, config: Any, digests: Mapping[Path, str]) -> str:
    files = {path.relative_to(folder).as_posix(): digest for path, digest in digests.items()}
    return _fingerprint({"config": _without_volatile(config), "files": files})


@reads_folder
def tokenizer_fingerprint(folder: Path, cache: DigestCache | None) -> str:
    """SHA-256 (hex) of what determines a document's tokens: the `TOKENIZER_FILES` that are there, template included,
    and `TEKKEN` where it decides.

    `tokenizer_config.json` counts as parsed, without `VOLATILE_KEYS`. Raises MissingInputError when there are none.
    """
    patterns = TOKENIZER_FILES if (folder / "tokenizer.json").is_file() else (*TOKENIZER_FILES, TEKKEN)
    found = sorted({path for pattern in patterns for path in _glob(folder, pattern)})
    contents: dict[str, Any] = {}
    for path in found:
        _refuse_lfs_pointer(path)
        name = path.relative_to(folder).as_posix()
        if name == "tokenizer_config.json":
            contents[name] = _without_volatile(read_json(path, "it is part of the tokenizer"))
        else:
            contents[name] = cached_sha256(path, cache)
    if contents.keys() <= {"tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}:
        raise MissingInputError(
            f"{folder} holds no tokenizer (tokenizer.json, or a vocabulary such as tokenizer.model): name the folder "
            "that save_pretrained() wrote the tokenizer to"
        )
    return _fingerprint(contents)


def _glob(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        raise MissingInputError(f"no model folder at {folder}")
    return [path for path in folder.glob(pattern) if not path.is_dir()]


def _refuse_lfs_pointer(path: Path) -> None:
    """A clone made without git-lfs has a small text in the place of each large file."""
    try:
        with open_file(path) as f:
            pointer = f.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as e:
        raise MissingInputError(f"{path} cannot be read: {os_reason(e)}") from e
    if pointer:
        raise MissingInputError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its clone")


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_volatile(v) for k, v in value.items() if k not in VOLATILE_KEYS}
    if isinstance(value, list):
        return [_without_volatile(v) for v in value]
    return value


def _fingerprint(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

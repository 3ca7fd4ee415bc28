"""What a teacher and its tokenizer are, as hashes of what their files hold; never of their names.

Anyone may import it; standard library only, so that the service node can name a 70B teacher's weights without torch.
The invariant: two folders have equal fingerprints exactly when everything that determines the teacher's numbers
(weights and configuration) or a document's tokens (vocabulary, merges, special tokens, chat template) is equal;
where the folder lies, when it was written and by which library version do not count. Hashing 140 GB takes minutes, so
digests of files are kept in a `DigestCache` under what the file system says of the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd_assets.errors import InputError, MissingInputError

CHUNK_BYTES = 1 << 22
SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again under the same time stamp (NFS and FAT keep whole seconds), so
its digest is not kept; git calls such an entry racy."""

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

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class DigestCache:
    """SHA-256 digests of files, kept in one JSON file, under (path, size, mtime_ns, inode).

    Safe for concurrent processes: a writer merges what others wrote meanwhile and replaces the file atomically. The
    cache only saves time: a file that is corrupt, unreadable or unwritable costs a hash computed again, never an error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: dict[str, dict[str, Any]] | None = None

    def get(self, path: Path, status: os.stat_result) -> str | None:
        """The digest of the file at absolute `path` while its status is still `status`; None when unknown."""
        if self._digests is None:
            self._digests = self._read()
        entry = self._digests.get(str(path))
        if entry is None or any(entry.get(name) != value for name, value in _key(status).items()):
            return None
        return str(entry["sha256"])

    def put(self, path: Path, status: os.stat_result, sha256: str) -> None:
        """Keep a digest, for this process and, where the cache's folder can be written, for all."""
        entry = {**_key(status), "sha256": sha256}
        with contextlib.suppress(OSError):  # a read-only folder or a full disk: the next process hashes again
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            with self._locked():
                self._digests = {**self._read(), str(path): entry}
                self._replace(self._digests)
            return
        self._digests = {**(self._digests or {}), str(path): entry}

    def _read(self) -> dict[str, dict[str, Any]]:
        """What is in the file; nothing where it is missing, unreadable or not ours."""
        try:
            files = json.loads(self._path.read_bytes())["files"]
            return {str(path): entry for path, entry in files.items() if _is_sha256(entry.get("sha256"))}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}

    def _replace(self, digests: Mapping[str, Mapping[str, Any]]) -> None:
        fd, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(fd, "w") as f:
                json.dump({"version": 1, "files": digests}, f, indent=1, sort_keys=True)
            os.chmod(name, 0o640)
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, so that no merge loses another's entry (where the file system has locks at all)."""
        fd = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            with contextlib.suppress(OSError):  # ENOLCK: some network file systems; at worst a digest is lost
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def file_sha256(path: Path, cache: DigestCache | None) -> str:
    """SHA-256 (hex) of a file's bytes, from `cache` where the file is unchanged.

    Raises MissingInputError when the file cannot be read, InputError when it changes while it is being read.
    """
    try:
        real = path.resolve(strict=True)  # a snapshot's links lead to one blob: hashed once for all revisions
        with real.open("rb") as f:
            before = os.fstat(f.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise MissingInputError(f"{path} is not a file")
            if cache is not None and (known := cache.get(real, before)) is not None:
                return known
            digest = hashlib.sha256()
            while chunk := f.read(CHUNK_BYTES):
                digest.update(chunk)
            after = os.fstat(f.fileno())
    except (OSError, RuntimeError) as e:  # RuntimeError: pathlib's word for a loop of symbolic links
        raise MissingInputError(f"{path} cannot be read: {_reason(e)}") from e
    if _key(before) != _key(after):
        raise InputError(f"{path} changed while it was being read: run again once nothing writes to it")
    if cache is not None and time.time_ns() - after.st_mtime_ns > SETTLED_NS:
        cache.put(real, after, digest.hexdigest())
    return digest.hexdigest()


def model_folder(model: str, revision: str | None, *, environment: Mapping[str, str] = os.environ) -> Path:
    """The local folder of a model: a folder as it is, a hub id as its snapshot in the Hugging Face cache.

    Never goes to the network: a job on a node without one must find what the service node found. `revision` is a
    branch, tag or commit of a hub id (default `main`); a folder has only its files, so there it does not count.
    Raises MissingInputError, saying what to do, when there is no such folder or snapshot.
    """
    folder = Path(os.path.expanduser(model))
    if model and folder.is_dir():
        return folder.absolute()
    if not _HUB_ID.fullmatch(model) or "--" in model or ".." in model:
        raise MissingInputError(f"no model folder at {model}: name an existing folder, or a hub id such as org/name")
    hub = _hub_cache(environment)
    repository = hub / f"models--{model.replace('/', '--')}"
    wanted = revision or "main"
    commit = wanted
    with contextlib.suppress(OSError, ValueError):  # not a branch or tag that was downloaded: perhaps a commit
        commit = (repository / "refs" / wanted).read_text().strip()
    snapshot = repository / "snapshots" / commit
    if re.fullmatch(r"[\w-][\w.-]*", commit) and snapshot.is_dir():
        return snapshot.absolute()
    option = f" --revision {revision}" if revision else ""
    raise MissingInputError(
        f"{model} (revision {wanted}) is neither a folder nor in the Hugging Face cache {hub}: run "
        f"`hf download {model}{option}` where there is a network, or set HF_HOME to the cache that holds it"
    )


def weights_fingerprint(folder: Path, cache: DigestCache | None, *, remote_code: bool = False) -> str:
    """SHA-256 (hex) of what determines a model's numbers: its configuration and every `*.safetensors` file; with
    `remote_code` also every `*.py` file in the folder and below, since they may run.

    The configuration counts as parsed, without `VOLATILE_KEYS`. Raises MissingInputError when `config.json` or the
    weights are missing or incomplete (a shard that the index names, a Git LFS pointer in a file's place).
    """
    config = _read_json(folder / "config.json", "a model folder holds one beside its weights")
    weights = sorted(_glob(folder, "*.safetensors"))
    if not weights:
        raise MissingInputError(
            f"{folder} holds no *.safetensors: download the model's weights, or convert them with "
            "save_pretrained() (other formats are not read: they can run code)"
        )
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        index = _read_json(index_file, "it lists the weight files")
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        named = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if absent := sorted(named - {path.name for path in weights}):
            raise MissingInputError(f"{folder} lacks {absent[0]}, which its index names: finish the download")
    for path in weights:
        _refuse_lfs_pointer(path)
    code = sorted(_glob(folder, "**/*.py")) if remote_code else []
    files = [path for path in (*weights, index_file, *code) if path.exists()]
    digests = {path.relative_to(folder).as_posix(): file_sha256(path, cache) for path in files}
    return _fingerprint({"config": _without_volatile(config), "files": digests})


def tokenizer_fingerprint(folder: Path, cache: DigestCache | None) -> str:
    """SHA-256 (hex) of what determines a document's tokens: the `TOKENIZER_FILES` that are there, template included.

    `tokenizer_config.json` counts as parsed, without `VOLATILE_KEYS`. Raises MissingInputError when there are none.
    """
    found = sorted({path for pattern in TOKENIZER_FILES for path in _glob(folder, pattern)})
    contents: dict[str, Any] = {}
    for path in found:
        _refuse_lfs_pointer(path)
        name = path.relative_to(folder).as_posix()
        if name == "tokenizer_config.json":
            contents[name] = _without_volatile(_read_json(path, "it is part of the tokenizer"))
        else:
            contents[name] = file_sha256(path, cache)
    if contents.keys() <= {"tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}:
        raise MissingInputError(
            f"{folder} holds no tokenizer (tokenizer.json, or a vocabulary such as tokenizer.model): name the folder "
            "that save_pretrained() wrote the tokenizer to"
        )
    return _fingerprint(contents)


def _key(status: os.stat_result) -> dict[str, int]:
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Where `huggingface_hub` keeps downloads, by its own rules (huggingface_hub/constants.py)."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := environment.get(name):
            return Path(os.path.expanduser(os.path.expandvars(folder)))
    if home := environment.get("HF_HOME"):
        return Path(os.path.expanduser(os.path.expandvars(home))) / "hub"
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.path.expandvars(cache))) / "huggingface" / "hub"


def _glob(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        raise MissingInputError(f"no model folder at {folder}")
    return [path for path in folder.glob(pattern) if not path.is_dir()]


def _read_json(path: Path, why: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as e:
        raise MissingInputError(f"{path} cannot be read: {_reason(e)}; {why}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON ({e}): download it again") from e


def _refuse_lfs_pointer(path: Path) -> None:
    """A clone made without git-lfs has a small text in the place of each large file."""
    try:
        with path.open("rb") as f:
            pointer = f.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as e:
        raise MissingInputError(f"{path} cannot be read: {_reason(e)}") from e
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


def _reason(e: Exception) -> str:
    return (e.strerror if isinstance(e, OSError) else None) or str(e)

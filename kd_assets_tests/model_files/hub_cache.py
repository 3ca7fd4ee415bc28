"""A Hugging Face cache as `huggingface_hub` lays it, for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

COMMIT = "c" * 40


def make_snapshot(hub: Path, model: str = "org/tiny", **refs: str) -> Path:
    """The folder of a model's one snapshot, still empty, that `main` and `refs` name."""
    repository = hub / f"models--{model.replace('/', '--')}"
    (repository / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
    for ref, commit in {"main": COMMIT, **refs}.items():
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return repository / "snapshots" / COMMIT


def link_blob(hub: Path, file: str, content: bytes, *, name: str | None = None) -> Path:
    """A file of a snapshot: a link to a blob, which is named after its SHA-256 as large files are."""
    snapshot = make_snapshot(hub)
    blob = snapshot.parents[1] / "blobs" / (name or hashlib.sha256(content).hexdigest())
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(content)
    (snapshot / file).symlink_to(Path("../..") / "blobs" / blob.name)
    return snapshot / file

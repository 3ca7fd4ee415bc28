"""Where a model's files are on this machine: a folder, or a snapshot in the Hugging Face cache. Never the network.

Anyone may import it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kd_assets.errors import MissingInputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Where `huggingface_hub` keeps downloads, by its own rules (huggingface_hub/constants.py)."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := environment.get(name):
            return Path(os.path.expanduser(os.path.expandvars(folder)))
    if home := environment.get("HF_HOME"):
        return Path(os.path.expanduser(os.path.expandvars(home))) / "hub"
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.path.expandvars(cache))) / "huggingface" / "hub"

"""Where a model's files are on this machine: a folder, or a snapshot in the Hugging Face cache. Never the network.

Anyone may import it; `huggingface_hub` is imported only for what is no folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from kd_assets.errors import MissingInputError
from kd_assets.model_files.reading import reading_errors, refuse_other_kinds


def model_folder(model: str, revision: str | None) -> Path:
    """The local folder of a model: a folder as it is, a hub id as its snapshot in the Hugging Face cache.

    Never goes to the network: a job on a node without one must find what the service node found. `revision` is a
    branch, tag or commit of a hub id (default `main`); a folder has only its files, so there it does not count. What
    the snapshot lacks is not looked at: a tokenizer alone is enough for some.
    Raises MissingInputError, saying what to do, when there is no such folder or snapshot, and for a pipe, socket or
    device in it in the place of a file: whatever opens it would wait for ever.
    """
    folder = Path(os.path.expanduser(model))
    with reading_errors(folder):
        is_there = bool(model) and folder.is_dir()
    if not is_there:
        folder = _snapshot(model, revision)
    refuse_other_kinds(folder)
    return folder.absolute()


def _snapshot(model: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = revision or constants.DEFAULT_REVISION
    try:
        if ".." not in wanted:  # no name of git's has it, and it leads out of the cache
            return Path(snapshot_download(model, revision=wanted, local_files_only=True, allow_patterns=[]))
    except HFValidationError as e:
        raise MissingInputError(
            f"no model folder at {model}: name an existing folder, or a hub id such as org/name"
        ) from e
    except (OSError, ValueError):  # not there, or a revision that cannot name a file
        pass
    option = f" --revision {revision}" if revision else ""
    raise MissingInputError(
        f"{model} (revision {wanted}) is neither a folder nor in the Hugging Face cache {constants.HF_HUB_CACHE}: run "
        f"`hf download {model}{option}` where there is a network, or set HF_HOME to the cache that holds it"
    )

"""A data set of the hub or of a folder as the Arrow files that `datasets` keeps of it.

Planning needs `datasets` (the extra `control`); whoever reads the files does not. A revision of the hub is resolved to
its commit, which is pinned; where the hub does not answer, what is cached here is taken, and said. The hub's token
comes from the environment (`HF_TOKEN`) alone. Data sets that bring code are refused: `datasets` runs none since 4.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd_assets.durable import storage_errors
from kd_assets.errors import InputError, MissingInputError, StorageUnreachableError
from kd_assets.sources.files.formats import SAVED_SPLITS, SAVED_STATE, licence_named, licence_of_card
from kd_assets.sources.files.found import FoundSource, SourceFile
from kd_assets.sources.spec import DatasetSpec, resolve_path

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = ("1", "true", "yes", "on")


def find_data_set(spec: DatasetSpec, *, base_folder: Path, environment: Mapping[str, str]) -> FoundSource:
    """The Arrow files of a split. Raises MissingInputError for a data set, configuration or split that is not there or
    not to be read, InputError for one that needs code, StorageUnreachableError where the hub does not answer and
    nothing is cached."""
    if not re.fullmatch(r"\w+(\.\w+)*", spec.split):
        raise InputError(
            f"data set {spec.name}: the split {spec.split!r} is not the name of one: slices and sums of splits are not "
            "taken; name a split, and cut it with max_documents"
        )
    if spec.name.startswith(("/", ".", "~", "$")):
        folder = resolve_path(spec.name, base_folder, what=f"data set {spec.name!r}", environment=environment)
        if any((folder / name).is_file() for name in (SAVED_STATE, SAVED_SPLITS)):
            return find_saved(folder, split=spec.split)
        return _of_folder(spec, folder, environment)
    return _of_hub(spec, environment)


# ---------------------------------------------------------------------- save_to_disk


def find_saved(folder: Path, *, split: str | None) -> FoundSource:
    """What `datasets.save_to_disk` wrote: one split, or a folder of several, of which `split` is one."""
    with storage_errors(folder, "read"):
        if (folder / SAVED_SPLITS).is_file():
            splits = _json_of(folder / SAVED_SPLITS).get("splits", [])
            if split is None and len(splits) == 1:
                split = splits[0]
            if split not in splits:
                raise MissingInputError(
                    f"{folder} holds the splits {', '.join(splits) or '(none)'}, and "
                    + (f"{split!r} is not among them" if split else "which of them is meant is not said")
                    + f": give the path of one ({folder}/SPLIT), or dataset: {{name: {folder}, split: SPLIT}}"
                )
            folder = folder / str(split)
        state, info = _json_of(folder / SAVED_STATE), _json_of(folder / "dataset_info.json")
        if split is not None and state.get("_split") not in (None, split):
            raise MissingInputError(f"{folder} is the split {state['_split']!r} and not {split!r}: correct the recipe")
        names = [str(one["filename"]) for one in state.get("_data_files") or []]
        if state.get("_indices_data_files"):
            raise InputError(f"{folder} has an index over its rows: write it again with a newer version of datasets")
        licence = licence_named(info.get("license") or None, None)
        return FoundSource(files=tuple(_arrow_file(folder, name) for name in sorted(names)), licence=licence)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise MissingInputError(f"{path} is not there: {path.parent} is no whole folder of save_to_disk") from e
    except ValueError as e:
        raise InputError(f"{path} is not JSON ({e}): save the data set again") from e
    return found


def _arrow_file(folder: Path, name: str) -> SourceFile:
    path = folder / name
    try:
        status = path.stat()
    except FileNotFoundError as e:
        raise MissingInputError(f"{path} is not there, though its folder names it: save the data set again") from e
    return SourceFile(
        name=name, path=str(path), file_format="arrow", n_bytes=status.st_size, changed=str(status.st_mtime_ns)
    )


# ---------------------------------------------------------------------- through `datasets`


def _of_folder(spec: DatasetSpec, folder: Path, environment: Mapping[str, str]) -> FoundSource:
    if not folder.is_dir():
        raise MissingInputError(f"data set {folder} is no folder: create it, or correct its name in the recipe")
    found = _prepared(spec, str(folder), None, environment)
    card = folder / "README.md"
    licence = licence_of_card(card.read_text("utf-8", "replace")) if card.is_file() else None
    return replace(found, licence=licence)


def _of_hub(spec: DatasetSpec, environment: Mapping[str, str]) -> FoundSource:
    answer = _ask_hub(spec, environment)
    if isinstance(answer, str):
        return _cached(spec, environment, reason=answer)
    found = _prepared(spec, spec.name, answer.commit, environment)
    return replace(found, revision=answer.commit, licence=answer.licence)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OnHub:
    commit: str
    licence: str | None


def _ask_hub(spec: DatasetSpec, environment: Mapping[str, str]) -> _OnHub | str:
    """The commit of a revision and the card's licence; or why the hub gave no answer."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE or environment.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        return "HF_HUB_OFFLINE is set"
    api = HfApi(endpoint=environment.get("HF_ENDPOINT"), token=_token(environment))
    name = f"data set {spec.name!r}"
    try:
        info = api.dataset_info(spec.name, revision=spec.revision, timeout=30.0)
    except GatedRepoError as e:
        raise MissingInputError(
            f"{name} is gated: ask for access on its page of the hub, and set HF_TOKEN where Dagster runs to the token "
            "of an account that has it"
        ) from e
    except RevisionNotFoundError as e:
        raise MissingInputError(f"{name} has no revision {spec.revision!r}: name a branch, tag or commit of it") from e
    except RepositoryNotFoundError as e:
        raise MissingInputError(
            f"{name} is not on the hub, or HF_TOKEN does not open it: correct its name, or set HF_TOKEN where Dagster "
            "runs (a folder begins with / or ./)"
        ) from e
    except HfHubHTTPError as e:
        return f"the hub answers {e.response.status_code}"
    except Exception as e:
        if not _is_no_answer(e):
            raise
        return f"the hub cannot be reached ({type(e).__name__})"
    card: Any = info.card_data
    licence = licence_named(card.get("license"), card.get("license_name")) if card is not None else None
    return _OnHub(commit=str(info.sha), licence=licence)


def _is_no_answer(e: BaseException | None) -> bool:
    """Whether the hub did not answer: its client and `datasets` use HTTP libraries that change with their versions."""
    while e is not None:
        if isinstance(e, (ConnectionError, TimeoutError)) or type(e).__module__.partition(".")[0] in _HTTP_LIBRARIES:
            return True
        e = e.__cause__
    return False


_HTTP_LIBRARIES = ("httpx", "httpx2", "requests", "urllib3", "aiohttp")


def _token(environment: Mapping[str, str]) -> str | bool:
    """False: none, and none of a file in the home folder either."""
    return environment.get("HF_TOKEN") or False


def _prepared(spec: DatasetSpec, name: str, commit: str | None, environment: Mapping[str, str]) -> FoundSource:
    """What `datasets` makes of a data set, in its own cache; made once."""
    try:
        import datasets
    except ImportError as e:
        raise InputError(f"data set {name} needs the package datasets where Dagster runs: pip install datasets") from e
    datasets.disable_progress_bars()
    download = datasets.DownloadConfig(token=_token(environment))
    try:
        builder = datasets.load_dataset_builder(
            name,
            spec.config,
            revision=commit,
            cache_dir=str(_cache(environment)),
            download_config=download,
            token=_token(environment),
        )
        builder.download_and_prepare(download_config=download)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as e:
        raise MissingInputError(f"data set {name} cannot be loaded: {e}") from e
    except Exception as e:  # a reader of any format, on files that anybody may have written
        if _is_no_answer(e):
            raise StorageUnreachableError(
                f"data set {name} cannot be fetched ({e.__cause__ or e}): run again once the hub answers"
            ) from e
        if "scripts are no longer supported" in str(e):
            raise InputError(
                f"data set {name} needs code of its own to be read, which is not run: convert it to Parquet (on the "
                "hub, its branch refs/convert/parquet has it)"
            ) from e
        cause = f"{type(e).__name__}: {e.__cause__ or e}"
        raise InputError(f"data set {name} cannot be read by datasets ({cause}): correct it, or its config") from e
    return _split_files(spec, Path(builder.cache_dir), str(builder.dataset_name), name)


def _split_files(spec: DatasetSpec, folder: Path, data_set: str, name: str) -> FoundSource:
    pattern = re.compile(rf"{re.escape(data_set)}-(.+?)(-\d{{5}}-of-\d{{5}})?\.arrow")
    with storage_errors(folder, "read"):
        found = [match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
        names = sorted(match[0] for match in found if match[1] == spec.split)
        if not names:
            splits = ", ".join(sorted({match[1] for match in found})) or "(none)"
            raise MissingInputError(f"data set {name} has no split {spec.split!r}; it has {splits}: name one of them")
        return FoundSource(files=tuple(_arrow_file(folder, one) for one in names))


def _cache(environment: Mapping[str, str]) -> Path:
    """Where `datasets` keeps what it made: by its own rules."""
    if folder := environment.get("HF_DATASETS_CACHE"):
        return Path(folder).expanduser()
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "datasets"


# ---------------------------------------------------------------------- without the hub


def _cached(spec: DatasetSpec, environment: Mapping[str, str], *, reason: str) -> FoundSource:
    """What an earlier plan had prepared: the commit that is asked for, or the newest where none is."""
    owner, _, last = spec.name.rpartition("/")
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", last)).lower()
    root = _cache(environment) / (f"{owner}___{snake}" if owner else snake)
    with storage_errors(root, "read"):
        folders = [path for path in root.glob(f"{spec.config or '*'}/*/*") if _COMMIT.fullmatch(path.name)]
        configs = sorted({path.parent.parent.name for path in folders})
        folders.sort(key=lambda path: path.stat().st_mtime_ns)
    if spec.revision is not None and spec.revision != "main":
        folders = [path for path in folders if path.name == spec.revision]
    if not folders:
        raise StorageUnreachableError(
            f"data set {spec.name!r}: {reason}, and {root} has no copy of {spec.revision or 'it'}: plan again where "
            "the hub answers (a copy is found by its commit, not by a branch)"
        )
    if spec.config is None and len(configs) > 1:
        raise InputError(
            f"data set {spec.name!r}: {reason}, and copies of {', '.join(configs)} are here: name its config"
        )
    folder = folders[-1]
    info = _json_of(folder / "dataset_info.json")
    found = _split_files(spec, folder, str(info.get("dataset_name") or snake), spec.name)
    said = f"data set {spec.name}: {reason}; taken from the local cache, as of commit {folder.name}"
    return replace(found, revision=folder.name, licence=licence_named(info.get("license") or None, None), said=(said,))

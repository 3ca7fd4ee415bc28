"""Which files of a model's folder are its weights: those that transformers reads, where only one answer is possible.

Anyone may import it; standard library only. transformers reads `model.safetensors` where it is there, else what
`model.safetensors.index.json` names. The invariant: what is fingerprinted, weighed and loaded are the same files, and a
folder that holds two sets of weights is refused, since the one that runs need not be the one that is meant.
"""

from __future__ import annotations

import re
from pathlib import Path

from kd_assets.errors import InputError, MissingInputError
from kd_assets.model_files.reading import read_json, reads_folder

ONE_FILE = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@reads_folder
def weights_read(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from, in the order of their names.

    Raises MissingInputError where they are missing or incomplete, InputError where the folder has two answers.
    """
    there = {path.name for path in safetensors_of(folder)}
    refuse_adapter(folder)
    if INDEX_NAME in {path.name for path in folder.iterdir()}:
        named = named_weights(folder)
        if ONE_FILE in there and named != {ONE_FILE}:
            raise InputError(
                f"{folder} holds two sets of weights: {ONE_FILE}, which transformers would read, and "
                f"{len(named)} files that {INDEX_NAME} names, such as {min(named)}: move away the one that is not "
                "meant (with the index, if that is the other)"
            )
        if absent := sorted(named - there):
            raise MissingInputError(f"{folder} lacks {absent[0]}, which its index names: finish the download")
    elif ONE_FILE in there:
        named = {ONE_FILE}
    else:
        raise _no_weights(folder, there)
    if stale := sorted(name for name in there - named if _SHARD.fullmatch(name)):
        raise InputError(
            f"{folder} holds two sets of weights: {', '.join(sorted(named)[:2])}, and {stale[0]}, which "
            f"{'no index names' if named == {ONE_FILE} else 'its index does not name'}: move away what is left of "
            "another download or save, or finish the download"
        )
    _refuse_another_name(folder, named)
    return [folder / name for name in sorted(named)]


@reads_folder
def safetensors_of(folder: Path) -> list[Path]:
    """All of a folder, read or not."""
    if not folder.is_dir():
        raise MissingInputError(f"no model folder at {folder}")
    return sorted(path for path in folder.glob("*.safetensors") if not path.is_dir())


@reads_folder
def named_weights(folder: Path) -> set[str]:
    """The names of the weight files that the model's index lists; none where it has no index."""
    index_file = folder / INDEX_NAME
    if not index_file.exists():
        return set()
    index = read_json(index_file, "it lists the weight files")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_file} lists no weights (no weight_map): download it again")
    return set(map(str, weight_map.values()))


@reads_folder
def refuse_adapter(folder: Path) -> None:
    """transformers loads another model, the adapter's base, where the package peft is installed, and none else."""
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json), which is loaded onto another model, or passed over, by "
            "the packages that are installed: save the merged model (merge_and_unload() of peft) and name its folder, "
            "or move adapter_config.json away if the weights here are whole without it"
        )


def _refuse_another_name(folder: Path, named: set[str]) -> None:
    config = read_json(folder / "config.json", "a model folder holds one beside its weights")
    own = config.get("transformers_weights") if isinstance(config, dict) else None
    expected = INDEX_NAME if (folder / INDEX_NAME).exists() else ONE_FILE
    if own is not None and own != expected and {own} != named:
        raise InputError(
            f"{folder}/config.json names weights of its own (transformers_weights: {own!r}) beside {expected}: take "
            f"the key out, and keep the weights that are meant as {expected}"
        )


def _no_weights(folder: Path, there: set[str]) -> MissingInputError:
    if there:
        return MissingInputError(
            f"{folder} holds {min(there)} and neither {ONE_FILE} nor {INDEX_NAME}, and nothing else is looked for: "
            "finish the download, or rename the file (a variant such as model.fp16.safetensors)"
        )
    return MissingInputError(
        f"{folder} holds no *.safetensors: download the model's weights, or convert them with save_pretrained() (other "
        "formats are not read: they can run code)"
    )

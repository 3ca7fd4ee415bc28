"""What the doctor finds on disk: whether the caches will fit, and whether the teacher's weights are whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from kd_assets.cards.words import bytes_in_words
from kd_assets.diagnose.finding import Finding, fail, ok, warn
from kd_assets.errors import InputError, MissingInputError, NotCommittedError
from kd_assets.model_files.digests import DigestCache, hashed_sha256, known_sha256
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.model_files.folder import model_folder
from kd_assets.model_files.reading import read_json
from kd_assets.model_files.safetensors_file import stored_tensors
from kd_assets.model_files.size import teacher_shape
from kd_assets.model_files.vocabulary import token_table
from kd_assets.model_files.weight_files import weights_read
from kd_assets.orchestration.billing.space import bytes_needed
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe
from kd_assets.sources.files.find import find_source
from kd_assets.sources.planning.plan import ShardPlan
from kd_assets.sources.planning.token_rate import ASSUMED_BYTES_PER_TOKEN
from kd_assets.sources.spec import resolve_path
from kd_assets.store.reading.summary import inspect

SPACE_MARGIN = 1.2


def check_space(recipe: Recipe, platform: Platform) -> Iterator[Finding]:
    """Free space against what the plan's caches will take, as an upper bound: before compression."""
    free = shutil.disk_usage(platform.home_folder).free
    try:
        hidden_size = hidden_size_of(teacher_folder(recipe, platform))
        n_tokens, n_documents, source = size_of_the_plan(recipe, platform)
    except InputError as e:
        yield warn("free space", f"{bytes_in_words(free)} free; what is needed is not known: {e}")
        return
    needed = bytes_needed(recipe, n_tokens, n_documents, hidden_size)
    there = bytes_there(platform.recipe_folder(recipe.name))
    left = max(sum(needed.values()) - there, 0)
    each = ", ".join(f"{asset} {bytes_in_words(n)}" for asset, n in needed.items())
    found = (
        f"{bytes_in_words(free)} free in {platform.home_folder}; {n_tokens:,} tokens of {source} take at most "
        f"{bytes_in_words(sum(needed.values()))} ({each}), of which {bytes_in_words(there)} are there"
    )
    if free < left:
        yield fail(
            "free space", found, "move KD_HOME to a larger disk, or keep fewer blocks, a smaller k or shorter documents"
        )
    elif free < SPACE_MARGIN * left:
        yield warn("free space", found, "it is close: watch the disk")
    else:
        yield ok("free space", found)


def bytes_there(folder: Path) -> int:
    """Of a recipe's current results."""
    try:
        return sum(cache.n_bytes for cache in inspect(folder).caches)
    except (MissingInputError, NotCommittedError):
        return 0


def size_of_the_plan(recipe: Recipe, platform: Platform) -> tuple[int, int, str]:
    """Tokens and documents of all shards, and where the numbers come from.

    From the shard plan, else from the sizes of the sources, where a document count is a guess. Raises MissingInputError
    for sources that are not there.
    """
    planner = planner_of(recipe, platform)
    try:
        plan: ShardPlan = planner.current_plan()
    except MissingInputError:
        if datasets := [s.spec.name for s in recipe.sources if s.spec.dataset is not None]:
            # To look at one may be to download it.
            raise MissingInputError(f"source {datasets[0]!r} is a data set, and no shard plan is made") from None
        found = [
            find_source(s.spec, base_folder=platform.home_folder, environment=platform.variables())
            for s in recipe.sources
        ]
        n_tokens = int(sum(file.n_bytes for source in found for file in source.files) / ASSUMED_BYTES_PER_TOKEN)
        return n_tokens, max(n_tokens // 500, 1), "the sources (no shard plan yet)"
    n_tokens = plan.totals["n_tokens"] or int(plan.totals["n_bytes"] / ASSUMED_BYTES_PER_TOKEN)
    return n_tokens, plan.totals["n_documents"], "the shard plan"


# ------------------------------------------------------------------------------------------------------- the teacher


def teacher_folder(recipe: Recipe, platform: Platform) -> Path:
    """Raises MissingInputError when it is not on this machine."""
    model = recipe.teacher.model
    if model.startswith((".", "/", "~", "$")):
        home, variables = platform.home_folder, platform.variables()
        model = str(resolve_path(model, home, what="teacher", environment=variables))
    return model_folder(model, recipe.teacher.revision)


def hidden_size_of(folder: Path) -> int:
    """From the model's configuration, whose text part may be nested. Raises InputError where it is not there."""
    try:
        config = read_json(folder / "config.json", "it tells the hidden_size")
        return int((config if "hidden_size" in config else config["text_config"])["hidden_size"])
    except (ValueError, LookupError, TypeError) as e:
        raise InputError(f"{folder}/config.json tells no hidden_size ({e})") from e


def check_weights(recipe: Recipe, platform: Platform, *, verify: bool = False) -> Iterator[Finding]:
    """Every file that the index names, as long as its own header says; with `verify` every file is read, too, and what
    its digest was believed to be (by its name in the Hugging Face cache, or when it was hashed before) is compared."""
    try:
        folder = teacher_folder(recipe, platform)
    except MissingInputError as e:
        made_by = recipe.teacher.made_by
        yield fail("weights", str(e), "" if made_by is None else f"materialize {made_by}")
        return
    try:
        files = weights_read(folder)
    except InputError as e:
        yield fail("weights", str(e))
        return
    problems = [problem for path in files if (problem := header_problem(path))]
    if verify and not problems:
        problems = [problem for path in files if (problem := content_problem(path, platform.digests()))]
    if problems:
        yield fail("weights", f"{folder}: {'; '.join(problems[:3])}", "download the model again: hf download")
        return
    size = bytes_in_words(sum(path.stat().st_size for path in files))
    yield ok("weights", f"{len(files)} files, {size}, complete in {folder}{' with the right hashes' if verify else ''}")


def check_teacher(recipe: Recipe, platform: Platform) -> Iterator[Finding]:
    """That what the recipe asks of the teacher is there: its tokenizer, the blocks, k ids; by its small files alone.

    A job would say it, too: after its time in the queue, and after the weights are loaded.
    """
    try:
        folder = teacher_folder(recipe, platform)
    except MissingInputError:
        return  # `weights` says it
    tokenizer_fingerprint(folder, None)  # raises where there is none
    try:
        shape = teacher_shape(folder)
    except InputError as e:  # a configuration of another form; the job asks the loaded model
        yield warn("teacher", str(e))
        return
    said = f"{shape.n_blocks} blocks, a head of {shape.vocabulary:,} ids"
    topk, states = recipe.topk, recipe.hidden_states
    problems = []
    if states is not None and (beyond := [b for b in states.blocks if b >= shape.n_blocks]):
        blocks = ", ".join(map(str, beyond))
        problems.append(f"hidden_states.blocks has {blocks}, and the teacher has blocks 0 to {shape.n_blocks - 1}")
    if topk is not None and topk.k > shape.vocabulary:
        problems.append(f"topk.k is {topk.k:,}, and its head has {shape.vocabulary:,} ids")
    for problem in problems:
        yield fail("teacher", f"{folder}: {problem}", "correct the recipe")
    if problems:
        return
    if topk is not None and topk.vocabulary is None and topk.token_ids is None and recipe.exports:
        n_tokens = 1 + max(token_table(folder), default=-1)
        if n_tokens < shape.vocabulary:
            yield warn(
                "teacher",
                f"{said}, and a tokenizer of {n_tokens:,}: exports refuse a top-k that holds an id beyond those",
                "set `vocabulary: tokenizer` in caches.topk before caches are made",
            )
            return
    yield ok("teacher", said)


def header_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file by its header and its length; None: nothing."""
    try:
        stored_tensors(path)
    except InputError as e:
        return str(e)
    return None


def content_problem(path: Path, digests: DigestCache) -> str | None:
    """What is wrong with the bytes of a file, by what is known of their hash; None: nothing, or nothing was known."""
    known = known_sha256(path, digests)
    found = hashed_sha256(path, None if known else digests)
    if known in (None, found):
        return None
    return f"{path.name} is damaged: its SHA-256 is {found[:16]}, and was to be {str(known)[:16]}"

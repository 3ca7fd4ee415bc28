"""What `worth` learns from: the demo's corpus in two halves that share no passage, its teacher, and caches of one half.

Everything is made by the code of production: the plan, the jobs `shards` and `teacher` that the planner asks for, run
by their runners in this process, and committed results, which are found again in `folder` and made once. The passages
that are held out are those that the teacher was not trained on either.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from kd_assets.contract import Asset, HiddenStateParams, Reporter, StateCodec, TopkParams
from kd_assets.demo.corpus import CHATS_FILE, DOCUMENTS_FILE, LICENCE, write_corpus
from kd_assets.demo.teacher import make_teacher
from kd_assets.demo.tokenizer import is_held_out
from kd_assets.demo.training import TrainingPlan
from kd_assets.durable import atomic_write
from kd_assets.model_files.digests import DigestCache
from kd_assets.orchestration.planning.planned_work import PlannedWork
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.recipes.recipe import SHARDS_MANIFEST, Recipe, Source, TeacherSettings
from kd_assets.sources.spec import Sharding, SourceSpec
from kd_assets.store import read_manifest
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import runner_for

MAX_LENGTH = 512
DOCUMENTS_PER_SHARD = 90
BLOCK = 3
"""Of the demo teacher's six, as its recipe keeps it."""
BYTES_OF_AN_ID = 4
"""Of `input_ids` in a part of states, which is not compressed."""

CacheParams = TopkParams | HiddenStateParams


def topk_caches() -> dict[str, TopkParams]:
    """Name → parameters of every top-k cache. Draws stand beside a top 1, the least that a cache holds."""
    caches: dict[str, TopkParams] = {}
    for codec in ("compact", "plain"):
        for k in (4, 16, 50):
            caches[f"top-{k} {codec}"] = TopkParams(k=k, max_length=MAX_LENGTH, codec=codec)
        for draws in (12, 25, 50):
            caches[f"{draws} draws {codec}"] = TopkParams(k=1, max_length=MAX_LENGTH, draws=draws, codec=codec)
        for top_p in RAGGED if ragged_is_there() else ():
            params = dataclasses.asdict(caches[f"top-50 {codec}"]) | {"top_p": top_p}
            names = [f.name for f in dataclasses.fields(TopkParams) if f.name != "positions"]
            caches[f"top-p {top_p} {codec}"] = TopkParams(**{name: params[name] for name in names})
    return caches


RAGGED = (0.8, 0.95)
"""Masses that are kept of each position, in 50 ids at most."""


def ragged_is_there() -> bool:
    """Whether recipes of this tree know `top_p`."""
    return "top_p" in {f.name for f in dataclasses.fields(TopkParams)}


def state_caches() -> dict[str, HiddenStateParams]:
    codecs: tuple[StateCodec, ...] = ("raw", "split", "fp8", "int8_128")
    return {f"states {c}": HiddenStateParams(blocks=(BLOCK,), max_length=MAX_LENGTH, codec=c) for c in codecs}


@dataclass(frozen=True, kw_only=True, slots=True)
class Materials:
    """What lies on disk once `make_materials` is through."""

    teacher_folder: Path
    teacher_held_out_loss: float
    """Of the whole held-out text, questions of chats too: as the teacher's training measured it."""
    held_out: tuple[Path, ...]
    """Committed shards."""
    caches: Mapping[str, tuple[Path, ...]]
    """Name → the committed results of the training documents' shards."""

    def asset_of(self, cache: str) -> Asset:
        return "hidden_state_cache" if cache.startswith("states") else "topk_cache"

    def bytes_per_token(self, cache: str) -> float:
        """Of the part files, all but what their column `input_ids` takes, which is the same in every cache."""
        manifests = [read_manifest(folder) for folder in self.caches[cache]]
        paths = [folder / p.name for folder, m in zip(self.caches[cache], manifests, strict=True) for p in m.parts]
        return sum(map(bytes_beside_ids, paths)) / sum(m.n_tokens for m in manifests)


def make_materials(
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    plan: TrainingPlan | None = None,
    max_documents: int | None = None,
    max_seconds: float = 3600.0,
) -> Materials:
    """Make in `folder` what is not there yet. `names`: of caches, all without it; `plan`: of the teacher's training;
    `max_documents`: of each half; `max_seconds`: of the training, the longest that it may take."""
    corpus, teacher_folder = folder / "corpus", folder / "teacher"
    write_corpus(corpus)
    plan = plan or TrainingPlan()
    summary, _ = make_teacher(corpus, teacher_folder, plan=plan, max_seconds=max_seconds)
    for half, is_held in (("train", False), ("held_out", True)):
        write_half(corpus, folder / half, is_held=is_held, one_in=plan.held_out_one_in)
    train = recipe_of("train", folder, max_documents)
    held_out = Deployment(recipe_of("held_out", folder, max_documents), folder)
    Deployment(train, folder).shards()
    topk, states = topk_caches(), state_caches()
    wanted = [name for name in (*topk, *states) if names is None or name in names]
    caches: dict[str, tuple[Path, ...]] = {}
    # One pass feeds a top-k and a hidden-state cache.
    of_topk, of_states = [n for n in wanted if n in topk], [n for n in wanted if n in states]
    for of_pass in itertools.zip_longest(of_topk, of_states):
        recipe = dataclasses.replace(
            train, topk=topk.get(of_pass[0] or ""), hidden_states=states.get(of_pass[1] or ""), embeddings=None
        )
        made = Deployment(recipe, folder).caches()
        for name, asset in zip(of_pass, ("topk_cache", "hidden_state_cache"), strict=True):
            if name is not None:
                caches[name] = made[asset]
    return Materials(
        teacher_folder=teacher_folder,
        teacher_held_out_loss=summary.held_out_loss,
        held_out=held_out.shards(),
        caches=caches,
    )


def write_half(corpus: Path, folder: Path, *, is_held: bool, one_in: int) -> None:
    """The documents and chats whose passages are held out, or those whose are not."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DOCUMENTS_FILE, CHATS_FILE):
        lines = (corpus / name).read_bytes().splitlines(keepends=True)
        kept = b"".join(line for line in lines if is_held_out(json.loads(line)["id"], one_in=one_in) == is_held)
        if not (folder / name).is_file() or (folder / name).read_bytes() != kept:
            atomic_write(folder / name, kept)


def recipe_of(half: str, folder: Path, max_documents: int | None) -> Recipe:
    sources = [
        SourceSpec(name=name.partition(".")[0], path=str(folder / half / name), licence=LICENCE)
        for name in (DOCUMENTS_FILE, CHATS_FILE)
    ]
    return Recipe(
        name=half,
        sources=tuple(Source(spec=spec) for spec in sources),
        teacher=TeacherSettings(model=str(folder / "teacher"), dtype="float32", token_budget=4096),
        topk=TopkParams(k=16, max_length=MAX_LENGTH),
        sharding=Sharding(documents_per_shard=DOCUMENTS_PER_SHARD, max_documents=max_documents),
    )


class Deployment:
    """One recipe in a folder: its planner, and its jobs run in this process by the worker's own runners."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        digests = DigestCache(folder / "digests.json")
        self._planner = Planner(recipe, folder / "store" / recipe.name, digests, {"KD_HOME": str(folder)})

    def shards(self) -> tuple[Path, ...]:
        """The folders of the committed shards, of a plan that is made here."""
        work = self._planner.shards_work(self._planner.make_plan().keys)
        return self._made(work)[SHARDS_MANIFEST]

    def caches(self) -> dict[str, tuple[Path, ...]]:
        """Cache → the folders of the committed results, of the plan that is current."""
        keys = self._planner.current_plan().keys
        return self._made(self._planner.teacher_work(keys, self._recipe.caches))

    def _made(self, work: PlannedWork) -> dict[str, tuple[Path, ...]]:
        missing = work.survey().missing
        if missing.units:
            job = self._planner.job_file(
                missing,
                key=f"worth-{work.kind}",
                tasks=(tuple(range(len(missing.units))),),
                events_folder=self._folder / "events",
                token_budget=None,
                provenance={},
            )
            runner = runner_for(job, Reporter(None, stream=io.StringIO()), StopFlag(), environment={})
            try:
                for unit in missing.units:
                    runner.run(unit)
            finally:
                runner.close()
        outputs = [output for unit in work.units for output in unit.outputs]
        return {str(a): tuple(Path(o.path) for o in outputs if o.asset == a) for a in {o.asset for o in outputs}}


def bytes_beside_ids(path: Path) -> int:
    """Of a part file, but for its column `input_ids`."""
    n_bytes = path.stat().st_size
    if path.suffix != ".parquet":
        return n_bytes - BYTES_OF_AN_ID * n_tokens_of(path)
    return n_bytes - sum(size for name, size in column_sizes(path) if name.startswith("input_ids"))


def column_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """(column, bytes as they lie in the file) of every column of every group of a Parquet file."""
    metadata = pq.read_metadata(path)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(metadata.num_columns)):
            yield column.path_in_schema, column.total_compressed_size


def n_tokens_of(path: Path) -> int:
    """Of the part's record in its manifest."""
    return next(part.n_tokens for part in read_manifest(path.parent).parts if part.name == path.name)

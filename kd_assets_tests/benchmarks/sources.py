"""What it costs to plan sources and to make shards of them.

    python -m kd_assets_tests.benchmarks.sources --json [--only NAME]

`tokenise_ratio`: a shard built, over the tokenizer's own batch calls on the same texts. `chat_ratio`: the same of chats
under the prefix rule, over rendering and tokenising them once with the library. `late_shard_cost_ratio`: reading the
last shard of a file over reading its first, by format. In each of these what is compared alternates in one process, and
figures are medians. `peak_rss_growth_mb`: the peak of planning a file and building its first shard, in a process of its
own, at the large size less that at the small one. `plan_100k_…` and `run_reads_plan_s`: a plan of so many shards made
and written, and then one partition's work found in it, each in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.contract import JobFile, Reporter, ShardsParams, WorkUnit
from kd_assets.model_files.fingerprints import tokenizer_fingerprint
from kd_assets.sources.planning.make import plan_shards
from kd_assets.sources.planning.plan import PlannedShard, ShardPlan
from kd_assets.sources.range_hash import ShardHash
from kd_assets.sources.records import read_records
from kd_assets.sources.shards import ShardsRunner
from kd_assets.sources.spec import Sharding, SourceSpec
from kd_assets.store import plan_output
from kd_assets.worker.stop_flag import StopFlag

WANTED = {
    "tokenise_ratio": ">= 0.8",
    "chat_ratio": ">= 0.6",
    "peak_rss_growth_mb": "<= 50",
    "plan_100k_shards_s": "<= 60",
    "plan_100k_rss_mb": "<= 300",
    "run_reads_plan_s": "<= 0.5",
    "late_shard_cost_ratio": "<= 1.2 each",
}
SENTENCE = "Offline distillation reads each document once with the teacher, and many times with the student. "


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    rounds: int = 5
    documents: int = 2000
    chats: int = 1000
    late_mb: int = 60
    small_mb: int = 100
    large_mb: int = 1000
    shards: int = 100_000


TINY = Sizes(rounds=1, documents=40, chats=20, late_mb=1, small_mb=1, large_mb=2, shards=1500)


# ---------------------------------------------------------------------------------------------------------- inputs


def texts(n: int) -> Iterator[str]:
    """About 2 KB each, no two alike."""
    return (f"Document {i}. " + SENTENCE * (8 + i * 7 % 25) + f"The end of {i * 7919}." for i in range(n))


def write_jsonl(path: Path, records: Iterator[dict[str, Any]]) -> Path:
    with path.open("w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)
    return path


def chats(n: int) -> Iterator[dict[str, Any]]:
    for i, text in enumerate(texts(n)):
        turns = [{"role": "system", "content": "Be brief."}]
        for turn in range(3):
            turns += [
                {"role": "user", "content": f"Question {turn} of {i}?"},
                {"role": "assistant", "content": text[turn * 300 : (turn + 1) * 300]},
            ]
        yield {"messages": turns}


def make_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of a few thousand words, with a template without generation marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = Path(json.__file__).parent.parent
    tokenizer.train_from_iterator([p.read_text(errors="replace") for p in sorted(source.glob("[a-d]*.py"))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)
    return folder


def planned(path: Path, *, documents_per_shard: int, **changes: Any) -> ShardPlan:
    spec = SourceSpec(name="web", path=str(path), licence="CC0-1.0", **changes)
    folder = path.parent / "seekable"
    return plan_shards(
        [spec], Sharding(documents_per_shard=documents_per_shard), shard_prefix="bench", seekable_folder=folder
    )


class Building:
    """The first shard of a file, built as a job builds it, each time anew."""

    def __init__(self, folder: Path, source: Path, tokenizer: Path, *, documents_per_shard: int = 10**6) -> None:
        self._shard = next(iter(planned(source, documents_per_shard=documents_per_shard)))
        self._recipe_folder, self._n = folder / "store" / "bench", 0
        self._recipe_folder.mkdir(parents=True)
        params = ShardsParams(
            tokenizer=str(tokenizer), tokenizer_fingerprint=tokenizer_fingerprint(tokenizer, None), max_length=4096
        )
        job = JobFile(
            kind="shards",
            recipe="bench",
            key="k",
            recipe_folder=str(self._recipe_folder),
            events_folder=str(folder / "events"),
            tasks=((0,),),
            units=(self._unit(),),
            shards=params,
            provenance={},
        )
        self._runner = ShardsRunner(job, Reporter(None, stream=io.StringIO()), StopFlag())

    def _unit(self) -> WorkUnit:
        self._n += 1
        key = self._shard.partition_key
        identity = {"built": self._n, "input": self._shard.input_hash}
        out = plan_output("shards_manifest", identity, recipe_folder=self._recipe_folder, partition_key=key)
        return WorkUnit(partition_key=key, records=self._shard.records, outputs=(out,))

    def build(self) -> None:
        self._runner.run(self._unit())


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(rounds: int, bare: Callable[[], object], ours: Callable[[], object]) -> dict[str, Any]:
    """The speed of `ours` over that of `bare`, in turns after one of each that is not counted."""
    bare(), ours()
    pairs = [(timed(bare), timed(ours)) for _ in range(rounds)]
    return {
        "ratio": round(statistics.median(b / o for b, o in pairs), 3),
        "bare_s": round(statistics.median(b for b, _ in pairs), 3),
        "ours_s": round(statistics.median(o for _, o in pairs), 3),
    }


# ---------------------------------------------------------------------------------------------------------- figures


def tokenise_ratio(folder: Path, sizes: Sizes) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer_folder = make_tokenizer(folder / "tokenizer")
    source = write_jsonl(folder / "texts.jsonl", ({"text": text} for text in texts(sizes.documents)))
    building, tokenizer = Building(folder, source, tokenizer_folder), AutoTokenizer.from_pretrained(tokenizer_folder)
    all_texts = list(texts(sizes.documents))

    def bare() -> None:
        for at in range(0, len(all_texts), 512):
            tokenizer(all_texts[at : at + 512], verbose=False)

    found = ratio(sizes.rounds, bare, building.build)
    return {"tokenise_ratio": found.pop("ratio"), "tokenise": found}


def chat_ratio(folder: Path, sizes: Sizes) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer_folder = make_tokenizer(folder / "tokenizer")
    records = list(chats(sizes.chats))
    source = write_jsonl(folder / "chats.jsonl", iter(records))
    building, tokenizer = Building(folder, source, tokenizer_folder), AutoTokenizer.from_pretrained(tokenizer_folder)

    def bare() -> None:
        for at in range(0, len(records), 512):
            batch = [record["messages"] for record in records[at : at + 512]]
            rendered = tokenizer.apply_chat_template(batch, tokenize=False)
            tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)

    found = ratio(sizes.rounds, bare, building.build)
    return {"chat_ratio": found.pop("ratio"), "chat": found}


def late_shard_cost_ratio(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Reading records alone: what comes after is the same for every shard."""
    n = max(sizes.late_mb * 500, 40)
    plain = write_jsonl(folder / "late.jsonl", ({"text": text} for text in texts(n)))
    zst, parquet = folder / "late.jsonl.zst", folder / "late.parquet"
    with pa.CompressedOutputStream(str(zst), "zstd") as f:
        f.write(plain.read_bytes())
    pq.write_table(pa.table({"text": list(texts(n))}), parquet, row_group_size=500)
    ratios: dict[str, float] = {}
    for path in (plain, zst, parquet):
        shards = planned(path, documents_per_shard=n // 40).shards
        first, last = shards[0], shards[39]
        read_shard(first)
        read_shard(last)
        pairs = [(timed(lambda: read_shard(first)), timed(lambda: read_shard(last))) for _ in range(4 * sizes.rounds)]  # noqa: B023
        a_record = first.n_records / last.n_records
        ratios[path.name.removeprefix("late.")] = round(statistics.median(b / a for a, b in pairs) * a_record, 3)
    return {"late_shard_cost_ratio": ratios}


def read_shard(shard: PlannedShard) -> None:
    for _ in read_records(shard.records, ShardHash()):
        pass


def peak_rss_growth_mb(folder: Path, sizes: Sizes) -> dict[str, Any]:
    tokenizer = make_tokenizer(folder / "tokenizer")
    block = "".join(json.dumps({"text": text}) + "\n" for text in texts(500))
    peaks = {}
    for mb in (sizes.small_mb, sizes.large_mb):
        path = folder / f"{mb}.jsonl"
        with path.open("w") as f:
            for _ in range(mb * 1_000_000 // len(block) + 1):
                f.write(block)
        peaks[mb] = child("build", str(path), str(tokenizer))["peak_rss_mb"]
        path.unlink()
    growth = peaks[sizes.large_mb] - peaks[sizes.small_mb]
    return {"peak_rss_growth_mb": round(growth, 1), "peak_rss_mb": {f"{mb} MB": peaks[mb] for mb in peaks}}


def plan_100k(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """20 files of Parquet, 100 documents a shard; planned from footers."""
    tokenizer = make_tokenizer(folder / "home" / "tokenizer")
    assert tokenizer.is_dir()
    source = folder / "home" / "texts"
    source.mkdir()
    rows = sizes.shards * 100 // 20
    table = pa.table({"text": ["a text of some words"] * rows})
    pq.write_table(table, source / "00.parquet", row_group_size=10_000, compression="none", use_dictionary=False)
    for i in range(1, 20):
        (source / f"{i:02d}.parquet").hardlink_to(source / "00.parquet")
    made, read = child("plan", str(folder / "home")), child("read", str(folder / "home"))
    assert made["n_shards"] == read["n_shards"] == sizes.shards
    return {
        "n_shards": made["n_shards"],
        "plan_100k_shards_s": made["seconds"],
        "plan_100k_rss_mb": made["peak_rss_mb"],
        "plan_100k_rss_mb_before": made["rss_mb_before"],
        "run_reads_plan_s": read["seconds"],
    }


FIGURES: dict[str, Callable[[Path, Sizes], dict[str, Any]]] = {
    "tokenise_ratio": tokenise_ratio,
    "chat_ratio": chat_ratio,
    "late_shard_cost_ratio": late_shard_cost_ratio,
    "peak_rss_growth_mb": peak_rss_growth_mb,
    "plan_100k": plan_100k,
}

# ---------------------------------------------------------------------------------------------------------- children


def child(*words: str) -> dict[str, Any]:
    """What a process of its own measured."""
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name if __spec__ else __name__, "--child", *words]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def peak_rss_mb() -> float:
    """(Not by getrusage(2), whose peak a process inherits from the one that started it.)"""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6, 1)


def child_build(path: str, tokenizer: str) -> dict[str, Any]:
    source = Path(path)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        Building(Path(folder), source, Path(tokenizer), documents_per_shard=1000).build()
    return {"peak_rss_mb": peak_rss_mb()}


def planner_at(home: str) -> Any:
    from kd_assets.components import TeacherCaches
    from kd_assets.orchestration.materialize import planner_of
    from kd_assets.orchestration.platform import Platform

    attributes: dict[str, Any] = {
        "recipe": "bench",
        "sources": [{"name": "web", "path": "texts", "licence": "CC0-1.0"}],
        "documents_per_shard": 100,
        "teacher": {"model_id": "$KD_HOME/tokenizer"},
        "caches": {"topk": {"k": 4, "max_length": 64}},
    }
    recipe = TeacherCaches(**attributes).to_recipe()
    return planner_of(recipe, Platform(home=home))


def child_plan(home: str) -> dict[str, Any]:
    planner, before = planner_at(home), peak_rss_mb()
    seconds = timed(planner.make_plan)
    return {
        "seconds": round(seconds, 2),
        "rss_mb_before": before,
        "peak_rss_mb": peak_rss_mb(),
        "n_shards": planner.current_plan().n_shards,
    }


def child_read(home: str) -> dict[str, Any]:
    planner = planner_at(home)
    last = planner_at(home).current_plan().keys[-1]
    seconds = timed(lambda: planner.current_plan() and planner.shards_work([last]))
    return {"seconds": round(seconds, 3), "n_shards": planner.current_plan().n_shards}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {"build": child_build, "plan": child_plan, "read": child_read}

# -------------------------------------------------------------------------------------------------------------- main


def measure(names: Sequence[str], sizes: Sizes, folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as own:
            figures |= FIGURES[name](Path(own), sizes)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", choices=FIGURES, help="one of the measurements")
    parser.add_argument("--tiny", action="store_true", help="very small, once: to see that it runs")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *words = options.child
        print(json.dumps(CHILDREN[name](*words)))
        return
    names = [options.only] if options.only else list(FIGURES)
    with tempfile.TemporaryDirectory(prefix="kd-assets-sources-", dir=options.folder) as folder:
        figures = measure(names, TINY if options.tiny else Sizes(), Path(folder))
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name}: {value}" + (f" (wanted {WANTED[name]})" if name in WANTED else ""))


if __name__ == "__main__":
    main()

"""What a byte of a cache teaches: students of the demo's corpus, online and from caches of every kind.

    python -m kd_assets_tests.benchmarks.worth --json --folder DIR [--markdown] [--picture kd_assets/cards/worth.svg]

One teacher (the demo's), one small student, equal first weights, batches and steps for all: what differs is what the
student learns from.

- `online`: the teacher's whole distribution; `no teacher`: cross-entropy with the documents' own tokens;
- from a top-k cache, with what the ids outside of the k are: one bucket, the target (the rest is put on the true
  token) or nothing (the k are renormalised); with `top-p` the k differ from position to position;
- from random draws, which lie beside a top 1;
- with hidden states of one block besides, through a projector.

`loss`: cross-entropy on held-out documents, nats a token; `kl`: of the teacher's whole distribution from the student's,
on the same tokens; `ece`: the calibration error (`worth_students.calibration_error`); each the mean over seeds.
`loss_spread`: the largest less the smallest loss of a seed; `ratio`: of the loss to the online student's, seed by seed,
with its own spread. `bytes_per_token`: of the part files of the caches that a student reads, without their column
`input_ids`.

Where two codecs give readers the same numbers (draws of `plain` and `compact`, states of `raw` and `split`) one
training stands for both, once the numbers have been compared.

What is done lies in DIR (`results.jsonl`, caches, teacher): the same command goes on after a kill, and a process for
each of `--seeds` may run at the same time. All of it takes about half an hour on two quiet cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# As slurm/task.sbatch sets it, and before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from kd_assets.contract import Asset
from kd_assets.demo.training import TrainingPlan, bfloat16_is_faster
from kd_assets.store import CacheReader, Ragged, fingerprint
from kd_assets_tests.benchmarks.worth_caches import RAGGED, Materials, make_materials, ragged_is_there
from kd_assets_tests.benchmarks.worth_students import HeldOut, Loss, Setting, Teacher, trained_quality

RESULTS_FILE = "results.jsonl"
SEEDS = (0, 1, 2)
FIRST_CACHE = "top-4 compact"
AFFORDABLE_BYTES = 40
"""A token: among the caches that take no more the best one is looked for."""
QUICK_PLAN = TrainingPlan(vocabulary=512, hidden_size=64, n_blocks=4, steps=3, batch_sequences=2, sequence_tokens=64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What a student learns from."""

    name: str
    loss: Loss
    caches: tuple[str, ...] = ()
    """Names of caches. None of `online` and `no teacher`: then `FIRST_CACHE` says which documents there are."""
    as_of: str | None = None
    """The variant whose caches hold the same numbers in another codec."""


def variants() -> tuple[Variant, ...]:
    """All, in the order in which they are tried: what the question is about comes first."""
    losses: tuple[Loss, ...] = ("bucket", "target", "renormalised")
    sizes = ["top-4", "top-16", "top-50", *(f"top-p {p}" for p in RAGGED if ragged_is_there())]
    coded = [
        Variant(name=f"{size} {codec}, {loss}", loss=loss, caches=(f"{size} {codec}",))
        for codec in ("compact", "plain")
        for loss in losses
        for size in sizes
        if loss == "bucket" or not size.startswith("top-p")
    ]
    draws = [Variant(name=f"{n} draws compact", loss="draws", caches=(f"{n} draws compact",)) for n in (12, 25, 50)]
    same_draws = [
        Variant(
            name=v.name.replace("compact", "plain"),
            loss="draws",
            caches=(f"{v.name.split()[0]} draws plain",),
            as_of=v.name,
        )
        for v in draws
    ]
    base = "top-16 compact"
    states = [
        Variant(
            name=f"{base}, bucket, with states {codec}",
            loss="bucket",
            caches=(base, f"states {codec}"),
            as_of=f"{base}, bucket, with states raw" if codec == "split" else None,
        )
        for codec in ("raw", "split", "fp8", "int8_128")
    ]
    ends = [Variant(name="online", loss="online"), Variant(name="no teacher", loss="cross_entropy")]
    n_first = sum(" compact" in v.name for v in coded)
    return (*ends, *draws, *same_draws, *coded[:n_first], *states, *coded[n_first:])


QUICK = ("online", "no teacher", "top-4 compact, bucket")


class Bench:
    """The trainings in a folder: those that are done, and the rest."""

    def __init__(self, folder: Path, *, setting: Setting, quick: bool) -> None:
        self.setting = setting
        self._folder, self._quick = folder, quick
        self.variants = tuple(v for v in variants() if not quick or v.name in QUICK)
        self.setting_hash = fingerprint({**dataclasses.asdict(setting), "quick": quick})[:12]

    @cached_property
    def materials(self) -> Materials:
        names = {FIRST_CACHE, *(cache for v in self.variants for cache in v.caches)}
        if self._quick:
            return make_materials(self._folder, names=tuple(names), plan=QUICK_PLAN, max_documents=24)
        return make_materials(self._folder, names=tuple(names))

    @cached_property
    def _teacher(self) -> Teacher:
        return Teacher(self.materials.teacher_folder)

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut(self.materials.held_out, self._teacher)

    def results(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(variant, seed) → what was measured with this setting."""
        path = self._folder / RESULTS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may leave half of a line
        return {(r["variant"], r["seed"]): r for r in found if r["setting"] == self.setting_hash}

    def run(self, seeds: Sequence[int]) -> None:
        """Do what is missing, a line of results each."""
        for seed in seeds:
            for variant in self.variants:
                if variant.as_of is None and (variant.name, seed) not in self.results():
                    self._train(variant, seed)

    def _train(self, variant: Variant, seed: int) -> None:
        caches = self._folders(variant.caches or (FIRST_CACHE,))
        quality, cpu_s = trained_quality(
            caches, variant.loss, self._teacher, self.held_out, setting=self.setting, seed=seed
        )
        result = {"variant": variant.name, "seed": seed, "setting": self.setting_hash, **dataclasses.asdict(quality)}
        with (self._folder / RESULTS_FILE).open("a") as file:
            file.write(json.dumps(result | {"cpu_s": round(cpu_s, 1)}) + "\n")
        print(f"seed {seed}, {variant.name}: loss {quality.loss:.4f}, {cpu_s:.0f} s", file=sys.stderr, flush=True)

    def _folders(self, names: Sequence[str]) -> dict[Asset, tuple[Path, ...]]:
        return {self.materials.asset_of(name): self.materials.caches[name] for name in names}

    def only_done(self, seeds: Sequence[int]) -> tuple[str, ...]:
        """Leave out the variants that lack a training of one of the seeds; their names."""
        results = self.results()
        done = {v for v in self.variants if all((v.as_of or v.name, seed) in results for seed in seeds)}
        missing = tuple(v.name for v in self.variants if v not in done)
        self.variants = tuple(v for v in self.variants if v in done)
        return missing

    def figures(self, seeds: Sequence[int]) -> dict[str, Any]:
        """All that `main` prints. Raises KeyError where a training is missing."""
        results = self.results()
        by_name: dict[str, dict[str, Any]] = {}
        for variant in self.variants:
            if variant.as_of is not None:
                self._require_same(variant, next(v for v in self.variants if v.name == variant.as_of))
            of_seeds = [results[variant.as_of or variant.name, seed] for seed in seeds]
            by_name[variant.name] = summary(of_seeds, [results["online", seed] for seed in seeds]) | {
                "bytes_per_token": round(sum(map(self.materials.bytes_per_token, variant.caches)), 2),
                "trained_as": variant.as_of or variant.name,
            }
        online, alone = by_name["online"], by_name["no teacher"]
        offline = {v.name: by_name[v.name] for v in self.variants if v.caches}
        affordable = {n: f for n, f in offline.items() if f["bytes_per_token"] <= AFFORDABLE_BYTES}
        best = min(affordable, key=lambda name: affordable[name]["loss"])
        enough = [name for name, f in affordable.items() if f["ratio"] <= 1.01]
        smallest = min(enough, key=lambda name: affordable[name]["bytes_per_token"], default=None)
        return {
            "online_loss": online["loss"],
            "no_teacher_loss": alone["loss"],
            "best_offline": best,
            "best_offline_loss_ratio": affordable[best]["ratio"],
            "best_offline_bytes_per_token": affordable[best]["bytes_per_token"],
            "smallest_within_a_hundredth": smallest,
            "teacher": {n: round(x, 4) for n, x in dataclasses.asdict(self.held_out.quality_of_teacher()).items()},
            "n_held_out_documents": self.held_out.n_documents,
            "n_held_out_tokens": self.held_out.n_tokens,
            "setting": dataclasses.asdict(self.setting),
            "seeds": list(seeds),
            "precision": "bfloat16" if bfloat16_is_faster() else "float32",
            "cpu_s_a_training": round(statistics.median(r["cpu_s"] for r in results.values()), 1),
            "variants": by_name,
        }

    def _require_same(self, variant: Variant, other: Variant) -> None:
        """Raise ValueError unless the two variants' caches hold the same numbers, field by field."""
        for name, of_other in zip(variant.caches, other.caches, strict=True):
            readers = [CacheReader.from_folders(self.materials.caches[n]) for n in (name, of_other)]
            for i in range(len(readers[0])):
                documents = [reader[i] for reader in readers]
                for field in ("input_ids", *taught_by(documents[0])):
                    if not equal(*(document[field] for document in documents)):
                        raise ValueError(f"{name} and {of_other} differ in {field} of document {i}")


def taught_by(document: Mapping[str, Any]) -> Iterator[str]:
    """The fields that a student of draws or of states learns from."""
    return (name for name in document if name.startswith(("sampled_", "hidden_block_")))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Ragged):
        return np.array_equal(a.values, b.values) and np.array_equal(a.lengths, b.lengths)
    return np.array_equal(a, b)


def summary(of_seeds: Sequence[Mapping[str, Any]], online: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; ratios are taken within a seed, where first weights and batches are the same."""
    ratios = [a["loss"] / b["loss"] for a, b in zip(of_seeds, online, strict=True)]
    losses = [r["loss"] for r in of_seeds]
    return {
        "loss": round(statistics.fmean(losses), 4),
        "loss_spread": round(max(losses) - min(losses), 4),
        "ratio": round(statistics.fmean(ratios), 4),
        "ratio_spread": round(max(ratios) - min(ratios), 4),
        "kl": round(statistics.fmean(r["kl"] for r in of_seeds), 4),
        "ece": round(statistics.fmean(r["ece"] for r in of_seeds), 4),
    }


def markdown(figures: Mapping[str, Any]) -> str:
    """The table, by bytes a token. A cache in both codecs is one row: its students learn from the same numbers, but for
    the rounding of `compact`, whose student is the one that is shown."""
    variants, teacher = figures["variants"], figures["teacher"]
    rows = [
        "| what it learns from | bytes a token (`plain`) | held-out loss | over online | KL | calibration error |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in sorted(variants.items(), key=lambda item: (item[1]["bytes_per_token"], item[1]["loss"])):
        if " plain" in name and name.replace(" plain", " compact") in variants:
            continue
        size = f"{f['bytes_per_token']:,.1f}" if f["bytes_per_token"] else "–"
        plain = variants.get(name.replace(" compact", " plain"), f)
        if plain is not f:
            size += f" ({plain['bytes_per_token']:,.1f})"
        ratio = f"{f['ratio']:.3f} ± {f['ratio_spread'] / 2:.3f}"
        source = name.replace(" compact", "")
        rows.append(f"| {source} | {size} | {f['loss']:.3f} | {ratio} | {f['kl']:.3f} | {f['ece']:.3f} |")
    rows.append(f"| (the teacher itself) | – | {teacher['loss']:.3f} | | 0 | {teacher['ece']:.3f} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--markdown", action="store_true", help="the table")
    parser.add_argument("--picture", type=Path, help="where to draw loss against bytes a token, an SVG")
    parser.add_argument("--folder", type=Path, help="keeps caches and results; goes on with what is there")
    parser.add_argument("--only-done", action="store_true", help="train nothing more; what lacks a seed is left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="hardly trained, three variants, one seed: does it run?")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = options.seeds[:1] if options.quick else options.seeds
    setting = Setting(steps=3, row_tokens=512, hidden_size=32, n_layers=1) if options.quick else Setting()
    with tempfile.TemporaryDirectory(prefix="kd-assets-worth-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, setting=setting, quick=options.quick)
        missing: tuple[str, ...] = ()
        if options.only_done:
            missing = bench.only_done(seeds)
        else:
            bench.run(seeds)
        figures = bench.figures(seeds) | {"missing": list(missing)}
    if options.picture is not None:
        from kd_assets_tests.benchmarks.worth_picture import draw

        draw(figures, options.picture)
    if options.markdown or not options.json:
        print(markdown(figures))
    if options.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

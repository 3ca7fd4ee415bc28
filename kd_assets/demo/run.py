"""`make demo`: the demo recipe from nothing to a trained student, as Dagster materializations, and a table at the end.

It does what a user would do by hand: `dagster job execute` of the inputs, of the plan, of the caches of all shards,
and of the student.   python -m kd_assets.demo.run
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import dagster as dg

from kd_assets.components import load_recipe
from kd_assets.contract import CACHES, Asset, Event, read_events
from kd_assets.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    place_in_code_location,
)
from kd_assets.orchestration.card_asset import CACHE_CARD
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.platform import PROJECT_FOLDER, Platform
from kd_assets.recipes.recipe import Recipe
from kd_assets.store import Manifest, read_manifest

CODE_LOCATION, DEFINITIONS_MODULE = "kd_assets", "kd_assets.definitions"
"""As workspace.yaml has them."""
DAGSTER = [sys.executable, "-m", "dagster"]


@dataclass(slots=True)
class Display:
    """One line a step on a terminal, rewritten as it goes; elsewhere a line every few seconds."""

    stream: IO[str] = field(default_factory=lambda: sys.stdout)
    quiet_s: float = 5.0
    _last: float = 0.0
    _width: int = 0

    def update(self, text: str, *, final: bool = False) -> None:
        now, is_terminal = time.monotonic(), self.stream.isatty()
        if not final and now - self._last < (0.2 if is_terminal else self.quiet_s):
            return
        self._last = now
        if is_terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            self.stream.write("\r" + text.ljust(self._width) + ("\n" if final else ""))
            self._width = 0 if final else len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


class RunProgress:
    """What a run of ours says while it goes, from the lines of its log."""

    def __init__(self, title: str, display: Display, n_expected: int | None = None) -> None:
        """`n_expected`: materializations; None for a run over partitions, whose log says how far it is itself: those
        of partitions are stored together, and not printed."""
        self._title, self._display, self._n_expected = title, display, n_expected
        self._started = time.monotonic()
        self._n_materialized = 0
        self._latest = self._end = ""

    def read(self, line: str) -> None:
        if " - ASSET_MATERIALIZATION - " in line:
            # The card is made anew beside what was asked for.
            self._n_materialized += not line.rstrip().endswith(f" {CACHE_CARD}.")
        elif (found := re.search(r'\{"event": "progress".*\}', line)) is not None:
            step = json.loads(found[0])
            self._latest = f"training the teacher: step {step['step']} of {step['steps']}, loss {step['loss']:.2f}"
        elif (
            found := re.search(r" - (?:task \d+: )?(\w+: [\d,]+ of [\d,]+ shards.*|step .* loss .*)", line)
        ) is not None:
            self._latest = found[1]
        elif (found := re.search(r" - ([\d,]+ made, [\d,]+ reused, [\d,]+ failed), ", line)) is not None:
            self._end = found[1]
        self._display.update(self._text())

    def finish(self) -> None:
        self._latest = self._end
        self._display.update(self._text(), final=True)

    def _text(self) -> str:
        n = f"{self._n_materialized} of {self._n_expected} materialized, " if self._n_expected else ""
        latest = f" · {self._latest}" if self._latest else ""
        return f"{self._title}: {n}{time.monotonic() - self._started:.0f} s{latest}"


def run_job(
    job: str,
    *,
    title: str,
    display: Display,
    log: IO[str],
    tags: Mapping[str, str] | None = None,
    n_expected: int | None = None,
) -> None:
    """Run a job by `dagster job execute` and show its progress; ends this program with the log's tail when it fails."""
    command = [*DAGSTER, "job", "execute", "--module-name", DEFINITIONS_MODULE, "--job", job]
    if tags:
        command += ["--tags", json.dumps(dict(tags))]
    progress, lines = RunProgress(title, display, n_expected), []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=PROJECT_FOLDER
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            progress.read(line)
    progress.finish()
    show_on_home(job)
    if process.returncode != 0:
        failure = next((i for i, line in enumerate(lines) if "dagster.Failure" in line or "Failure:" in line), -30)
        print("".join(lines[failure:][:40]), file=sys.stderr)
        print(f"make demo failed in the job {job}; whole log: {log.name}", file=sys.stderr)
        raise SystemExit(1)


def show_on_home(job: str) -> None:
    """Have the web UI show the ended runs of a job on Home and under Jobs, as those that it launches itself: Dagster
    leaves out runs of the command line there, which do not know the code location that their job is in."""
    with dg.DagsterInstance.get() as instance:
        for run in instance.get_runs(dg.RunsFilter(job_name=job)):
            if run.remote_job_origin is None and run.is_finished:
                place_in_code_location(instance, run, module=DEFINITIONS_MODULE, location=CODE_LOCATION)


def prepare_instance(home: Path) -> None:
    """A Dagster instance in KD_HOME/dagster, with the checkout's dagster.yaml."""
    instance = Path(os.environ.get("DAGSTER_HOME") or home / "dagster").absolute()
    os.environ["DAGSTER_HOME"] = str(instance)
    instance.mkdir(parents=True, exist_ok=True)
    instance.chmod(instance.stat().st_mode & 0o7770)  # events and logs quote documents
    shutil.copyfile(PROJECT_FOLDER / "dagster.yaml", instance / "dagster.yaml")


def main() -> int:
    os.umask(0o027)
    started = time.time()
    platform = Platform.from_environment(PROJECT_FOLDER)
    os.environ["KD_HOME"] = platform.home
    prepare_instance(platform.home_folder)
    recipe = load_recipe("demo", PROJECT_FOLDER)
    display = Display()
    with (platform.home_folder / "demo.log").open("w") as log:
        run_job(f"{recipe.name}_inputs", title="[1/4] corpus, teacher", display=display, log=log, n_expected=2)
        run_job(f"{recipe.name}_plan", title="[2/4] shard plan", display=display, log=log, n_expected=1)
        keys = planner_of(recipe, platform).current_plan().keys
        run_job(
            f"{recipe.name}_caches",
            title="[3/4] shards, top-k, hidden states, embeddings",
            display=display,
            log=log,
            tags={ASSET_PARTITION_RANGE_START_TAG: keys[0], ASSET_PARTITION_RANGE_END_TAG: keys[-1]},
        )
        run_job(f"{recipe.name}_student", title="[4/4] student", display=display, log=log, n_expected=1)
    print(table(summary(recipe, platform, started)))
    return 0


def summary(recipe: Recipe, platform: Platform, started: float) -> list[tuple[str, str]]:
    """The table's rows, from the committed results and this demo's events."""
    planner = planner_of(recipe, platform)
    keys = planner.current_plan().keys
    units = planner.teacher_work(keys, recipe.caches).units
    manifests = {a: [read_manifest(Path(o.path)) for u in units for o in u.outputs if o.asset == a] for a in CACHES}
    student, _ = planner.student_work()
    curve = read_manifest(Path(student.units[0].outputs[0].path)).facts
    first = next(iter(manifests.values()))
    rows = [
        ("shards", f"{len(keys)}"),
        ("documents", f"{sum(m.n_documents for m in first):,}"),
        ("tokens", f"{sum(m.n_tokens for m in first):,}"),
    ]
    for asset, results in manifests.items():
        rows.append((f"bytes a token, {asset}", bytes_a_token(results)))
    rows += [
        ("tokens a second", f"{pass_rate(first):,.0f} (when the pass ran)"),
        ("teacher loads", f"{sum(1 for e in events_since(platform, recipe, started) if e.type == 'teacher_loaded')}"),
        ("largest recomputation difference", recomputation_difference(manifests)),
        ("student loss, first → last", f"{curve['first_loss']:.3f} → {curve['last_loss']:.3f}"),
        ("wall", f"{time.time() - started:.0f} s"),
        ("files", str(platform.recipe_folder(recipe.name))),
        ("web UI", f"{ui_command(platform)}    (then open http://127.0.0.1:3000)"),
    ]
    return rows


def ui_command(platform: Platform) -> str:
    """What opens the web UI on these results, from the checkout."""
    elsewhere = platform.home_folder != PROJECT_FOLDER / "var"
    return f"make ui KD_HOME={shlex.quote(platform.home)}" if elsewhere else "make ui"


def bytes_a_token(manifests: Sequence[Manifest]) -> str:
    """`33.1 (codec compact)`: of the part files of a cache, with the codec that the recipe names for it."""
    n_bytes, n_tokens = sum(m.n_bytes for m in manifests), sum(m.n_tokens for m in manifests)
    codecs = sorted({str(m.params["codec"]) for m in manifests if "codec" in m.params})
    return f"{n_bytes / n_tokens:,.1f}" + (f" (codec {', '.join(codecs)})" if codecs else "")


def pass_rate(manifests: Sequence[Manifest]) -> float:
    """Tokens a second over all partitions, recomputation and commit included."""
    wall_s = sum(float(m.facts["wall_s"]) for m in manifests)
    return sum(int(m.facts["computed_tokens"]) for m in manifests) / max(wall_s, 1e-9)


def recomputation_difference(manifests: Mapping[Asset, list[Manifest]]) -> str:
    """The largest differences that any partition's `recomputed` check saw, absolute, in the units of what is stored."""

    def largest(asset: Asset, name: str) -> float:
        return max(float(m.checks["recomputed"][name]) for m in manifests[asset])

    hidden = largest("hidden_state_cache", "max_abs_hidden_difference")
    relative = largest("hidden_state_cache", "max_relative_hidden_difference")
    return (
        f"logprob {largest('topk_cache', 'max_abs_logprob_difference'):.2g}, "
        f"hidden {hidden:.2g} ({relative:.1%} of its value, as stored), "
        f"embedding {largest('embedding_cache', 'max_abs_embedding_difference'):.2g}"
    )


def events_since(platform: Platform, recipe: Recipe, started: float) -> Iterator[Event]:
    for path in sorted((platform.home_folder / "jobs" / recipe.name).glob("teacher-*/*/events/*.jsonl")):
        for _, event in read_events(path):
            if isinstance(event, Event) and event.time >= started:
                yield event


def table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())

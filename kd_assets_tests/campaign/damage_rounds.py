"""The damage campaign: one damage a round, done in a home that is put back before each."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kd_assets_tests.campaign.children import Lost, Say, in_children
from kd_assets_tests.campaign.dagster_runs import failure_of, inline_deployment, materialize_all, remembering
from kd_assets_tests.campaign.damages import CLASSES, SparedError
from kd_assets_tests.campaign.judge import ANSWER_S, Undamaged, judge, run_says, undamaged
from kd_assets_tests.campaign.ledger import Record
from kd_assets_tests.campaign.mirror import Mirror
from kd_assets_tests.campaign.production import Home, make_home, outputs_of, remember_digests

N_ROUNDS_A_RUN = 8
"""Every so many rounds, a whole run of Dagster is asked, too."""


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """A child's own home, and what is true of it."""

    home: Home
    mirror: Mirror
    before: Undamaged
    remembered: dict[str, Path]


class DamageRounds:
    name = "damages"

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed, self._names = folder, seed, sorted(CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        self._ground: _Ground | None = None

    def rounds(self, numbers: Iterator[int]) -> Generator[Record]:
        """Without end, as long as there are numbers. Leave it at any time."""
        while batch := list(islice(numbers, 1000)):
            yield from self._batch(batch)

    def _batch(self, numbers: Sequence[int]) -> Iterator[Record]:
        began = time.monotonic()
        for number, outcome in in_children(numbers, self._round, log=self._folder / "log"):
            record = self._lost(number, outcome) if isinstance(outcome, Lost) else outcome
            now = time.monotonic()
            yield {"campaign": self.name, "round": number, "wall_s": round(now - began, 4), **record}
            began = now

    def class_of(self, number: int) -> str:
        """In turn, so that every class has its share; a class draws its damages at random."""
        return self._names[number % len(self._names)]

    def _lost(self, number: int, lost: Lost) -> Record:
        what, _, at = lost.at.rpartition(": ")
        kind = "stuck" if lost.hung else "bare"
        return {"class": self.class_of(number), "what": what, "damages": 1, kind: 1, "bad": [f"{at}: {lost.words}"]}

    def _round(self, number: int, say: Say) -> Record:
        ground = self._ground = self._ground or self._make_ground()
        rng, name = random.Random(f"{self._seed}/{self.name}/{number}"), self.class_of(number)
        say(name, ANSWER_S)
        ground.mirror.restore()
        try:
            words = CLASSES[name](rng, ground.home)
        except SparedError as e:
            return {"class": name, "what": f"nothing to damage: {e}"}
        asks_run = rng.randrange(N_ROUNDS_A_RUN) == 0
        verdict = judge(
            ground.home,
            ground.before,
            lambda at, patience_s: say(f"{words}: {at}", patience_s),
            excused=[words.split()[0].removeprefix("store/golden/")] if name.startswith("unfinished") else [],
            is_forged=name.endswith("hashed anew") and not name.startswith("check failed"),
            run=(lambda: run_says(ground.home, ground.before, lambda: self._run(ground))) if asks_run else None,
        )
        bad = [f"{by}: {verdict.words[by]}" for by in (*verdict.silent_by, *verdict.bare_by, *verdict.hung_by)]
        return {
            "class": name,
            "what": words,
            "damages": 1,
            verdict.verdict: 1,
            "bare": int(bool(verdict.bare_by)),
            "stuck": int(bool(verdict.hung_by)),
            "bad": bad,
            "by": {"silent": verdict.silent_by, "bare": verdict.bare_by, "stuck": verdict.hung_by},
        }

    def _run(self, ground: _Ground) -> tuple[bool, str, bool]:
        with inline_deployment(ground.home, remembering(ground.remembered, None)) as deployment:
            result = materialize_all(deployment)
            words, is_answer = failure_of(result)
            return result.success, words, is_answer

    def _make_ground(self) -> _Ground:
        logging.disable(logging.CRITICAL)  # Dagster's own of each run
        for name in ("home", "undisturbed"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        undisturbed, home = make_home(self._folder / "undisturbed"), make_home(self._folder / "home")
        remember_digests(home)
        before = undamaged(home)
        return _Ground(
            home=home,
            mirror=Mirror(home.folder),
            before=before,
            remembered={o.fingerprint: Path(o.path) for o in outputs_of(undisturbed).values()},
        )

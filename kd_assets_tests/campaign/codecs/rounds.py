"""The campaign at codecs: each round damages a file of a cache once, and asks everybody who reads it, twice over.

First as it is: the manifest tells, and everybody gives what was committed or says what is wrong, by name. Then with all
hashes made anew, as of a writer with a bug: no hash tells any more, and what is read is refused by name, or is what the
format allows. Never does anybody crash, hang, or raise what is no answer to a user; and what a reader refuses, `verify`
names.
"""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kd_assets.errors import KdAssetsError
from kd_assets_tests.campaign.children import Lost, Say, in_children
from kd_assets_tests.campaign.codecs.damages import damaged, kinds_of
from kd_assets_tests.campaign.codecs.readers import (
    FoundError,
    Reading,
    as_by_the_copy,
    broken_rule,
    decoded_by_the_copy,
    documents,
    readers_of,
    twice_in_a_position,
)
from kd_assets_tests.campaign.codecs.stores import SUBJECTS, CodecStore, hash_anew, index_hashed_anew, make_store
from kd_assets_tests.campaign.damages import SparedError
from kd_assets_tests.campaign.judge import place_of
from kd_assets_tests.campaign.ledger import Record

N_DAMAGES = 2_000
"""Of each subject; then the campaign is over."""
ANSWER_S = 30.0
"""How long a reader may take; on idle cores it takes 5 ms."""
MAKE_S = 300.0
"""How long a cache may take to be made and read whole."""
MODES = ("as it is", "hashed anew")
ALWAYS = ("verify", "reader")
"""Who is asked about every damage, in each mode; of the others `N_OTHERS`, at random."""
N_OTHERS = 2


@dataclass(frozen=True, kw_only=True)
class Ground:
    store: CodecStore
    before: dict[str, Reading]
    """Reader → what it gave of the whole cache."""


@dataclass(kw_only=True)
class Verdict:
    """What came of one damage in one mode."""

    outcome: str = "harmless"
    """`harmless`, `found`, or `believed`: other numbers, behind hashes made anew, that the format allows."""
    silent: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)


def ground_of(store: CodecStore) -> Ground:
    """A store that is whole, and what everybody reads of it."""
    return Ground(store=store, before={name: read(store) for name, read in readers_of(store).items()})


class CodecRounds:
    name = "codecs"

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self._grounds: dict[str, Ground] = {}

    def rounds(self, numbers: Iterator[int]) -> Generator[Record]:
        """Until every subject has had its damages. Leave it at any time."""
        until = N_DAMAGES * len(SUBJECTS)
        while batch := [number for number in islice(numbers, 1000) if number < until]:
            yield from self._batch(batch)

    def _batch(self, numbers: Sequence[int]) -> Iterator[Record]:
        began = time.monotonic()
        for number, outcome in in_children(numbers, self._round, log=self._folder / "log"):
            record = self._lost(number, outcome) if isinstance(outcome, Lost) else outcome
            now = time.monotonic()
            yield {"campaign": self.name, "round": number, "wall_s": round(now - began, 4), **record}
            began = now

    def _lost(self, number: int, lost: Lost) -> Record:
        """The child hung, or crashed: nothing of Python answers for that."""
        subject, kind, _ = self._drawn(number)
        what, _, at = lost.at.rpartition(": ")
        outcome = "stuck" if lost.hung else "crashed"
        bad = [f"{at}: {lost.words}"]
        return {"class": f"{subject}, {kind}", "what": what, "damages": 1, outcome: 1, "bad": bad}

    def _drawn(self, number: int) -> tuple[str, str, random.Random]:
        """Subject, kind and what draws the rest. Subjects take turns, and each has its kinds in turn."""
        names = list(SUBJECTS)
        subject, nth = names[number % len(names)], number // len(names)
        kinds = kinds_of(SUBJECTS[subject].is_index)
        return subject, kinds[nth % len(kinds)], random.Random(f"{self._seed}/{self.name}/{number}")

    def _round(self, number: int, say: Say) -> Record:
        name, kind, rng = self._drawn(number)
        say(f"{name}: the whole one", MAKE_S)
        ground = self._grounds[name] = self._grounds.get(name) or self._make_ground(name)
        record: Record = {"class": f"{name}, {kind}", "bad": []}
        store = ground.store
        for _ in range(20):
            try:
                data, words = damaged(kind, rng, file := rng.choice(store.files), store.others)
                break
            except SparedError as e:
                record["what"] = f"nothing to damage: {e}"
        else:
            return record
        record["what"] = words
        keep_index = rng.random() < 0.5
        for mode in MODES:
            file.write_bytes(data)
            try:
                if mode == MODES[1] and not _agree(store, file, keep_index=keep_index):
                    continue
                names = [*ALWAYS, *rng.sample(sorted(ground.before.keys() - set(ALWAYS)), N_OTHERS)]
                verdict = judge(
                    ground, names, is_forged=mode == MODES[1], say=lambda at: say(f"{words}: {at}", ANSWER_S)
                )
            finally:
                store.restore()
            record["damages"] = record.get("damages", 0) + 1
            for outcome, n in ((verdict.outcome, 1), ("silent", len(verdict.silent)), ("bare", len(verdict.bare))):
                if n:
                    record[outcome] = record.get(outcome, 0) + 1
            record["bad"] += [f"{mode}: {said}" for said in (*verdict.silent, *verdict.bare)]
        return record

    def _make_ground(self, name: str) -> Ground:
        logging.disable(logging.CRITICAL)
        return ground_of(make_store(self._folder / f"{time.time_ns()}", SUBJECTS[name]))


def _agree(store: CodecStore, file: Path, *, keep_index: bool) -> bool:
    """Make all hashes agree with a damaged file; False where it has none any more."""
    if not store.subject.is_index:
        hash_anew(store, keep_index=keep_index)
        return True
    try:
        file.write_bytes(index_hashed_anew(file.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return False
    return file.read_bytes() != store.sound[file]


def judge(ground: Ground, names: Sequence[str], *, is_forged: bool, say: Any = lambda at: None) -> Verdict:
    """Ask these readers about what lies there now."""
    verdict, store = Verdict(), ground.store
    given, refused = {}, {}
    readers = readers_of(store)
    for name in names:
        say(name)
        read = readers[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given[name] = read(store)
        except (KdAssetsError, FoundError) as e:
            refused[name] = f"{type(e).__name__}: {e}"
        except Exception as e:  # noqa: BLE001 - which exceptions there are is what is asked
            verdict.bare.append(f"{name}: {type(e).__name__} at {place_of(e)}: {e}"[:300])
    others = [name for name, reading in given.items() if reading != ground.before[name]]
    if refused:
        verdict.outcome = "found"
    elif others:
        verdict.outcome = "believed"
    changed = any(path.read_bytes() != data for path, data in store.sound.items() if path in store.files)
    if not is_forged:
        verdict.silent += [f"{name} gives other content" for name in others]
        if changed and "verify" in given:
            verdict.silent.append("verify finds nothing")
        return verdict
    if store.subject.is_index:
        if "verify" in given and others:  # bytes of a schema that say nothing may be others
            verdict.silent.append("verify finds nothing in an index that says something else")
        verdict.silent += [f"{name} gives other content" for name in others if name in ("reader", "data set", "replay")]
        return verdict
    if "verify" in given:
        # The checks compare with the shard, and so does who asks for its documents; `verify` looks at one result.
        of_readers = {name: why for name, why in refused.items() if name not in ("checks", "replay")}
        verdict.silent += [f"verify passes what {name} refuses: {why}"[:300] for name, why in of_readers.items()]
    if "reader" in given:
        say("the format's rules")
        try:
            verdict.silent += _broken(store, is_verified="verify" in given)
        except Exception as e:  # noqa: BLE001 - what is given is so odd that it cannot even be compared
            verdict.silent.append(f"the reader gives what has no meaning: {type(e).__name__}: {e}"[:300])
    return verdict


def _broken(store: CodecStore, *, is_verified: bool) -> list[str]:
    found = documents(store)
    by_copy = decoded_by_the_copy(store) if store.subject.codec == "compact" and is_verified else {}
    said = []
    for document in found:
        name = document["document_id"]
        if why := broken_rule(store, document):
            said.append(f"the reader gives {name}: {why}")
        elif is_verified and by_copy and twice_in_a_position(document):
            said.append(f"verify passes {name}, which has an id twice")
        if document["partition_key"] != store.folder.parent.name or name not in by_copy:
            continue
        given = as_by_the_copy(document)
        for column, values in by_copy[name].items():
            if not np.array_equal(values, given[column]):
                said.append(f"the decoder to copy gives other {column} of {name}")
    return said[:5]

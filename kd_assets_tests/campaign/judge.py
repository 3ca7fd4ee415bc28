"""What the product says of a damaged home: `verify`, checks, readers, the planner, and a whole run of Dagster.

Every answer is one of five: `right` (all as if nothing had happened), `named` (an error or problem that says what is
wrong), `wrong` (other content, or missing content, and no word), `bare` (an exception that is no answer to a user),
`hung` (no answer in time).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from kd_assets.cli import main as command_line
from kd_assets.contract import CACHES, Output
from kd_assets.errors import KdAssetsError
from kd_assets.model_files.fingerprints import tokenizer_fingerprint, weights_fingerprint
from kd_assets.store import ResultFiles, check_all
from kd_assets_tests.campaign.children import Say
from kd_assets_tests.campaign.production import ASSETS, KEYS, Home, outputs_of
from kd_assets_tests.campaign.readings import Readings, Result, read_asset, read_samples, results_on_disk

ANSWER_S = 30.0
"""How long an answer may take; on idle cores it takes 50 ms."""

RUN_S = 180.0
"""How long a run may; on idle cores it takes half a second."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    kind: str
    words: str = ""


RIGHT = Answer(kind="right")


@dataclass(frozen=True, kw_only=True)
class Undamaged:
    """What everybody says of the home before it is damaged."""

    results: dict[str, Result]
    readings: dict[str, Readings]
    samples: Readings
    outputs: dict[tuple[str, str], Output]
    fingerprints: tuple[str, str]


def undamaged(home: Home) -> Undamaged:
    """Raises AssertionError for a home that is not whole: then no damage could be told."""
    readings: dict[str, Readings] = {asset: read_asset(home, asset) for asset in ASSETS}
    outputs = outputs_of(home)
    found = Undamaged(
        results=results_on_disk(home),
        readings=readings,
        samples=read_samples(home),
        outputs=outputs,
        fingerprints=fingerprints_of(home),
    )
    assert len(found.results) == len(ASSETS) * len(KEYS), "not every result is there"
    status, words = _command(["verify", str(home.store)])
    assert status == 0, words
    return found


@dataclass(frozen=True, kw_only=True)
class Verdict:
    verdict: str
    """found, harmless or silent."""
    silent_by: list[str] = field(default_factory=list)
    """Who gave other or missing content without a word."""
    bare_by: list[str] = field(default_factory=list)
    """Whose answer was no answer to a user, such as a bare KeyError."""
    hung_by: list[str] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    """Who said what."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def judge(
    home: Home,
    before: Undamaged,
    say: Say,
    *,
    excused: Collection[str] = (),
    is_forged: bool = False,
    run: Callable[[], Answer] | None = None,
) -> Verdict:
    """Ask everybody about a damaged home. `excused`: results that are being made, which `verify` need only mention.
    `is_forged`: a manifest was changed with all its hashes, so that it takes the audit log and the plan to tell, which
    are `verify`'s to compare. `run`: materializes everything that is not there, last of all."""
    found = results_on_disk(home)
    damaged = {path for path, result in before.results.items() if found.get(path) != result}
    answers: dict[str, Answer] = {}

    def ask(name: str, question: Callable[[], Answer], timeout_s: float = ANSWER_S) -> None:
        if any(answer.kind == "hung" for answer in answers.values()):
            return  # the others would wait for the same
        say(name, 2 * timeout_s)  # where the alarm does not reach, the parent ends us
        answers[name] = _answer(question, timeout_s)

    assets = sorted({before.results[path].asset for path in damaged}) or ["topk_cache"]
    ask("verify", lambda: verify_says(home, damaged, excused))
    ask("inspect", lambda: inspect_says(home))
    for asset in assets:
        ask(f"reader of {asset}", lambda asset=asset: reader_says(home, before, asset))  # type: ignore[misc]
    ask("data set", lambda: _same(read_samples(home), before.samples))
    ask("checks", lambda: checks_say(before, damaged))
    ask("planner", lambda: planner_says(home, before))
    if run is not None:
        ask("run", run, RUN_S)
    silent_by, bare_by, hung_by = (
        sorted(name for name, answer in answers.items() if answer.kind == kind) for kind in ("wrong", "bare", "hung")
    )
    if is_forged and answers["verify"].kind == "named":
        silent_by = [name for name in silent_by if name == "run"]
    harmless = all(answer == RIGHT for answer in answers.values())
    return Verdict(
        verdict="silent" if silent_by else "harmless" if harmless else "found",
        silent_by=silent_by,
        bare_by=bare_by,
        hung_by=hung_by,
        words={name: f"{answer.kind}: {answer.words}"[:600] for name, answer in answers.items() if answer != RIGHT},
    )


class _TooLateError(BaseException):
    """Raised by the alarm, in whatever waits."""


def _answer(question: Callable[[], Answer], timeout_s: float) -> Answer:
    is_late = False

    def too_late(number: int, frame: FrameType | None) -> None:
        nonlocal is_late
        is_late = True
        raise _TooLateError

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        answer = question()
        # Dagster takes whatever is raised in an asset for that asset's failure.
        return Answer(kind="hung", words=f"no answer after {timeout_s:g} s") if is_late else answer
    except _TooLateError as e:
        return Answer(kind="hung", words=f"no answer after {timeout_s:g} s at {place_of(e)}")
    except KdAssetsError as e:
        return Answer(kind="named", words=f"{type(e).__name__}: {e}")
    except Exception as e:  # noqa: BLE001 - which exceptions there are is what is asked
        return Answer(kind="bare", words=f"{type(e).__name__} at {place_of(e)}: {e}"[:300])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def place_of(e: BaseException) -> str:
    """The innermost line of ours that an exception came through."""
    frames = traceback.extract_tb(e.__traceback__)
    ours = [f for f in frames if "/kd_assets/" in f.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _same(found: Readings, expected: Readings) -> Answer:
    if found == expected:
        return RIGHT
    missing = [line.split()[0] for line in expected if line not in found]
    return Answer(kind="wrong", words=f"{len(found)} documents, expected {len(expected)}; other: {missing[:3]}")


def reader_says(home: Home, before: Undamaged, asset: str) -> Answer:
    """The documents of before, or a word; also of a result that was recorded as failed."""
    answer = _same(read_asset(home, asset), before.readings[asset])
    failed = [path for path in home.recipe_folder.glob(f"{asset}/*/*/*/manifest.json") if _has_failed(path)]
    if answer == RIGHT and failed:
        return Answer(kind="wrong", words=f"gives documents of a result whose recorded check failed: {failed[0]}")
    return answer


def _has_failed(path: Path) -> bool:
    try:
        return json.loads(path.read_bytes())["checks"]["recomputed"]["passed"] is False
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def verify_says(home: Home, damaged: Collection[str], excused: Collection[str] = ()) -> Answer:
    """Exit 0 with something changed or missing is wrong, unless it is being made and a note says so."""
    status, words = _command(["verify", str(home.store)])
    if status:
        return Answer(
            kind="named" if words else "wrong", words=" | ".join(words[:3]) or f"exit {status} without a word"
        )
    unsaid = [path for path in damaged if path not in excused or not any(path in line for line in words)]
    if unsaid:
        return Answer(kind="wrong", words=f"exit 0 with {len(damaged)} results damaged: {sorted(unsaid)[:2]}")
    return Answer(kind="named", words=" | ".join(words[:3])) if damaged else RIGHT


def inspect_says(home: Home) -> Answer:
    """It shows what is there, so that nothing it leaves out is held against it."""
    status, words = _command(["inspect", str(home.store)])
    return Answer(kind="named", words=" | ".join(words[-3:])) if status else RIGHT


def _command(argv: Sequence[str]) -> tuple[int, list[str]]:
    """A command's exit status and what it says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command_line(list(argv))
    return status, (out.getvalue() + err.getvalue()).splitlines()


def checks_say(before: Undamaged, damaged: set[str]) -> Answer:
    """The four checks of each cache in whose partition something is damaged; passing over other bytes is wrong."""
    keys = {before.results[path].partition_key for path in damaged} or {KEYS[0]}
    failed, passed_over = [], []
    for asset in CACHES:
        for key in sorted(keys):
            output, shard = before.outputs[asset, key], before.outputs["shards_manifest", key]
            results = check_all(ResultFiles(Path(output.path)), ResultFiles(Path(shard.path)))
            failed += [f"{asset}/{key}: {r.name}: {r.description}" for r in results if not r.passed]
            if all(r.passed for r in results) and _files_of(Path(output.path)) != _expected_files(before, output):
                passed_over.append(f"{asset}/{key}")
    if passed_over:
        return Answer(kind="wrong", words=f"all checks of {', '.join(passed_over)} pass, whose bytes are others")
    return Answer(kind="named", words="; ".join(failed)) if failed else RIGHT


def _expected_files(before: Undamaged, output: Output) -> tuple[tuple[str, str], ...]:
    (result,) = (r for r in before.results.values() if r.head == output.fingerprint)
    return result.parts


def _files_of(folder: Path) -> tuple[tuple[str, str], ...]:
    from kd_assets.durable import file_sha256

    manifest = json.loads((folder / "manifest.json").read_bytes())
    return tuple((part["name"], file_sha256(folder / part["name"])) for part in manifest["parts"])


def planner_says(home: Home, before: Undamaged) -> Answer:
    """What a run would ask for. Other results than before are wrong where the teacher is the one of before, and so are
    those of before where it is another one now."""
    shards, caches = home.shards_work(), home.teacher_work()
    surveys = [shards.survey(), caches.survey()]
    impossible = {key: words for survey in surveys for key, words in survey.impossible.items()}
    named = {(o.asset, u.partition_key): o for work in (shards, caches) for u in work.units for o in u.outputs}
    others = sorted(key for key, output in named.items() if output.fingerprint != before.outputs[key].fingerprint)
    changed = fingerprints_of(home) != before.fingerprints
    if others and not changed:
        return Answer(kind="wrong", words=f"asks for other results, without a word: {others[:3]}")
    if changed and not others and not impossible:
        return Answer(kind="wrong", words="asks for the results of another teacher than the one that is there")
    if impossible:
        return Answer(kind="named", words="; ".join(f"{k}: {v}" for k, v in impossible.items()))
    missing = sum(len(u.outputs) for survey in surveys for u in survey.missing.units)
    return Answer(kind="named", words=f"would make {missing} results") if missing else RIGHT


def fingerprints_of(home: Home) -> tuple[str, str]:
    """Of the teacher's weights and tokenizer as they are, whatever is remembered of them."""
    folder = home.folder / "teacher"
    return weights_fingerprint(folder, None), tokenizer_fingerprint(folder, None)


def run_says(home: Home, before: Undamaged, run: Callable[[], tuple[bool, str, bool]]) -> Answer:
    """`run` tells whether it succeeded, what it said, and whether that is an answer to a user. After a success
    everything must be there as before."""
    succeeded, words, is_answer = run()
    if not succeeded:
        return Answer(kind="named" if is_answer else "bare", words=words)
    if fingerprints_of(home) != before.fingerprints:
        return Answer(kind="named", words="made the results of another teacher")
    found = results_on_disk(home)
    others = sorted(p for p, r in before.results.items() if p not in found or found[p].parts != r.parts)
    if others:
        return Answer(kind="wrong", words=f"succeeded, and {others[:3]} are not what they were")
    return RIGHT

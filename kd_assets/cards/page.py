"""A card as Markdown: for the page of the asset `cache_card`, and as `README.md` beside the caches.

Names, licences and texts come from files that anybody may have written: in a table they are cells, in a block of code
lines, and nothing of them is markup.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files

from kd_assets.cards.contents import CacheCard, Contents
from kd_assets.cards.current import Coverage
from kd_assets.cards.documents import document_lines
from kd_assets.cards.front_matter import front_matter, licence_in_words, licences_of
from kd_assets.cards.parts import current_folders, is_plain, part_patterns
from kd_assets.cards.passes import Work
from kd_assets.cards.tokens import decoder_of
from kd_assets.cards.words import bytes_in_words, energy, number, short
from kd_assets.contract import CACHES, EXPORTS
from kd_assets.errors import StoreError, printable
from kd_assets.store import fingerprint
from kd_assets.store.reading.summary import view_documents

N_SHOWN_DOCUMENTS = 3
WORTH_TABLE, WORTH_PICTURE = "worth.md", "worth.svg"
"""What a byte of a cache teaches: made by `python -m kd_assets_tests.benchmarks.worth --markdown --picture`."""
_MARKS: Mapping[Coverage, str] = {"made": "█", "stale": "▒", "failed": "✗", "missing": "░"}
_WORST_FIRST: tuple[Coverage, ...] = ("failed", "missing", "stale", "made")
_STRIP = 40
"""Marks of a strip at most: of more partitions each stands for several, and shows the worst of them."""


def card(contents: Contents, *, description: str | None = None) -> str:
    """The card, without front matter and without a picture."""
    blocks = (
        [f"# Teacher caches of {_cell(contents.recipe)}"],
        [_paragraph(description or "")],
        _what_it_is(contents),
        _holds(contents),
        _measured(contents),
        _sources(contents),
        _students(contents),
        _documents(contents),
        _how_to_use(contents),
        _worth(contents),
    )
    return "\n\n".join("\n".join(block) for block in blocks if any(block)) + "\n"


def readme(contents: Contents, page: str) -> str:
    """The card with the head that the Hugging Face hub asks for, and at its end the picture of the table that a card
    ends with; `WORTH_PICTURE` lies beside it."""
    configs = _configs(contents)
    head = front_matter(
        contents.sources,
        n_documents=contents.of_documents.summary.n_documents,
        configs={name: part_patterns(cache) for name, cache in configs.items()},
        pretty_name=f"Teacher caches of {contents.recipe}",
        viewer=any(cache.asset in CACHES for cache in configs.values()),
    )
    picture = (
        ["", f"![held-out loss of students against bytes a token]({WORTH_PICTURE})"] if has_worth(contents) else []
    )
    return "\n".join([*head, "", page.rstrip("\n"), *picture, ""])


def _configs(contents: Contents) -> dict[str, CacheCard]:
    """A data set each cache that `datasets` reads as it lies, and the shards: of a card that names none, it takes all
    Parquet files that it finds, coded and superseded ones, too. Its name tells its content: of an equal name,
    `datasets` (5.2.0) takes what it has in its own cache, whatever files are there now."""
    found = {}
    for cache in contents.caches:
        if cache.summary.has_documents and is_plain(cache) and (folders := current_folders(cache)):
            content = fingerprint({"folders": [folder.name for folder in folders]})[:8]
            found[f"{cache.asset}-{content}"] = cache
    return found


def _what_it_is(contents: Contents) -> list[str]:
    documents = contents.of_documents.summary
    teacher = _code(contents.provenance.get("teacher", "unknown"))
    if revision := contents.provenance.get("teacher_revision"):
        teacher += f" at {_code(revision)}"
    n_bytes = sum(cache.summary.n_bytes for cache in contents.teacher_caches)
    licences = ", ".join(map(_cell, licences_of(contents.sources))) or "not stated"
    newest = contents.updated_at[:16].replace("T", " ")
    return [
        f"{documents.n_documents:,} documents, {documents.n_tokens:,} tokens, and what a teacher says of them: "
        f"{bytes_in_words(n_bytes)}, for knowledge distillation without the teacher at hand.",
        "",
        f"Teacher {teacher}"
        + (f", {_code(dtype)}" if (dtype := contents.provenance.get("dtype")) else "")
        + (f", {contents.vocab_size:,} token ids" if contents.vocab_size else "")
        + f". Licence of the texts: {licences}. Newest result: {newest} UTC.",
    ]


def _holds(contents: Contents) -> list[str]:
    rows = [
        (
            f"`{cache.asset}`",
            f"`{strip(list(cache.coverage.values()))}`",
            _coverage_in_words(cache),
            f"{cache.summary.n_documents:,}",
            f"{cache.summary.n_tokens:,}",
            bytes_in_words(cache.summary.n_bytes),
            "" if cache.summary.bytes_per_token is None else f"{cache.summary.bytes_per_token:,.1f}",
            _cell(_parameters(cache)),
        )
        for cache in contents.caches
    ]
    rows += [
        (f"`{asset}`", f"`{strip(['missing'] * n)}`", f"0 of {n:,}, {n:,} missing", "", "", "", "", "")
        for asset, n in contents.never_made.items()
    ]
    others = sum(cache.n_other_variants for cache in contents.caches)
    return [
        "## What it holds",
        "",
        *_table(("cache", "partitions", "", "documents", "tokens", "size", "bytes a token", "parameters"), rows),
        "",
        f"{_MARKS['made']} made, {_MARKS['missing']} missing, {_MARKS['stale']} stale (made of another shard), "
        f"{_MARKS['failed']} failed a check."
        + (f" Beside these are {others} variants of other parameters." if others else ""),
    ]


def _coverage_in_words(cache: CacheCard) -> str:
    made = f"{cache.n('made'):,} of {len(cache.coverage):,}"
    return ", ".join([made, *(f"{n:,} {state}" for state in _WORST_FIRST if state != "made" and (n := cache.n(state)))])


def _parameters(cache: CacheCard) -> str:
    shown = {name: value for name, value in cache.summary.params.items() if value not in (None, [], {})}
    return ", ".join(f"{name} {short(value)}" for name, value in shown.items())


def strip(coverage: Sequence[Coverage]) -> str:
    """A mark a partition, in the plan's order; of more than fit, one for several, which shows the worst of them."""
    n = min(len(coverage), _STRIP)
    cells = [coverage[len(coverage) * i // n : len(coverage) * (i + 1) // n] for i in range(n)]
    return "".join(_MARKS[min(cell, key=_WORST_FIRST.index)] for cell in cells)


def _measured(contents: Contents) -> list[str]:
    rows = [row for cache in contents.caches for row in _check_rows(cache)]
    rows += [row for cache in contents.caches for row in _stat_rows(cache)]
    rows += _work_rows(contents.last_night, "last night") if contents.last_night != contents.in_all else []
    rows += _work_rows(contents.in_all, "in all")
    return ["## What was measured", "", *_table(("what", "how much"), rows)] if rows else []


def _check_rows(cache: CacheCard) -> Iterator[tuple[str, str]]:
    for name, record in cache.summary.checks.items():
        worst = ", ".join(
            f"{key.removeprefix('max_').replace('_', ' ')} {value:.3g}"
            for key, value in record.items()
            if key.startswith("max_")
        )
        passed = f"passed in {record['n_passed']:,} of {record['n_partitions']:,} partitions"
        passed += f", measured on {_cell(record['measured_on'])}" if "measured_on" in record else ""
        yield f"`{cache.asset}`, check {_cell(name)}", f"{passed}" + (f"; largest {_cell(worst)}" if worst else "")


def _stat_rows(cache: CacheCard) -> Iterator[tuple[str, str]]:
    if cache.kept_mass is not None:
        yield f"`{cache.asset}`, probability that is kept", f"{cache.kept_mass:.4f} on average"


def _work_rows(work: Work, when: str) -> Iterator[tuple[str, str]]:
    if not work.n_passes:
        return
    speed = "" if work.tokens_per_s is None else f", {number(work.tokens_per_s)} tokens/s of one teacher"
    yield (
        f"teacher, {when}",
        f"{work.n_passes:,} pass{'' if work.n_passes == 1 else 'es'} over {work.n_tokens:,} tokens{speed}",
    )
    if work.gpu_hours is not None:
        yield f"GPU-hours, {when}", number(work.gpu_hours)
    if work.joules is not None:
        each = f" ({number(work.joules / work.n_tokens)} J a token)" if work.n_tokens else ""
        yield f"energy, {when}", energy(work.joules) + each


def _sources(contents: Contents) -> list[str]:
    rows = [
        (
            _cell(raw.get("name")),
            _cell(licence_in_words(raw) or "not stated"),
            _cell(raw.get("revision") or ""),
            f"{raw['n_records']:,}" if isinstance(raw.get("n_records"), int) else "",
        )
        for raw in contents.sources
    ]
    return ["## Sources", "", *_table(("source", "licence", "revision", "records"), rows)] if rows else []


def _students(contents: Contents) -> list[str]:
    if not contents.students:
        return []
    losses = [s.last_loss for s in contents.students if math.isfinite(s.last_loss)]
    latest = contents.students[-1]
    loss = f"{latest.first_loss:.3f} → {latest.last_loss:.3f}"
    said = f"A small student, trained from the caches for a few steps: loss {loss}"
    trend = " → ".join(f"{loss:.3f}" for loss in losses[-8:])
    return ["## Student", "", said + (f"; over time {trend}." if len(losses) > 1 else ".")]


def has_worth(contents: Contents) -> bool:
    """Whether the card ends with what a byte of a cache teaches."""
    return any(cache.asset == "topk_cache" for cache in contents.caches)


def _worth(contents: Contents) -> list[str]:
    """What students learn from caches of every kind, as `kd_assets_tests.benchmarks.worth` found it."""
    if not has_worth(contents):
        return []
    return [
        "## What a byte teaches",
        "",
        _packaged(WORTH_TABLE).decode().rstrip(),
        "",
        "Students of kd_assets' demo, whose README says how this was measured; bytes beside the ids. "
        f"`{WORTH_PICTURE}`, beside the caches, has a picture of it.",
    ]


def worth_picture() -> bytes:
    """An SVG."""
    return _packaged(WORTH_PICTURE)


def _packaged(name: str) -> bytes:
    return (files("kd_assets.cards") / name).read_bytes()


def _documents(contents: Contents) -> list[str]:
    """As `kd-assets inspect` shows them; of the cache that says most, and a reason where none can be shown."""
    shown = next((c.summary for c in contents.teacher_caches if c.summary.has_documents), None)
    if shown is None:
        return []
    decode, _ = decoder_of(None, shown.provenance.get("tokenizer"))
    try:
        lines = [line for view in view_documents(shown, N_SHOWN_DOCUMENTS) for line in document_lines(view, decode)]
    except StoreError as e:
        lines = [f"  none can be shown: {e}"]
    # Indented by at least two spaces as they are; four make them code wherever they stand, whatever is in them.
    return ["## Documents", "", *(f"    {printable(line)}" for line in lines)]


def _how_to_use(contents: Contents) -> list[str]:
    folder, recipe = printable(contents.folder.name), contents.recipe
    exports = [cache for cache in contents.caches if cache.asset in EXPORTS]
    formats = [cache.asset.removeprefix("export_") for cache in exports] or ["hf"]
    return [
        "## How to use it",
        "",
        f"Where {_code(folder)} is the folder that this card lies in:",
        "",
        "```python",
        "from pathlib import Path",
        "from kd_assets.student.dataset import TeacherCacheDataset, collate",
        "",
        f"documents = TeacherCacheDataset.from_recipe(Path({folder!r}))",
        "```",
        "",
        "```sh",
        f"kd-assets verify {shlex.quote(folder)}",
        *(
            f"kd-assets export {name} {shlex.quote(folder)} --to {shlex.quote(f'exports/{recipe}-{name}')}"
            for name in formats
        ),
        "```",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in itertools.chain([head, ["---"] * len(head)], rows)]


def _cell(value: object) -> str:
    """Text that is no markup in a table's cell."""
    text = printable(str(value))
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#|!~" else letter for letter in text)


def _paragraph(text: str) -> str:
    """Text as one paragraph in which nothing is markup: nor is its beginning a list, a heading or a rule."""
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", _cell(" ".join(text.split())))


def _code(value: object) -> str:
    return f"`{printable(str(value)).replace('`', chr(39)).replace('|', '¦')}`"

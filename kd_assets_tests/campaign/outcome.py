"""What came of a round with real processes: its results beside those of an undisturbed one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kd_assets.store import verify
from kd_assets_tests.campaign.ledger import Record


def outcome(
    expected: Mapping[str, object], found: Mapping[str, object], n_commits: Mapping[str, int], store: Path
) -> Record:
    """`expected` and `found`: part file → its bytes or their hash; `n_commits`: result → how often it was committed."""
    missing = sorted(expected.keys() - found.keys())
    differing = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    twice = sorted(name for name, n in n_commits.items() if n > 1)
    problems = [problem.message for problem in verify(store).problems]
    bad = [f"missing: {name}" for name in missing] + [f"bytes differ: {name}" for name in differing]
    bad += [f"made twice: {name}" for name in twice] + [f"verify: {message}" for message in problems]
    return {
        "lost": len(missing) + len(problems),
        "bytes_differing": len(differing),
        "made_twice": len(twice),
        "bad": bad,
    }

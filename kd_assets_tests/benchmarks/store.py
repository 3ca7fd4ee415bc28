"""How many bytes the codecs of caches take, what they cost in truth, and how fast they are written and read.

    python -m kd_assets_tests.benchmarks.store --json [--layouts] [--demo KD_HOME/store/demo]

Gathers what its modules measure, those of them that are in this tree: `store_topk` the codec of top-k caches,
`store_states` those of hidden states, `loader` reading for training. Each says what its figures are.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from kd_assets_tests.benchmarks import store_topk

OTHERS = ("store_states", "loader")


def figures_of(module: str) -> dict[str, Any]:
    """What `measure()` of a benchmark gives; nothing where it is not in this tree."""
    name = f"kd_assets_tests.benchmarks.{module}"
    if importlib.util.find_spec(name) is None:
        return {}
    figures: dict[str, Any] = importlib.import_module(name).measure()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tokens", type=int, default=131_072, help="of the made-up top-k cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", action="store_true", help="also other ways to lay out the same numbers")
    parser.add_argument("--demo", type=Path, help="the demo's recipe folder: its plain top-k cache coded, too")
    parser.add_argument("--topk-only", action="store_true", help="leave out what is not of top-k caches")
    options = parser.parse_args()
    figures = store_topk.measure(n_tokens=options.tokens, rounds=options.rounds, layouts=options.layouts)
    if options.demo is not None:
        figures |= store_topk.demo_figures(options.demo)
    if not options.topk_only:
        for module in OTHERS:
            figures |= figures_of(module)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:<36} {value}")


if __name__ == "__main__":
    main()

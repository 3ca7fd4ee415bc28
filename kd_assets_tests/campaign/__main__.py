"""Disturbs a production for so many minutes, and says what came of it:

    python -m kd_assets_tests.campaign --folder F --minutes M [--seed S] [--only kills|damages|services|cluster|codecs]

`services` (a daemon, a web server, runs and jobs as processes of their own), `cluster` (a real SLURM) and `codecs`
(2,000 damages to the files of each codec; then it is over) are done only where they are named.

The folder keeps what was done: started again, a campaign that was ended or killed goes on until its minutes are
used up, and one that is over says its summary once more. `--round N`, with `--only`, does one round and says what it
found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from kd_assets_tests.campaign.cluster_rounds import ClusterRounds
from kd_assets_tests.campaign.codecs.rounds import CodecRounds
from kd_assets_tests.campaign.damage_rounds import DamageRounds
from kd_assets_tests.campaign.kill_rounds import KillRounds
from kd_assets_tests.campaign.ledger import Ledger
from kd_assets_tests.campaign.production import warm_up
from kd_assets_tests.campaign.service_rounds import ServiceRounds

Rounds = DamageRounds | KillRounds | ServiceRounds | ClusterRounds | CodecRounds
CAMPAIGNS: dict[str, type[Rounds]] = {
    "damages": DamageRounds,
    "kills": KillRounds,
    "services": ServiceRounds,
    "cluster": ClusterRounds,
    "codecs": CodecRounds,
}
BY_DEFAULT = ("damages", "kills")
SHARES = {"damages": 0.35, "kills": 0.65, "services": 1.0, "cluster": 1.0, "codecs": 1.0}
"""Of the time."""
N_TURNS = 3
"""How often each campaign has its turn, so that one that is ended early has something of each."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kd_assets_tests.campaign", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where it keeps what it needs and what it found")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(CAMPAIGNS), action="append")
    parser.add_argument("--round", type=int, help="do this round alone")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    ledger = Ledger(folder, arguments.seed)
    names = arguments.only or list(BY_DEFAULT)
    campaigns = {name: CAMPAIGNS[name](folder / name, arguments.seed) for name in names}
    if arguments.round is not None:
        warm_up()
        for name in names:
            print(json.dumps(next(campaigns[name].rounds(iter([arguments.round]))), indent=1))
        return 0
    warm_up()
    share = sum(SHARES[name] for name in names)
    while any(_turn(ledger, campaigns[name], 60 * arguments.minutes * SHARES[name] / share) for name in names):
        pass
    summary = ledger.summary()
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({name: value for name, value in summary.items() if name not in ("by_class", "bad")}, indent=1))
    for found in summary["bad"][:20]:
        print(f"{found['campaign']}, {found['class']}: {found['what']}\n    {found['bad']}\n    {found['repeat']}")
    return 0 if summary["ok"] else 1


def _turn(ledger: Ledger, campaign: Rounds, budget_s: float) -> bool:
    """Rounds of one campaign until its turn, its time or the campaign itself is over; returns whether it may go on."""
    left_s = budget_s - ledger.used_s(campaign.name)
    if left_s <= 0:
        return False
    until, is_over = time.monotonic() + min(left_s, budget_s / N_TURNS), True
    with contextlib.closing(campaign.rounds(ledger.next_rounds(campaign.name))) as rounds:
        for record in rounds:
            ledger.add(record)
            if time.monotonic() > until:
                is_over = False
                break
    return not is_over


if __name__ == "__main__":
    sys.exit(main())

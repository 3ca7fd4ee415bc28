"""`kd-assets`: looks at results, and at what a run would do. A module a subcommand, all listed in `COMMANDS`.

`plan`, `preview`, `doctor`, `check`, `fields` and `recode` belong to the control plane, which is loaded by name. The
others need what the store needs, and the `tokenizers` library to show text where it is installed; of a recipe's folder
they work without dagster. Errors are one line on stderr; the exit status is that of the error (`kd_assets.errors`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from kd_assets.commands.base import Subcommand, show
from kd_assets.commands.card import CARD
from kd_assets.commands.control import CHECK, DOCTOR, FIELDS, PLAN, PREVIEW
from kd_assets.commands.diff import DIFF
from kd_assets.commands.export import EXPORT
from kd_assets.commands.gc import GC
from kd_assets.commands.index import INDEX
from kd_assets.commands.inspect import INSPECT
from kd_assets.commands.quarantine import QUARANTINE
from kd_assets.commands.recode import RECODE
from kd_assets.commands.serve import SERVE
from kd_assets.commands.verify import VERIFY
from kd_assets.errors import KdAssetsError

EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE: what a shell reports of a command whose reader went away."""

COMMANDS: tuple[Subcommand, ...] = (
    *(INSPECT, CARD, VERIFY, EXPORT, RECODE, SERVE, DIFF, QUARANTINE, GC, INDEX),
    *(PLAN, PREVIEW, DOCTOR, CHECK, FIELDS),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kd-assets", description="Teacher caches for LLM distillation.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.description, description=command.description)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except KdAssetsError as e:
        show(f"kd-assets: {' '.join(str(e).split())}", stream=sys.stderr)
        return e.exit_code
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return status


if __name__ == "__main__":
    sys.exit(main())

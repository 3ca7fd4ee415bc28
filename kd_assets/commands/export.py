"""`kd-assets export`: a recipe's caches as files that a trainer reads."""

from __future__ import annotations

from kd_assets.commands.base import Subcommand
from kd_assets.export.command import add_export_arguments, run_export

EXPORT = Subcommand(
    name="export",
    description="write a recipe's caches as files that a trainer reads; goes on where a killed export left off",
    add_arguments=add_export_arguments,
    run=run_export,
)

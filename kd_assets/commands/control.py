"""`kd-assets plan`, `preview`, `doctor`, `check` and `fields`: what the control plane would do, loaded by name."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from kd_assets.commands.base import Subcommand, control_plane, count, show, show_json
from kd_assets.errors import EXIT_FAILED, MissingInputError


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="of the dg project around the working directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _plan(arguments: argparse.Namespace) -> int:
    """Exit 1 when the caches do not fit where they will lie."""
    bills = control_plane("kd_assets.diagnose.bill")
    recipe = control_plane("kd_assets.components").load_recipe(arguments.recipe)
    bill = bills.bill_of(recipe, control_plane("kd_assets.orchestration.platform").Platform.from_environment())
    if arguments.json:
        show_json(bill.to_json())
    else:
        show(*bills.text_lines(bill))
    return 0 if bills.fits(bill) else EXIT_FAILED


def _preview_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="of the dg project around the working directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--partitions", metavar="A..B", help="from shard A to shard B; or A,C; or one (default: all)")
    which.add_argument("--all", action="store_true", help="all shards of the current plan")
    parser.add_argument("--assets", nargs="+", metavar="NAME", help="such as topk_cache (default: all that need jobs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _preview(arguments: argparse.Namespace) -> int:
    previews = control_plane("kd_assets.diagnose.preview")
    recipe = control_plane("kd_assets.components").load_recipe(arguments.recipe)
    platform = control_plane("kd_assets.orchestration.platform").Platform.from_environment()
    shown = previews.preview(recipe, platform, partitions=arguments.partitions, assets=arguments.assets)
    if arguments.json:
        show_json(shown.to_json())
    else:
        show(*previews.text_lines(shown))
    return 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="check its requests, weights and space, too")
    parser.add_argument("--no-job", action="store_true", help="submit no test job to the cluster")
    parser.add_argument(
        "--verify-weights", action="store_true", help="read the teacher's weights and check their hashes"
    )
    parser.add_argument("--wait", type=count, default=120, metavar="SECONDS", help="for the test job to start (120)")


def _doctor(arguments: argparse.Namespace) -> int:
    """Exit 1 when anything fails; each finding is a line, printed as soon as it is known."""
    doctor = control_plane("kd_assets.diagnose.doctor")
    load_recipe = control_plane("kd_assets.components").load_recipe
    recipe = None if arguments.recipe is None else load_recipe(arguments.recipe)
    platform = control_plane("kd_assets.orchestration.platform").Platform.from_environment()
    ok = True
    for finding in doctor.examine(
        recipe,
        platform,
        test_job=not arguments.no_job,
        wait_s=arguments.wait,
        verify_weights=arguments.verify_weights,
    ):
        show(str(finding))
        ok = ok and finding.status is not doctor.Status.FAIL
    return 0 if ok else EXIT_FAILED


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="of recipes (default: of the dg project around here)")


def _check(arguments: argparse.Namespace) -> int:
    """Exit 1 when any recipe has something wrong, of which each is a line."""
    checks = control_plane("kd_assets.diagnose.recipe_files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Dagster has in beta: its version is pinned
        folder = (arguments.folder or checks.defs_folder()).absolute()
        files, mistakes = checks.mistakes_below(folder)
    if not files:
        raise MissingInputError(f"there is no defs.yaml in {folder} or below it")
    if mistakes:
        show(*map(str, mistakes))
        return EXIT_FAILED
    names = ", ".join(file.parent.name for file in files)
    show(f"{len(files)} {'recipe is' if len(files) == 1 else 'recipes are'} right: {names}")
    return 0


def _fields(_: argparse.Namespace) -> int:
    page = control_plane("kd_assets.recipes.reference").reference(control_plane("kd_assets.components").TeacherCaches)
    show(*page.splitlines())
    return 0


PLAN = Subcommand(
    name="plan",
    description="what the plan would be now and what it would cost; writes nothing; exit 1 when it does not fit",
    add_arguments=_plan_arguments,
    run=_plan,
)
PREVIEW = Subcommand(
    name="preview",
    description="what materializing would submit now, command lines and all; submits nothing",
    add_arguments=_preview_arguments,
    run=_preview,
)
DOCTOR = Subcommand(
    name="doctor",
    description="check what jobs need, the cluster included; exit 1 with the remedy named when something fails",
    add_arguments=_doctor_arguments,
    run=_doctor,
)
CHECK = Subcommand(
    name="check",
    description="look at the files of all recipes; each mistake is a line with file and line; exit 1 when there is one",
    add_arguments=_check_arguments,
    run=_check,
)
FIELDS = Subcommand(
    name="fields",
    description="every field of a recipe, in Markdown",
    add_arguments=lambda _: None,
    run=_fields,
)

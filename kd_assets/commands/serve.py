"""`kd-assets serve`: a recipe's top-k cache as the online teacher that a trainer asks."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from pathlib import Path

from kd_assets.commands.base import Subcommand, count, recipe_folder_of, selected_partitions, serving_plane, show
from kd_assets.commands.progress import Progress
from kd_assets.errors import RecipeError
from kd_assets.replay.requests import TOKEN_VARIABLE, Limits

INDEXING_EVERY_S = 5.0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="its name in the dg project around here, or its folder in a store")
    parser.add_argument("--host", default="127.0.0.1", help=f"any other needs a token in {TOKEN_VARIABLE} (127.0.0.1)")
    parser.add_argument("--port", type=count, default=8000, help="0: one that is free (8000)")
    parser.add_argument("--partitions", metavar="A..B", help="from shard A to shard B; or A,C; or one (default: all)")
    parser.add_argument("--variant", help="where the cache has several")
    parser.add_argument(
        "--not-kept",
        choices=("refuse", "null"),
        default="refuse",
        help="rows that a cache of some positions does not keep: an error, or null, for trainers that ask for whole "
        "sequences and use their completions (refuse)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="for prompts that are text (default: the cache's)"
    )
    parser.add_argument("--processes", type=count, default=2, help="that answer (2)")
    parser.add_argument(
        "--max-answer", type=count, metavar="N", help="log-probabilities in one answer (2,097,152; about 60 bytes each)"
    )


def _run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0 then."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    serving = serving_plane("kd_assets.replay.serving")
    if not arguments.processes:
        raise RecipeError("--processes 0 would answer nothing: give at least 1")
    limits = Limits()
    if arguments.max_answer is not None:
        limits = Limits(answer_logprobs=arguments.max_answer)
    recipe_folder = recipe_folder_of(arguments.recipe)
    options = serving.ServeOptions(
        recipe_folder=recipe_folder,
        variant=arguments.variant,
        partition_keys=selected_partitions(recipe_folder, arguments.partitions, ("topk_cache",)),
        not_kept=arguments.not_kept,
        tokenizer=arguments.tokenizer,
        host=arguments.host,
        port=arguments.port,
        processes=arguments.processes,
        limits=limits,
    )
    # From the environment: what stands on a command line, every user of the machine can read.
    token = os.environ.get(TOKEN_VARIABLE) or None
    on_progress = functools.partial(_indexing, Progress(every_s=INDEXING_EVERY_S))
    serving.serve(options, token=token, say=show, on_progress=on_progress)
    return 0


def _indexing(progress: Progress, n_documents: int, of_documents: int) -> None:
    progress.tell(lambda _: f"serve: {n_documents:,} of {of_documents:,} documents are indexed")


SERVE = Subcommand(
    name="serve",
    description="answer from a recipe's top-k cache what trainers ask of an online teacher (as vLLM and TRL do); of a "
    "cache with a vocabulary: log-probabilities over its token ids, and in vLLM's answer outside_mass, of all others",
    add_arguments=_arguments,
    run=_run,
)

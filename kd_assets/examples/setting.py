"""What the examples train, and on what: a student, and a recipe's documents in two parts. Replace it by your own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, random_split
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kd_assets.errors import InputError
from kd_assets.student.dataset import Sample, TeacherCacheDataset
from kd_assets.student.runner import vocabulary_of

HELD_OUT_SHARE = 0.1
SMALLEST_DATA_SET = 20
"""Documents: a batch of 16 to train on, and two to measure on."""


def argument_parser(description: str) -> argparse.ArgumentParser:
    """What every example is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe_folder", type=Path, help="a recipe's folder in the store, such as var/store/demo")
    parser.add_argument("--to", type=Path, required=True, help="folder for the trained student")
    parser.add_argument(
        "--student", type=Path, help="a model with the teacher's token ids (default: a new, small Llama)"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, help="default: 5e-3, and 2e-5 for a --student of yours")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a document (default: %(default)s)")
    return parser


def parsed_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.learning_rate is None:
        arguments.learning_rate = 5e-3 if arguments.student is None else 2e-5
    return arguments


def setting_of(arguments: argparse.Namespace) -> tuple[Any, Dataset[Sample], Dataset[Sample]]:
    """The student, and documents to train it and to measure it on: the same ones every time.

    Raises InputError where there are too few, and what `TeacherCacheDataset.from_recipe` raises.
    """
    dataset = TeacherCacheDataset.from_recipe(
        arguments.recipe_folder, assets=("topk_cache",), max_length=arguments.max_length
    )
    if len(dataset) < SMALLEST_DATA_SET:
        raise InputError(
            f"{arguments.recipe_folder} has {len(dataset)} documents with a top-k cache: an example needs "
            f"{SMALLEST_DATA_SET} to train on some and measure on others; materialize more partitions"
        )
    parts = random_split(dataset, [1 - HELD_OUT_SHARE, HELD_OUT_SHARE], torch.Generator().manual_seed(0))
    if arguments.student is not None:
        return AutoModelForCausalLM.from_pretrained(arguments.student), *parts
    torch.manual_seed(0)
    return small_student(vocabulary_of(dataset)), *parts


def small_student(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )

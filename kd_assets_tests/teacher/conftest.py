"""One thread for tiny models: threads that wait for each other are what is slow on a busy machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(autouse=True)
def compiler_for_compiled_tests(request: pytest.FixtureRequest) -> None:
    """What the product does without a compiler, or with one that fails, has tests of its own."""
    if request.node.get_closest_marker("compiler") is None:
        return
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if any(character.isspace() for character in torch.__file__):
        pytest.skip("torch is in a folder with a space, which its compiler's command line does not quote")

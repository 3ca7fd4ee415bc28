"""The writer's thread: errors come back as they were, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kd_assets.errors import InterruptedTaskError, StorageUnavailableError
from kd_assets.store import ResultWriter, encode_embeddings, plan_output
from kd_assets.teacher.partition.part_writer import PartToWrite, PartWriter
from kd_assets_tests.teacher.tiny import RECIPE, tiny_documents

DOCUMENTS = tiny_documents([2, 3])


def table() -> pa.Table:
    states = np.zeros((2, 4), np.float32)
    return encode_embeddings(DOCUMENTS, mean_DH=states, last_token_DH=states)


def broken() -> pa.Table:
    raise StorageUnavailableError("disk full: make room, then run again")


@pytest.fixture
def result(tmp_path: Path) -> ResultWriter:
    folder = tmp_path / "store" / RECIPE
    output = plan_output("embedding_cache", {"input": "x"}, recipe_folder=folder, partition_key="shard-00000")
    return ResultWriter(output, recipe=RECIPE, recipe_folder=folder, partition_key="shard-00000")


def part(result: ResultWriter, index: int, encode: Callable[[], pa.Table] = table) -> PartToWrite:
    return PartToWrite(
        result=result,
        asset="embedding_cache",
        index=index,
        n_tokens=5,
        token_budget=128,
        codec="plain",
        encode=encode,
    )


def put_and_raise(item: PartToWrite, error: Exception) -> None:
    """A producer that fails after one part."""
    with PartWriter() as writer:
        writer.put(item)
        raise error


def test_parts_are_on_disk_when_the_writer_is_left(result: ResultWriter) -> None:
    with result:
        with PartWriter() as writer:
            for index in range(5):
                writer.put(part(result, index))
        assert sorted(result.finished) == [0, 1, 2, 3, 4]
        assert {record.stats["min_token_budget"] for record in result.finished.values()} == {128.0}


def test_error_of_the_thread_reaches_the_producer_while_the_queue_is_full(result: ResultWriter) -> None:
    failing = threading.Event()

    def fails_late() -> pa.Table:
        assert failing.wait(180)
        return broken()

    def produce() -> None:
        with PartWriter(queued_parts=1) as writer:
            writer.put(part(result, 0, fails_late))
            writer.put(part(result, 1))
            failing.set()
            for index in range(2, 1000):
                writer.put(part(result, index))

    with result:
        with pytest.raises(StorageUnavailableError, match="disk full") as e:
            produce()
        assert type(e.value) is StorageUnavailableError
        assert dict(result.finished) == {}, "nothing is written behind a failed part"


def test_error_of_the_last_part_is_raised_on_leaving(result: ResultWriter) -> None:
    with result:
        with pytest.raises(StorageUnavailableError):
            with PartWriter() as writer:
                writer.put(part(result, 0, broken))


def test_programming_errors_keep_their_type(result: ResultWriter) -> None:
    def divide() -> pa.Table:
        raise ZeroDivisionError

    with result:
        with pytest.raises(ZeroDivisionError):
            with PartWriter() as writer:
                writer.put(part(result, 0, divide))


def test_parts_already_put_are_written_when_the_producer_fails(result: ResultWriter) -> None:
    with result:
        with pytest.raises(KeyError):
            put_and_raise(part(result, 0), KeyError())
        assert list(result.finished) == [0]


def test_failed_disk_outweighs_a_request_to_stop_but_not_the_producers_own_error(result: ResultWriter) -> None:
    with result:
        with pytest.raises(StorageUnavailableError):
            put_and_raise(part(result, 0, broken), InterruptedTaskError())
        with pytest.raises(KeyError):
            put_and_raise(part(result, 0, broken), KeyError())

"""The collector's thread: results arrive in order and complete, errors come back as they were, nobody waits for ever.

What only a stream of a GPU does is a function of its own (`copier`); a device that takes its time stands in for it.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch

from kd_assets.errors import InterruptedTaskError, NonFiniteTeacherError
from kd_assets.teacher.batch.engine import BlockStates, StepResult
from kd_assets.teacher.batch.transfer import Collector, Copy, copier

CPU = torch.device("cpu")
WAIT_S = 180


def result(number: int, device: torch.device = CPU) -> StepResult:
    """A result that carries a number."""
    bits_NH = torch.full((2, 3), number, dtype=torch.int16, device=device)
    finite_N = torch.ones(2, dtype=torch.bool, device=device)
    return StepResult(blocks={0: BlockStates(bits_NH=bits_NH, finite_N=finite_N)}, pooled=None, topk=None)


def number_of(found: StepResult) -> int:
    return int(found.blocks[0].bits_NH[0, 0])


class SlowDevice:
    """Copies are complete when the test says so: until then they hold nothing."""

    def __init__(self) -> None:
        self.complete = threading.Event()

    def start_copy(self, source: StepResult) -> Copy:
        on_host = source.moved(torch.zeros_like)

        def wait() -> None:
            assert self.complete.wait(WAIT_S)
            on_host.blocks[0].bits_NH.copy_(source.blocks[0].bits_NH)

        return Copy(result=on_host, wait=wait)


def test_results_are_kept_in_order_and_only_when_they_are_complete() -> None:
    device, kept = SlowDevice(), []
    with Collector(device.start_copy) as collector:
        collector.submit(result(1), lambda found: kept.append(number_of(found)))
        collector.submit(result(2), lambda found: kept.append(number_of(found)))
        collector.then(lambda: kept.append(0))
        assert kept == []
        device.complete.set()
    assert kept == [1, 2, 0]


def test_the_producer_waits_while_the_queue_is_full() -> None:
    device, launched = SlowDevice(), []

    def produce() -> None:
        with Collector(device.start_copy, queued_results=2) as collector:
            for n in range(6):
                collector.submit(result(n), lambda found: None)
                launched.append(n)

    producer = threading.Thread(target=produce)
    producer.start()
    producer.join(0.2)
    assert len(launched) <= 3, "one in hand, two that wait"
    device.complete.set()
    producer.join(WAIT_S)
    assert launched == list(range(6))


def test_memory_of_the_device_is_held_until_the_copy_is_complete_and_not_longer() -> None:
    device = SlowDevice()
    with Collector(device.start_copy) as collector:
        source = result(1)
        on_device = weakref.ref(source.blocks[0].bits_NH)
        collector.submit(source, lambda found: None)
        del source
        gc.collect()
        assert on_device() is not None
        device.complete.set()
        collector.flush()
        gc.collect()
        assert on_device() is None, "while the thread waits for the next"


def failing(error: BaseException) -> Callable[[StepResult], None]:
    def keep(found: StepResult) -> None:
        raise error

    return keep


def test_an_error_reaches_the_producer_at_its_next_result_even_when_the_queue_is_full() -> None:
    error, kept = NonFiniteTeacherError("document 'a'"), []

    def produce() -> None:
        with Collector(copier(CPU), queued_results=1) as collector:
            collector.submit(result(0), failing(error))
            for n in range(1, 1000):
                collector.submit(result(n), lambda found: kept.append(number_of(found)))

    with pytest.raises(NonFiniteTeacherError) as e:
        produce()
    assert e.value is error
    assert kept == [], "nothing is kept behind a failed result"


def test_an_error_of_the_last_result_is_raised_on_flushing_and_on_leaving() -> None:
    def produce(*, flush: bool) -> None:
        with Collector(copier(CPU)) as collector:
            collector.submit(result(0), failing(ZeroDivisionError()))
            if flush:
                collector.flush()
                raise AssertionError("flush said nothing")

    for flush in (False, True):
        with pytest.raises(ZeroDivisionError):
            produce(flush=flush)


def test_an_error_of_the_copy_is_an_error_and_the_thread_goes_on_dropping() -> None:
    def lost(source: StepResult) -> Copy:
        def wait() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return Copy(result=source, wait=wait)

    def produce() -> None:
        with Collector(lost, queued_results=1) as collector:
            for n in range(100):
                collector.submit(result(n), lambda found: None)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        produce()


def submit_and_raise(keep: Callable[[StepResult], None], error: Exception) -> None:
    """A producer that fails after one result."""
    with Collector(copier(CPU)) as collector:
        collector.submit(result(7), keep)
        raise error


def test_what_was_submitted_is_kept_when_the_producer_fails() -> None:
    kept: list[int] = []
    with pytest.raises(KeyError):
        submit_and_raise(lambda found: kept.append(number_of(found)), KeyError())
    assert kept == [7]


def test_an_error_outweighs_a_request_to_stop_but_not_the_producers_own_error() -> None:
    with pytest.raises(ZeroDivisionError):
        submit_and_raise(failing(ZeroDivisionError()), InterruptedTaskError())
    with pytest.raises(KeyError):
        submit_and_raise(failing(ZeroDivisionError()), KeyError())


@pytest.mark.gpu
def test_results_of_a_gpu_arrive_complete_while_it_works_on() -> None:
    cuda = torch.device("cuda")
    kept: list[int] = []
    finished_early: list[bool] = []
    with Collector(copier(cuda)) as collector:
        for n in range(20):
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
            submitted = result(n, cuda)
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
            collector.submit(submitted, lambda found: kept.append(number_of(found)))
            finished_early.append(torch.cuda.current_stream().query())
    assert kept == list(range(20))
    assert not any(finished_early), "the producer never waits for the device"


@pytest.mark.gpu
def test_pinned_copies_are_of_what_was_there_when_they_were_submitted() -> None:
    """Memory that the next step writes to is not the result's; 64 results of 16 MiB go through few pieces of memory."""
    cuda = torch.device("cuda")
    kept: list[bool] = []

    def check(n: int, found: StepResult) -> None:
        kept.append(bool((found.blocks[0].bits_NH == n).all()))

    with Collector(copier(cuda)) as collector:
        for n in range(64):
            bits_NH = torch.full((2048, 4096), n, dtype=torch.int16, device=cuda)
            block = BlockStates(bits_NH=bits_NH, finite_N=torch.ones(2048, dtype=torch.bool, device=cuda))
            one = StepResult(blocks={0: block}, pooled=None, topk=None)
            collector.submit(one, partial(check, n))
            del bits_NH, block, one
    assert kept == [True] * 64

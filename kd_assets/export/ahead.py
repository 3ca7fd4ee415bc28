"""What an export reads next, made ready by a thread while a section is written: partitions opened, parts verified.

The invariant: a section is handed out only after all bytes of its part were found to be what was committed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from kd_assets.export.joined import JoinedPartition
from kd_assets.export.planning import PlannedSection

_SECTIONS_AHEAD = 2
"""More would only fill the page cache with what is read much later."""

Ready = tuple[PlannedSection, JoinedPartition | None]


class SectionsAhead:
    """All sections in order, each with its partition; None with one that is finished already, which nobody reads.

    Begins at once, so that what takes long before the first section is written (counting tokens) takes no longer.
    """

    def __init__(
        self,
        sections: Sequence[PlannedSection],
        *,
        open_partition: Callable[[str], JoinedPartition],
        is_finished: Callable[[PlannedSection], bool],
    ) -> None:
        """`open_partition`: of a key; called by the thread, once for sections side by side."""
        self._open_partition, self._is_finished = open_partition, is_finished
        self._left = iter(sections)
        self._opened: JoinedPartition | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ready: deque[Future[Ready]] = deque()
        self._begin_until(_SECTIONS_AHEAD)

    def __enter__(self) -> SectionsAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Ready]:
        """Raises what opening or verifying failed with, when it is that section's turn."""
        read: JoinedPartition | None = None
        while self._ready:
            section, partition = self._ready.popleft().result()
            self._begin_until(_SECTIONS_AHEAD)
            if read is not None and partition is not None and partition is not read:
                read.close()
            read = partition or read
            yield section, partition

    def _begin_until(self, n: int) -> None:
        while len(self._ready) < n and (section := next(self._left, None)) is not None:
            self._ready.append(self._thread.submit(self._make_ready, section))

    def _make_ready(self, section: PlannedSection) -> Ready:
        if self._is_finished(section):
            return section, None
        if self._opened is None or self._opened.partition_key != section.partition_key:
            self._opened = self._open_partition(section.partition_key)
        self._opened.require_part_unchanged(section.part)
        return section, self._opened

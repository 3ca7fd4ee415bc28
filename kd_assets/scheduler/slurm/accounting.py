"""sacct, where a site has it. It only ever explains: whether a job lives is asked of the queue."""

from __future__ import annotations

from collections.abc import Sequence

from kd_assets.errors import SchedulerError, SchedulerMisusedError
from kd_assets.scheduler.job import AccountedAttempt
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.parsing import AccountingRow
from kd_assets.scheduler.slurm.records import Array


class Accounting:
    """What a site's accounting says of arrays; nothing where there is none, or it does not answer."""

    def __init__(self, slurm: Slurm) -> None:
        self._slurm, self._is_there = slurm, True

    def rows(self, arrays: Sequence[Array]) -> list[AccountingRow]:
        """Every attempt of every task, oldest first."""
        if not self._is_there or not arrays:
            return []
        try:
            rows = self._slurm.accounting(sorted(a.name for a in arrays), since=min(a.at for a in arrays))
        except SchedulerMisusedError:
            raise
        except SchedulerError:  # no answer, or one that does not help
            return []
        self._is_there = rows is not None
        return rows or []

    def attempts(self, arrays: Sequence[Array]) -> dict[int, list[AccountedAttempt]]:
        """Task → its attempts, oldest first."""
        first_task = {a.name: a.first_task for a in arrays}
        attempts: dict[int, list[AccountedAttempt]] = {}
        for row in self.rows(arrays):
            attempts.setdefault(first_task[row.name] + (row.index or 0), []).append(
                AccountedAttempt(
                    state=row.state,
                    elapsed_s=row.elapsed_s,
                    cpu_s=row.cpu_s,
                    n_cpus=row.n_cpus,
                    max_rss_gib=row.max_rss_gib,
                )
            )
        return attempts

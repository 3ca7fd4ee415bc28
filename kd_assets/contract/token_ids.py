"""A set of token ids, as the runs that it is made of: what a student's vocabulary is to a cache.

Standard library only: the control plane finds the set, the job file carries it, nodes cut by it, results name it.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass

from kd_assets.errors import ContractError


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """Equal sets are equal, and have equal JSON. Raises ContractError for runs that are not as below."""

    runs: tuple[tuple[int, ...], ...]
    """`(first, end)` of each run of consecutive ids, without its end: ascending, and never touching the next one."""

    def __post_init__(self) -> None:
        flat = [-1, *itertools.chain.from_iterable(self.runs)]
        ascends = all(before < after for before, after in itertools.pairwise(flat))
        if not self.runs or any(len(run) != 2 for run in self.runs) or not ascends:
            raise ContractError(f"token ids are runs [first, end) in ascending order, found {self.runs!r:.200}")

    @staticmethod
    def below(n: int) -> TokenIds:
        """The ids 0 to n - 1."""
        return TokenIds(runs=((0, n),))

    @staticmethod
    def of(ids: Iterable[int]) -> TokenIds:
        """These ids, in any order."""
        runs: list[tuple[int, int]] = []
        for token_id in sorted(set(ids)):
            if runs and runs[-1][1] == token_id:
                runs[-1] = (runs[-1][0], token_id + 1)
            else:
                runs.append((token_id, token_id + 1))
        return TokenIds(runs=tuple(runs))

    def __contains__(self, token_id: int) -> bool:
        at = bisect.bisect_right(self.runs, token_id, key=lambda run: run[0])
        return at > 0 and token_id < self.runs[at - 1][1]

    def __len__(self) -> int:
        return sum(end - first for first, end in self.runs)

    def cut(self, size: int) -> TokenIds | None:
        """Those below `size`; None where there are none."""
        runs = tuple((first, min(end, size)) for first, end in self.runs if first < size)
        return TokenIds(runs=runs) if runs else None

    @property
    def size_if_whole(self) -> int | None:
        """n, where these are the ids 0 to n - 1; else None."""
        ((first, end), *others) = self.runs
        return end if first == 0 and not others else None

    def to_json(self) -> bytes:
        """The runs in the order of their ids, without spaces: what is hashed, and what lies beside a result."""
        return json.dumps(self.runs, separators=(",", ":")).encode() + b"\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    def in_identity(self) -> int | dict[str, int | str]:
        """As a cache's parameters have them: n for the ids 0 to n - 1, else how many they are and the hash of
        `to_json`."""
        size = self.size_if_whole
        return size if size is not None else {"n_ids": len(self), "sha256": self.sha256}

"""What a process that answers does: the bytes of a request in, the status and the bytes of its answer out.

It is a function of the request and of the cache that was opened before the process was forked off; nothing is raised.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kd_assets.errors import KdAssetsError, NotInCacheError, RefusedRequestError, StorageUnreachableError
from kd_assets.replay.cache import ReplayCache
from kd_assets.replay.requests import Limits, parsed_object
from kd_assets.replay.tokens import Tokens
from kd_assets.replay.trl_protocol import answer_sequences, parse_sequences
from kd_assets.replay.vllm_protocol import ModelNames, answer_completions, error_body, parse_completions

log = logging.getLogger(__name__)

COMPLETIONS = "/v1/completions"
SEQUENCE_LOGPROBS = "/get_sequence_logprobs/"

_PARENT_LOOKED_FOR_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to one request."""

    status: int
    body: bytes
    n_positions: int = 0
    is_miss: bool = False
    """Whether what was asked is not in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """All that an answer is made from."""

    cache: ReplayCache
    tokens: Tokens
    names: ModelNames
    limits: Limits

    def answer(self, route: str, body: bytes, now: int, answer_id: str) -> Answer:
        """The answer to a request at a route; errors are answers, too, and quote nothing of request or cache."""
        try:
            said, n_positions = self._answered(route, body, now, answer_id)
        except NotInCacheError as e:
            return Answer(status=e.status, body=error_body(str(e), status=e.status), is_miss=True)
        except RefusedRequestError as e:
            return Answer(status=e.status, body=error_body(str(e), status=e.status))
        except StorageUnreachableError:
            log.exception("the cache cannot be reached")
            return Answer(status=503, body=error_body("the cache's files cannot be reached now: ask again", status=503))
        except KdAssetsError:
            log.exception("the cache cannot be read")
            return Answer(status=500, body=error_body("the cache cannot be read: see the server's log", status=500))
        except Exception:
            log.exception("a request to %s failed", route)
            return Answer(status=500, body=error_body("the server failed: see its log", status=500))
        return Answer(status=200, body=said, n_positions=n_positions)

    def _answered(self, route: str, body: bytes, now: int, answer_id: str) -> tuple[bytes, int]:
        raw = parsed_object(body)
        if route == SEQUENCE_LOGPROBS:
            return answer_sequences(parse_sequences(raw, cache=self.cache, limits=self.limits), cache=self.cache)
        request = parse_completions(raw, cache=self.cache, tokens=self.tokens, limits=self.limits, names=self.names)
        model = self.names.known[0]
        return answer_completions(
            request, cache=self.cache, tokens=self.tokens, model=model, now=now, answer_id=answer_id
        )


_desk: Desk | None = None
"""Of this process, which was forked off one that had it."""


def start_answering(desk: Desk, parent: int, listening: socket.socket) -> None:
    """Make this process one that answers, until its parent is gone.

    It lets go of the parent's socket: the port is free as soon as the parent is gone.

    In a group of its own: a signal to the parent's group is the parent's to follow, once what is under way is answered.
    """
    global _desk  # noqa: PLW0603 - what a pool calls in its processes finds nothing else there
    _desk = desk
    listening.close()
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(parent, os.getppid, time.sleep), daemon=True).start()


def answer_here(route: str, body: bytes, now: int, answer_id: str) -> Answer:
    """The answer of this process's desk."""
    assert _desk is not None, "the process was not started by start_answering"
    return _desk.answer(route, body, now, answer_id)


def process_id() -> int:
    """Of the process that answers: asked once of each, so that all of them have started."""
    return os.getpid()


def _end_with(parent: int, parent_now: Callable[[], int], sleep: Callable[[float], None]) -> None:
    while parent_now() == parent:
        sleep(_PARENT_LOOKED_FOR_EVERY_S)
    os._exit(0)

"""TCP ports for servers that a test starts. Standard library only."""

from __future__ import annotations

import contextlib
import random
import socket


def reserve_ports(n: int, *, until: contextlib.ExitStack) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens, for whatever is started on them while `until` is open.

    Below the range from which connections get theirs, so that nobody takes the port of a server that is still starting,
    or was killed. And whoever asks this function beside us, in any process, gets others: a name in Linux's abstract
    namespace is one socket's, and gone with it.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_000), 1000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0kd-assets-tests-port-{port}")
            with socket.socket() as tcp:
                tcp.bind(("127.0.0.1", port))
            until.enter_context(stack.pop_all())
            found.append(port)
        if len(found) == n:
            return found
    raise OSError("no free ports between 10000 and 32000")

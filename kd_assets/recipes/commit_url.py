"""Where a recipe's file is to be seen in the repository that it is checked out from: a URL of its commit.

As `dagster.link_code_references_to_git` writes them, for GitHub and GitLab. It informs: whatever git cannot say is no
link. A remote's URL may hold a password, which is left out.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import quote

_SSH = re.compile(r"^(?:ssh://)?(?:[^@/:]+@)?(?P<host>[A-Za-z0-9.-]+)(?P<apart>:\d+/|[:/])(?P<path>.+?)(?:\.git)?/?$")
_HTTP = re.compile(r"^(?P<scheme>https?)://(?:[^@/]*@)?(?P<host>[A-Za-z0-9.:-]+)/(?P<path>.+?)(?:\.git)?/?$")
_TREE = {"github": "tree", "gitlab": "-/tree"}
GIT_S = 5.0
"""How long git may take: definitions are waited for."""


def commit_url(file: Path, *, line: int | None = None) -> str | None:
    """The URL of a file's line in the commit that is checked out; None for a file that git does not have, and where
    there is no remote of GitHub or GitLab."""
    # First what most projects lack: definitions wait for each of these processes.
    remote = _git(file.parent, "remote", "get-url", "origin")
    page = None if remote is None else web_page(remote)
    tracked = None if page is None else _git(file.parent, "ls-files", "-z", "--full-name", "--", file.name)
    commit = None if tracked is None else _git(file.parent, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    return f"{page}/{commit}/{quote(tracked)}" + (f"#L{line}" if line else "")


def web_page(remote: str) -> str | None:
    """Where a remote's commits are to be seen, without its user and password; None where that is not known."""
    found = _HTTP.match(remote) or _SSH.match(remote)
    if found is None or (remote.startswith("ssh://") != (found.groupdict().get("apart", ":") != ":")):
        return None  # a folder, or words that git reads otherwise
    host, path = found["host"], found["path"].lstrip("/")
    tree = next((tree for name, tree in _TREE.items() if name in host), None)
    return None if tree is None else f"{found.groupdict().get('scheme', 'https')}://{host}/{path}/{tree}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        said = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=GIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip("\0\n") or None if said.returncode == 0 else None

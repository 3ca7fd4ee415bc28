"""What a file of columns was when it was planned: known without reading its rows."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

from kd_assets.sources.files.columns.batches import arrow_errors, iter_messages
from kd_assets.sources.files.storage import size_of

WHOLE_BYTES = 32 << 20
"""A file up to this is hashed whole: that takes a tenth of a second."""
N_BLOCKS = 32
BLOCK_BYTES = 64 << 10


def file_identity(f: BinaryIO, path: str, file_format: str) -> str:
    """`sha256:` and the hash of the whole file, up to `WHOLE_BYTES`; of a larger one `sample:` and a SHA-256 over its
    size, what it says of its content (the footer of Parquet, every message's header of Arrow) and `N_BLOCKS` blocks of
    `BLOCK_BYTES`, evenly spread.

    Every ordinary way to write other content is seen: the footer and the headers hold the number, place and size of all
    that follows, and most writers statistics besides. What is not seen is a byte changed in place between the blocks,
    which leaves all sizes as they are: an edit by hand, or a disk that fails without a word (Parquet's own page
    checksums are for that).
    """
    n_bytes = size_of(f)
    if n_bytes <= WHOLE_BYTES:
        return f"sha256:{_sha256(f)}"
    digest = hashlib.sha256(f"{file_format} {n_bytes}\n".encode())
    with arrow_errors(path, file_format):
        if file_format == "parquet":
            f.seek(n_bytes - 8)
            footer_bytes = int.from_bytes(f.read(4), "little") + 8  # its length and the magic end the file
            f.seek(max(0, n_bytes - footer_bytes))
            digest.update(f.read())
        else:
            for message in iter_messages(f, path):
                digest.update(message.header)
    for i in range(N_BLOCKS):
        f.seek((n_bytes - BLOCK_BYTES) * i // (N_BLOCKS - 1))
        digest.update(f.read(BLOCK_BYTES))
    return f"sample:{digest.hexdigest()}"


def _sha256(f: BinaryIO) -> str:
    digest = hashlib.sha256()
    while data := f.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()

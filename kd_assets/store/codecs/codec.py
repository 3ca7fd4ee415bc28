"""What a codec is, which there are, and the two ways through one: a table into its stored form, and back.

A part's schema names its codec in `kd_assets.codec`, and in `kd_assets.codec_since` the first version of kd_assets that
reads it; without the two the columns are as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

import kd_assets
from kd_assets.contract import Asset
from kd_assets.errors import UnknownCodecError
from kd_assets.store.codecs.coded import Coded
from kd_assets.store.codecs.state_codec import CODED, RAW
from kd_assets.store.codecs.state_columns import CodedStates
from kd_assets.store.codecs.topk_columns import CompactTopk
from kd_assets.store.codecs.topk_schema import COMPACT, COMPACT_2

PLAIN = "plain"
"""The columns as they are."""

CODEC_KEY = b"kd_assets.codec"
SINCE_KEY = b"kd_assets.codec_since"


class Codec(Protocol):
    """One way of storing an asset's columns. Everything is of whole documents; rows and their order stay."""

    def plain_schema(self, stored: pa.Schema) -> pa.Schema:
        """What a reader gets of a part with this schema. Raises ValueError or KeyError for one that is not of it."""

    def stored_names(self, stored: pa.Schema, names: Sequence[str]) -> list[str]:
        """The columns of the file that these columns of the plain schema are made of."""

    def decode(self, stored: pa.Table, wanted: pa.Schema, *, vocabulary: int | None) -> pa.Table:
        """Some columns of the plain schema, by the `stored_names` of some rows. Raises ValueError for bytes that
        `encode` does not write; `vocabulary`: how many token ids the teacher has, where that is known."""

    def encode(self, plain: pa.Table) -> Coded:
        """The stored form of a plain table, and what readers will get of it. Raises CodecRangeError for numbers that
        the codec cannot hold."""


CODECS: dict[tuple[Asset, str], Codec] = {
    ("topk_cache", COMPACT): CompactTopk(),
    **{("hidden_state_cache", name): CodedStates(name) for name in CODED},
}
"""By the asset and the name in a recipe."""

LATER_FORMS: dict[tuple[Asset, str], Codec] = {("topk_cache", COMPACT_2): CompactTopk(COMPACT_2)}
"""Other forms of these, by the asset and the name in the schema of a part; results name their codec as recipes do."""


def coded(plain: pa.Table, codec: str) -> Coded:
    """The table as it will be stored, and what was made of it.

    Raises CodecRangeError for numbers that the codec cannot hold, UnknownCodecError for a name that no codec has.
    """
    if codec in (PLAIN, RAW):
        return Coded(stored=plain, decoded=plain)
    return _codec(_asset_of(plain.schema), codec, since=None).encode(plain)


def codec_of(stored: pa.Schema) -> Codec | None:
    """The codec that a part's schema names; None: its columns are as they are. Raises UnknownCodecError."""
    metadata = stored.metadata or {}
    if CODEC_KEY not in metadata:
        return None
    asset, name, since = _asset_of(stored), _text(metadata[CODEC_KEY]), metadata.get(SINCE_KEY)
    for (of_asset, known), codec in LATER_FORMS.items():
        if (of_asset, known) == (asset, name):
            return codec
    return _codec(asset, name, since=None if since is None else _text(since))


def stored_codec_name(stored: pa.Schema) -> str:
    """The codec that a part's schema names, known or not, as results name it; `plain` where its columns are as they
    are."""
    name = _text((stored.metadata or {}).get(CODEC_KEY, PLAIN.encode()))
    return COMPACT if name == COMPACT_2 else name


def plain_schema(stored: pa.Schema) -> pa.Schema:
    """What a reader gets of a part with this schema. Raises ValueError or KeyError for one that is not of its codec,
    UnknownCodecError."""
    codec = codec_of(stored)
    return stored if codec is None else codec.plain_schema(stored)


def require_known(asset: str, codec: object, *, made_by: object = None) -> None:
    """Raise UnknownCodecError unless results of this codec can be read. `made_by`: the version of kd_assets that made
    the result, where that was recorded."""
    if codec not in (PLAIN, RAW):
        _codec(asset, str(codec), since=made_by if isinstance(made_by, str) else None)


def plain_table(table: pa.Table, *, vocabulary: int | None = None) -> pa.Table:
    """The columns of FORMAT.md's F30 to F50 of a table that was read from a part file by pyarrow alone, whatever its
    codec. Raises ValueError for bytes that no encoder writes, UnknownCodecError."""
    codec = codec_of(table.schema)
    if codec is None:
        table.validate(full=True)  # of an Arrow file nothing else has looked at the offsets, which may lead anywhere
        return table
    return codec.decode(table, codec.plain_schema(table.schema), vocabulary=vocabulary)


def _codec(asset: str, name: str, *, since: str | None) -> Codec:
    for (of_asset, known), codec in CODECS.items():
        if (of_asset, known) == (asset, name):
            return codec
    names = ", ".join(
        [PLAIN if asset == "topk_cache" else RAW, *(known for of_asset, known in CODECS if of_asset == asset)]
    )
    reads = f"kd_assets {since} and later read it" if since else "the version of kd_assets that made it reads it"
    raise UnknownCodecError(
        f"a {asset} is of codec {name!r:.80}: {reads}; this is kd_assets {kd_assets.__version__}, which reads {names}: "
        "install a version that knows it"
    )


def _asset_of(schema: pa.Schema) -> str:
    return _text((schema.metadata or {}).get(b"kd_assets.asset", b""))


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")

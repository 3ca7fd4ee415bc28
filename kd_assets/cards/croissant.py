"""A card for machines: Croissant 1.1 (https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html), JSON-LD that
search engines of data sets and `mlcroissant` read.

The files of a cache are a set of files by patterns below the recipe's folder, where the card lies; columns are those
of its first part's schema. A cache whose rows no reader of Croissant knows (Arrow files, coded columns) has its files
and no columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_assets.cards.contents import CacheCard, Contents
from kd_assets.cards.front_matter import licences_of
from kd_assets.cards.parts import current_folders, is_plain, part_patterns, suffix_of
from kd_assets.durable import size_if_there, storage_errors
from kd_assets.errors import CorruptPartError, printable
from kd_assets.store.layout import part_name
from kd_assets.store.reading.parts import damage_named

CONFORMS_TO = "http://mlcommons.org/croissant/1.1"

_CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "arrayShape": "cr:arrayShape",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""That of the specification, which readers compare."""


def croissant(contents: Contents, *, description: str | None = None) -> dict[str, Any]:
    """The JSON-LD. Reads the schema of one part of each cache of Parquet files."""
    record_sets, files = [], []
    for cache in contents.caches:
        if not cache.summary.has_documents or not (includes := part_patterns(cache)):
            continue
        files.append(_files(cache, includes))
        if is_plain(cache):
            record_sets.append(_records(cache))
    licences = [printable(licence) for licence in licences_of(contents.sources)]
    return {
        "@context": dict(_CONTEXT),
        "@type": "sc:Dataset",
        "name": f"teacher-caches-{contents.recipe}",
        "description": printable(
            description or f"What a teacher says of every document of {contents.recipe}, for distillation."
        ),
        "conformsTo": CONFORMS_TO,
        "license": licences or ["not stated by the sources"],
        "version": _version(contents),
        "datePublished": contents.updated_at,
        "dateModified": contents.updated_at,
        "citeAs": f"Teacher caches of {contents.recipe}, made by kd_assets on {contents.updated_at[:10]}",
        "creator": {"@type": "sc:Organization", "name": "kd_assets"},
        "isLiveDataset": True,
        "keywords": ["knowledge distillation", "teacher cache"],
        "url": ".",
        "distribution": files,
        "recordSet": record_sets,
    }


def _version(contents: Contents) -> str:
    """As semantic versions are: a day, and a second in it."""
    day, _, time = contents.updated_at.partition("T")
    hours, minutes, seconds = (int(part) for part in time[:8].split(":"))
    year, month, of_month = (int(part) for part in day.split("-"))
    return f"{year}.{month * 100 + of_month}.{hours * 3600 + minutes * 60 + seconds}"


def _files(cache: CacheCard, includes: list[str]) -> dict[str, Any]:
    kind = "x-parquet" if suffix_of(cache) == ".parquet" else "vnd.apache.arrow.file"
    return {
        "@type": "cr:FileSet",
        "@id": f"{cache.asset}-files",
        "name": f"{cache.asset}-files",
        "description": f"The parts of {cache.asset}, by partition.",
        "encodingFormat": f"application/{kind}",
        "includes": includes,
    }


def _records(cache: CacheCard) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": cache.asset,
        "name": cache.asset,
        "description": printable(f"A record a document. Parameters: {cache.summary.params}"),
        "field": list(_fields(cache, _schema(cache))),
    }


def _schema(cache: CacheCard) -> pa.Schema:
    """That of a cache's first part. Raises CorruptPartError where it is none, or where there is no part."""
    first_parts = [folder / part_name(0, suffix_of(cache)) for folder in current_folders(cache)]
    part = next((path for path in first_parts if size_if_there(path) is not None), None)
    if part is None:
        raise CorruptPartError(f"{first_parts[0]} is missing, and so is that of every other partition: run verify")
    with storage_errors(part, "read"), damage_named(part):
        try:
            return pq.read_schema(part)
        except OSError as e:
            if e.errno is None:  # Arrow's own words: the file is not what it says
                raise CorruptPartError(f"{part} is damaged: {e}") from e
            raise


def _fields(cache: CacheCard, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    for column in schema:
        kind, shape = column.type, []
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            shape.append(kind.list_size if pa.types.is_fixed_size_list(kind) else -1)
            kind = kind.value_type
        said = (column.metadata or {}).get(b"convention", b"").decode(errors="replace")
        yield {
            "@type": "cr:Field",
            "@id": f"{cache.asset}/{column.name}",
            "name": column.name,
            "description": said or f"Column {column.name}: see FORMAT.md of kd_assets.",
            "dataType": _data_type(kind),
            **({"isArray": True, "arrayShape": ",".join(map(str, shape))} if shape else {}),
            "source": {"fileSet": {"@id": f"{cache.asset}-files"}, "extract": {"column": column.name}},
        }


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"

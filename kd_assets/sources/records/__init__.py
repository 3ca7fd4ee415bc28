"""Records: what makes one a document, and the hash over those of a shard.

Used by the planner (inside Dagster) and by the job that tokenises; imports neither torch nor transformers. The
invariant: the hash over a shard's records changes exactly when what its documents are made of changes.
"""

from kd_assets.sources.records.reading import file_of, parse_record, read_records
from kd_assets.sources.records.record import ROLES, Message, Record

__all__ = ["ROLES", "Message", "Record", "file_of", "parse_record", "read_records"]

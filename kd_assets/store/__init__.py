"""The store: how results lie on disk. FORMAT.md specifies it; everything that touches its files is in this package.

Needs pyarrow and numpy; imports neither torch nor dagster. Anyone may import the names below. The invariant: a result
exists exactly when its manifest does, and what a manifest says about the bytes beside it is true.
"""

from kd_assets.store.checking.checks import CheckResult, ResultFiles, check_all, check_files, check_rebuilt_with
from kd_assets.store.checking.report import Note, Problem, VerifyReport
from kd_assets.store.checking.verify import verify
from kd_assets.store.codecs.codec import coded, plain_table
from kd_assets.store.codecs.coded import Coded
from kd_assets.store.fingerprint import (
    FORMAT_VERSION,
    INPUT_KEY,
    canonical_json,
    fingerprint,
    plan_output,
    variant_of,
)
from kd_assets.store.layout import count_durable_files, result_folder
from kd_assets.store.manifest import Manifest, PartRecord, append_audit, committed, read_head, read_manifest
from kd_assets.store.quarantine import (
    PutAside,
    PutAsideByAsset,
    Quarantined,
    put_aside,
    put_result_aside,
    quarantine_in_words,
    still_put_aside,
)
from kd_assets.store.reading.chosen import Chosen, Missing, choose, variants_of
from kd_assets.store.reading.columns import Ragged
from kd_assets.store.reading.planned import PlannedPartitions, planned_partitions
from kd_assets.store.reading.reader import CacheReader
from kd_assets.store.reading.shard import Shard, read_shard
from kd_assets.store.recorded_checks import failed_check
from kd_assets.store.writing.documents import Documents, KeptPositions, PartPlan, plan_parts
from kd_assets.store.writing.encode import (
    encode_embeddings,
    encode_hidden_states,
    encode_shard,
    encode_topk,
    part_stats,
)
from kd_assets.store.writing.samples import SAMPLES_NAME, Samples
from kd_assets.store.writing.writer import ResultWriter, WrittenFile, commit_file_result, raise_if_busy, set_head

__all__ = [
    "FORMAT_VERSION",
    "INPUT_KEY",
    "SAMPLES_NAME",
    "CacheReader",
    "CheckResult",
    "Chosen",
    "Coded",
    "Documents",
    "KeptPositions",
    "Manifest",
    "Missing",
    "Note",
    "PartPlan",
    "PartRecord",
    "PlannedPartitions",
    "Problem",
    "PutAside",
    "PutAsideByAsset",
    "Quarantined",
    "Ragged",
    "ResultFiles",
    "ResultWriter",
    "Samples",
    "Shard",
    "VerifyReport",
    "WrittenFile",
    "append_audit",
    "canonical_json",
    "check_all",
    "check_files",
    "check_rebuilt_with",
    "choose",
    "coded",
    "commit_file_result",
    "committed",
    "count_durable_files",
    "encode_embeddings",
    "encode_hidden_states",
    "encode_shard",
    "encode_topk",
    "failed_check",
    "fingerprint",
    "part_stats",
    "plain_table",
    "plan_output",
    "plan_parts",
    "planned_partitions",
    "put_aside",
    "put_result_aside",
    "quarantine_in_words",
    "raise_if_busy",
    "read_head",
    "read_manifest",
    "read_shard",
    "result_folder",
    "set_head",
    "still_put_aside",
    "variant_of",
    "variants_of",
    "verify",
]

"""The seam between the planes: the job file, the events of its tasks, and the names both sides use.

Standard library only: a node needs no dagster, the service node no torch, and both import this. The invariant: what
one side writes the other reads whole, or refuses with a clear error.
"""

from kd_assets.contract.decode import decode, parse_json
from kd_assets.contract.events import (
    Event,
    EventType,
    Reporter,
    event_file,
    lease_file,
    parse_event,
    read_events,
    task_name,
)
from kd_assets.contract.job_file import (
    CACHES,
    CONTRACT_VERSION,
    STUDENT_HEAD_SIZE,
    Asset,
    Compression,
    EmbeddingParams,
    FileFormat,
    HiddenStateParams,
    JobFile,
    JobKind,
    Output,
    RecordRange,
    RecordShape,
    ShardsParams,
    StudentParams,
    TeacherOptions,
    TeacherParams,
    TopkParams,
    WorkUnit,
    contract_version_of,
    read_job,
)

__all__ = [
    "CACHES",
    "CONTRACT_VERSION",
    "STUDENT_HEAD_SIZE",
    "Asset",
    "Compression",
    "EmbeddingParams",
    "Event",
    "EventType",
    "FileFormat",
    "HiddenStateParams",
    "JobFile",
    "JobKind",
    "Output",
    "RecordRange",
    "RecordShape",
    "Reporter",
    "ShardsParams",
    "StudentParams",
    "TeacherOptions",
    "TeacherParams",
    "TopkParams",
    "WorkUnit",
    "contract_version_of",
    "decode",
    "event_file",
    "lease_file",
    "parse_event",
    "parse_json",
    "read_events",
    "read_job",
    "task_name",
]

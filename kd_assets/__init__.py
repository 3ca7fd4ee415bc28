"""Teacher caches for LLM distillation as partitioned Dagster assets, computed by SLURM jobs.

The names in `_MODULE_OF` are what this package promises (`kd_assets_tests/library/test_public_api.py` pins them),
beside the losses in `kd_assets.student.losses`. Each is imported when it is first asked for, since no environment has
all that they need: a service node has no torch, a cluster node no dagster. Their types are in `__init__.pyi`.
"""

from importlib import import_module
from importlib.util import find_spec

__version__ = "0.2.0"

_MODULE_OF = {
    "CacheReader": "kd_assets.store",
    "ExportOptions": "kd_assets.export.format",
    "KdAssetsError": "kd_assets.errors",
    "TeacherCacheDataset": "kd_assets.student.dataset",
    "TeacherCacheStream": "kd_assets.student.loading",
    "TeacherCaches": "kd_assets.components",
    "TrainingLoader": "kd_assets.student.loading",
    "collate": "kd_assets.student.dataset",
    "export_recipe": "kd_assets.export.exporting",
    "load_defs_folder": "kd_assets.definitions",
    "verify": "kd_assets.store",
}


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kd_assets' has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as e:
        extra = "control" if name in ("TeacherCaches", "load_defs_folder") else "compute"
        e.add_note(f"kd_assets.{name} needs it: pip install 'kd-assets[{extra}]'")
        raise


def __dir__() -> list[str]:
    """Of the promised names only the component, and only where Dagster is: it asks for every name that stands here, to
    find component types, whenever it loads definitions, and would load torch for the data sets."""
    return [*globals(), *(["TeacherCaches"] if find_spec("dagster") is not None else [])]

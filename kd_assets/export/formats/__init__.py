"""The formats by name: a module each, small, over the documents of `kd_assets.export.documents`.

A format is added by one line. None takes more than numpy and pyarrow to be written: this module is imported by the
command line, and an export is made wherever a store is.
"""

from collections.abc import Mapping

from kd_assets.export.format import ExportFormat
from kd_assets.export.formats.axolotl import Axolotl
from kd_assets.export.formats.distillkit import DistillKit
from kd_assets.export.formats.hf import HuggingFace
from kd_assets.export.formats.modelopt import ModelOpt
from kd_assets.export.formats.original import Original
from kd_assets.export.formats.safetensors import Safetensors
from kd_assets.export.formats.specforge import SpecForge
from kd_assets.export.formats.speculators import Speculators

_ALL: tuple[ExportFormat, ...] = (
    Axolotl(),
    DistillKit(),
    HuggingFace(),
    ModelOpt(),
    Original(),
    Safetensors(),
    SpecForge(),
    SpecForge("dflash"),
    Speculators(),
)

FORMATS: Mapping[str, ExportFormat] = {export_format.name: export_format for export_format in _ALL}

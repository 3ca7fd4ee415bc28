from kd_assets.components import TeacherCaches as TeacherCaches
from kd_assets.definitions import load_defs_folder as load_defs_folder
from kd_assets.errors import KdAssetsError as KdAssetsError
from kd_assets.export.exporting import export_recipe as export_recipe
from kd_assets.export.format import ExportOptions as ExportOptions
from kd_assets.store import CacheReader as CacheReader
from kd_assets.store import verify as verify
from kd_assets.student.dataset import TeacherCacheDataset as TeacherCacheDataset
from kd_assets.student.dataset import collate as collate
from kd_assets.student.loading import TeacherCacheStream as TeacherCacheStream
from kd_assets.student.loading import TrainingLoader as TrainingLoader

__version__: str

"""Reading caches for training: batches, exact epochs, and going on in the middle of one."""

from kd_assets.student.loading.batches import packed_batch, padded_batch
from kd_assets.student.loading.epoch import Shuffle
from kd_assets.student.loading.loader import TrainingLoader
from kd_assets.student.loading.stream import TeacherCacheStream

__all__ = ["Shuffle", "TeacherCacheStream", "TrainingLoader", "packed_batch", "padded_batch"]

"""What a `defs.yaml` can be: the component types of this project."""

from kd_assets.components.teacher_caches import TeacherCaches

__all__ = ["TeacherCaches"]

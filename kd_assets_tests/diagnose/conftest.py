"""The deployments of the orchestration's tests."""

from kd_assets_tests.orchestration.conftest import deploy, deployment, tiny_teacher

__all__ = ["deploy", "deployment", "tiny_teacher"]

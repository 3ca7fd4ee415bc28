"""Telling Dagster what is committed."""

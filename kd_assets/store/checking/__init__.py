"""Comparing what is on disk with what manifests say of it."""

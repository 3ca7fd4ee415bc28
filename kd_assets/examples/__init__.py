"""Students trained from a recipe's caches by common trainers: short programs to copy, each run by the tests.

They need torch, transformers and accelerate, as the nodes have them, and no dagster. Nothing in this project imports
them.
"""

"""Which records make which shard: sources are found, cut, mixed and named as a recipe's partitions.

Runs inside Dagster, so it imports neither torch nor transformers.
"""

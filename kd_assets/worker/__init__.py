"""A task of a job, on a node: reads its job file, runs its kind over its partitions, reports. Imports no dagster."""

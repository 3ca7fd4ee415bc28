"""Dagster's own storages, which write the events that come together in one transaction. Named in dagster.yaml.

As Dagster creates a run, it plans each partition of each asset with an event, and each partition of each check with a
row. Its storages write these one by one, with several connections and commits each, and every row with the names of all
partitions of the run: what a run writes before anything is submitted grows with the square of its partitions. Dagster
hands them over together where DAGSTER_EVENT_BATCH_SIZE says so; these take them together
(`dagster_internals.store_together`). What they write is what Dagster reads, so a deployment may change between these
and Dagster's own.

Whatever loads the instance imports them: web server, daemon, code servers, runs and the command line need `kd_assets`
in their environment. Only deployments import them.
"""

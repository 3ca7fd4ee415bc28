"""Source files: which there are, what they are, and their records as bytes that depend on nothing but the record.

`find` says which files a source is made of, `scan` reads one while it is planned, `read` gives a shard its own records.
Used by the planner (inside Dagster) and by the job that tokenises; imports neither torch nor transformers, and only
`find` knows of `datasets`. Memory holds one record or one batch of rows, never the file.
"""

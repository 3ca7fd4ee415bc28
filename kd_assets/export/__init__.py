"""Teacher caches in the formats of others' trainers: one module a format, over one iterator of joined documents."""

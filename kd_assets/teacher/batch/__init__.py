"""One batch: computed, reduced to what the caches keep, and brought to the host."""

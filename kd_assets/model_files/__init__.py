"""Where a model's files are and what they are, from the files alone: no torch, no network."""

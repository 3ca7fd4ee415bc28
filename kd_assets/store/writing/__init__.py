"""Writing a result: documents in memory, encoded into parts, the manifest last."""

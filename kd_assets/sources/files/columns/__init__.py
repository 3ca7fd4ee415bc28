"""Files of columns: Parquet, and Arrow as a stream or a file."""

"""Files of text: JSON Lines, JSON arrays, CSV and TSV, plain or compressed."""

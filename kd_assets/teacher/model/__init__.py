"""The loaded teacher, and what is proved of it."""

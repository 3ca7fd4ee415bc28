"""Getting missing results made: joining and submitting jobs, following them, trying again what may succeed."""

"""What a task's GPUs and processors did while it ran. Imports no torch."""

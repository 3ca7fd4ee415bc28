"""What a plan would cost before anything is spent on it: bytes, FLOPs, GPU-hours, energy, tasks, free space."""

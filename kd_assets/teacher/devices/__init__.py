"""The teacher on the devices of its process: placed, measured, compiled, one process or several."""

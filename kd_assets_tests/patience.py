"""How long tests wait for what must come. Standard library only."""

PATIENCE_S = 180.0
"""For anything, before its test fails: no measure of speed, however busy the machine is."""

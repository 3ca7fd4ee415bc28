"""The embedded scheduler: job arrays on this machine."""

"""What is missing or stale: the checks of a recipe as a whole, and when they are looked at."""

"""Reading committed results."""

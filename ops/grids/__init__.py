"""Recurrences over the two dimensions of a picture."""

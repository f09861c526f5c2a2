"""Checkpoints of other libraries: one file per foreign format, a table of them, and the reading of their files."""

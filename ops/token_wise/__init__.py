"""Operators that see one token at a time: norms, gates, rotations, dropout, the loss."""

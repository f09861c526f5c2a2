"""Associative memories that are trained while they read: their weights are the recurrent state."""

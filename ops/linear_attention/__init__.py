"""Operators with a matrix of keys and values as their state, and keys and queries that depend on the token."""

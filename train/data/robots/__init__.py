"""Demonstrations of robots, and the worlds in which a policy is tried."""

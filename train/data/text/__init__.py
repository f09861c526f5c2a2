"""Text of one's own, of Python or of the hub, cut into tokens."""

"""Real pictures with labels."""

"""Benchmarks that refuse to lie: speed is measured only of what gave the right numbers in the same run."""

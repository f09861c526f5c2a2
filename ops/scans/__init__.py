"""Scans of affine maps, and the scan by which nonlinear recurrences are solved."""

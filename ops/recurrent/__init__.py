"""Nonlinear recurrent cells, walked step by step or solved by Newton's method."""

"""State-space operators: selective scans, state-space duality, time-invariant systems."""

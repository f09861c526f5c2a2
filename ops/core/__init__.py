"""What every operator stands on: elements of the algebra, checks, chunks, the choice of a backend, proofs."""

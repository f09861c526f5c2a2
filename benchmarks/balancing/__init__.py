"""Studies of plans for uneven lengths, which training does not need: what plans cost on paper, and run in plain torch.

| file | its one idea |
|---|---|
| `simulate.py` | when the ranks of a plan are done; a bound that no plan in lockstep passes |
| `published.py` | coefficients that others have measured |
| `lengths.py` | how long documents are, in laws that were published |
| `offload.py` | activations moved to the host, so that a long sequence needs fewer ranks |
| `execute.py` | a plan run in plain torch, in rings of any ranks |

Scripts of `benchmarks/` import it as `balancing`; so do its tests, in `tests/train/balance/`.
"""

"""autoregressive_policy: what its proofs need."""

from case_table import EVERYTHING, ModelCase

MODELS = {
    "autoregressive_policy": ModelCase(fields={"n_heads": 2, "n_slots": 6}),
    "autoregressive_policy, deltanet": ModelCase(
        fields={"pattern": "deltanet(n_heads=2)", "n_slots": 6, "ends": True},
        name="autoregressive_policy",
        tier=EVERYTHING,
    ),
}

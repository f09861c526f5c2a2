"""beast: what its proofs need."""

from case_table import EVERYTHING, ModelCase

MODELS = {
    "beast": ModelCase(fields={"n_heads": 2, "n_slots": 6}),
    "beast, hydra": ModelCase(
        fields={"pattern": "hydra(head_dim=16, d_state=4)", "n_slots": 6}, name="beast", tier=EVERYTHING
    ),
}

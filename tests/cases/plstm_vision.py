"""plstm_vision: what its proofs need."""

from case_table import VisionCase

SMALL = {"n_heads": 2, "image_size": 8, "patch_size": 2, "channels": 2, "n_classes": 5, "gate_std": 0.3}
PUBLISHED = {"t": 6_314_404, "s": 23_272_288, "b": 89_121_496, "arrow": 5_551_610}

MODELS = {
    "plstm_vision": VisionCase(fields=SMALL, published=PUBLISHED),
    "plstm_vision, stages": VisionCase(
        fields=SMALL | {"depths": (1, 1), "patch_size": 1, "pooling": "mean", "p_mode": "official", "chirality": "R"},
        name="plstm_vision",
    ),
}

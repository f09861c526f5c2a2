"""vit: what its proofs need."""

from case_table import VisionCase

SMALL = {"n_heads": 2, "image_size": 8, "patch_size": 2, "channels": 2, "n_classes": 5}

MODELS = {
    "vit": VisionCase(fields=SMALL, published={"ti": 5_717_416, "s": 22_050_664, "b": 86_567_656}),
    "vit, stages": VisionCase(fields=SMALL | {"depths": (1, 1), "pooling": "mean"}, name="vit"),
    "vit, pattern": VisionCase(
        fields=SMALL | {"pattern": "hydra(head_dim=16, d_state=4), mamba", "pooling": "mean"}, name="vit"
    ),
}

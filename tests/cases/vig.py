"""vig: what its proofs need."""

from case_table import EVERYTHING, VisionCase

SMALL = {"n_heads": 2, "image_size": 8, "patch_size": 2, "channels": 2, "n_classes": 5, "stem": "patches"}
PUBLISHED = {
    "t": 5_834_536, "s": 22_615_144, "b": 89_022_184, "h_t": 28_600_680, "h_s": 50_051_688, "h_b": 88_904_360,
}  # fmt: skip

MODELS = {
    "vig": VisionCase(fields=SMALL, published=PUBLISHED),
    "vig, stem": VisionCase(
        fields=SMALL | {"stem": "convolutions", "patch_size": 4, "activation": True}, name="vig", tier=EVERYTHING
    ),
    "vig, stages": VisionCase(
        fields=SMALL | {"patch_size": 1, "depths": (1, 1), "n_layers": 2, "positions": "none"},
        name="vig",
        tier=EVERYTHING,
    ),
}

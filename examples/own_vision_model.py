"""A vision model of one's own: a mixer that looks at neighbouring patches, in zoo's backbone, on handwritten digits.

    python examples/own_vision_model.py

It needs scikit-learn for the pictures: pip install 'seqzoo[images]'.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers import Mixer, VisionConfig, VisionModel
from zoo.train.data.images.digits_images import DigitsImages


class Neighbours(Mixer):
    """A depthwise 3 x 3 convolution over the patches, then a linear layer: (B, N, D) -> (B, N, D)."""

    causal = False  # a patch sees those on all sides
    takes = ("grid",)  # rows and columns of the patches, which are tokens to everything else

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, state: None = None, *, grid: tuple[int, int]) -> tuple[Tensor, None]:
        """Mix every patch with its eight neighbours."""
        picture = x.mT.unflatten(2, grid)  # (B, D, rows, columns)
        return self.proj(F.silu(self.conv(picture)).flatten(2).mT), None


def main() -> None:
    torch.manual_seed(0)
    config = VisionConfig(
        d_model=64, n_layers=3, image_size=8, patch_size=1, channels=1, n_classes=10, pooling="mean", hidden_size=128
    )
    model = VisionModel(config, lambda layer: Neighbours(config.d_model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    train, held_out = DigitsImages(batch_size=64).sources
    for epoch in range(6):
        for step in range(train.steps(1)):
            batch = train.batch(epoch, step, 0, 1)
            logits, _ = model(images=batch["images"])
            F.cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    right = total = 0
    with torch.no_grad():
        for step in range(held_out.steps(1)):
            batch = held_out.batch(0, step, 0, 1)
            right += int((model(images=batch["images"])[0].argmax(1) == batch["labels"]).sum())
            total += int((batch["labels"] >= 0).sum())
    print(f"{right} of {total} digits by other writers are right")

    maps = VisionModel(
        VisionConfig(
            d_model=16, depths=(1, 1), n_layers=2, patch_size=2, pooling="mean", features_only=True, image_size=8
        ),
        lambda layer: Neighbours(16 if layer == 0 else 32),
    )
    features, _ = maps(images=torch.rand(1, 3, 24, 40))  # any size that the patches divide
    print("maps of two stages:", [tuple(each.shape[1:]) for each in features.maps])


if __name__ == "__main__":
    main()

"""Pictures as vectors: patches, learnt positions for any size, and patches joined two by two."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.mixer import Layer

__all__ = ["ConvolutionStem", "Downsample", "PatchEmbedding", "Positions", "StridedDownsample"]


class PatchEmbedding(Layer):
    """A linear map of every patch, (B, C, H, W) -> (B, D, H / P, W / P): a convolution with a stride of its width."""

    def __init__(self, channels: int, d_model: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, d_model, patch_size, stride=patch_size)

    def initialise(self, n_layers: int = 1) -> None:
        """Xavier's range for the map of a flattened patch, and no bias."""
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W) -> (B, D, rows, columns) of patches."""
        if images.shape[1] != self.proj.in_channels:
            raise ValueError(f"images must have {self.proj.in_channels} channels; got {images.shape[1]}")
        embedded: Tensor = self.proj(images)
        return embedded


class Positions(Layer):
    """Adds a learnt vector to every patch; for another grid than its own the vectors are interpolated.

    Args:
        side: rows and columns of the grid that it is made for.
        d_model: D.
        extra: tokens in front of the patches, each with a vector of its own.
    """

    def __init__(self, side: int, d_model: int, *, extra: int = 0, std: float = 0.02):
        super().__init__()
        self.side, self.extra, self.std = side, extra, std
        self.weight = nn.Parameter(torch.empty(1, extra + side * side, d_model))
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Start normal with the model's standard deviation."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, extra + rows x columns, D) -> the same."""
        weight: Tensor = self.weight
        if grid != (self.side, self.side):
            table = weight[:, self.extra :].transpose(1, 2).unflatten(2, (self.side, self.side)).float()
            table = F.interpolate(table, size=grid, mode="bicubic", antialias=True, align_corners=False)
            weight = torch.cat([weight[:, : self.extra], table.flatten(2).transpose(1, 2).to(weight.dtype)], dim=1)
        return x + weight.to(x.dtype)


class Downsample(nn.Module):
    """Joins 2 x 2 patches: (B, N, D) -> (B, N / 4, 2 D), a LayerNorm and a linear map of four neighbours.

    Source: arXiv 2103.14030, section 3.1.
    """

    def __init__(self, d_model: int, *, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(4 * d_model, eps=eps)
        self.proj = nn.Linear(4 * d_model, 2 * d_model, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """The joined patches, and rows and columns of what is left."""
        rows, columns = grid[0] // 2, grid[1] // 2
        x = x.unflatten(1, (rows, 2, columns, 2))  # (B, rows, 2, columns, 2, D)
        x = x.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)  # (B, rows x columns, 4 D)
        joined: Tensor = self.proj(self.norm(x))
        return joined, (rows, columns)


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of maps, (B, D, rows, columns)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, every place by itself."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvolutionStem(Layer):
    """Patches from two convolutions, each with a norm, (B, C, H, W) -> (B, D, H / P, W / P).

    The first has D / 2 outputs, a stride of P / 2 and one more row and column than that; the second is 3 x 3 with a
    stride of 2. Neighbouring patches overlap by a few pixels.

    Args:
        channels: C.
        d_model: D, even.
        patch_size: P, an even number from 4.
        activation: between both.
        eps: of the norms.

    Raises:
        ValueError: an odd width or a patch size that the strides do not make.

    Source: arXiv 2405.18425; its code.
    """

    def __init__(self, channels: int, d_model: int, patch_size: int, *, activation: nn.Module, eps: float = 1e-6):
        super().__init__()
        if d_model % 2 or patch_size % 2 or patch_size < 4:
            raise ValueError(
                f"ConvolutionStem: d_model must be even, and patch_size an even number from 4; got {d_model} and "
                f"{patch_size}"
            )
        half, stride = d_model // 2, patch_size // 2
        self.channels = channels
        self.proj = nn.Sequential(
            nn.Conv2d(channels, half, stride + 1, stride=stride, padding=1), ChannelNorm(half, eps=eps), activation,
            nn.Conv2d(half, d_model, 3, stride=2, padding=1), ChannelNorm(d_model, eps=eps),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W) -> (B, D, rows, columns) of patches."""
        if images.shape[1] != self.channels:
            raise ValueError(f"images must have {self.channels} channels; got {images.shape[1]}")
        embedded: Tensor = self.proj(images)
        return embedded


class StridedDownsample(nn.Module):
    """Half the rows and columns by a 3 x 3 convolution with a stride of 2 and a norm, (B, N, D) -> (B, N / 4, 2 D)."""

    def __init__(self, d_model: int, *, eps: float = 1e-6):
        super().__init__()
        self.proj = nn.Conv2d(d_model, 2 * d_model, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * d_model, eps=eps)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Patches row by row, and their rows and columns; both come back for the smaller grid."""
        maps = self.proj(x.transpose(1, 2).unflatten(2, grid))
        return self.norm(maps.flatten(2).transpose(1, 2)), (maps.shape[2], maps.shape[3])

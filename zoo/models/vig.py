"""ViG: bidirectional gated linear attention over the patches of a picture, plain or in four stages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from zoo.layers import SwiGLU, ViG, VisionConfig, VisionModel
from zoo.layers.block import Block
from zoo.layers.norms import RMSNorm
from zoo.layers.patches import ConvolutionStem, StridedDownsample
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class ViGConfig(VisionConfig):
    """Fields of zoo.layers.VisionConfig, and those of ViG.

    n_heads: of the first stage; a later stage has twice as many as the one before it.
    hidden_size: of SwiGLU in the first stage; None for 8/3 d_model, rounded up to a multiple of `hidden_multiple`.
    stem: "convolutions", two of them, or "patches", one with a stride of its width.
    conv: whether mixers have the 3 x 3 convolution.
    activation: SiLU in mixers, as in the smallest plain model.
    """

    pooling: Literal["mean"] = "mean"
    n_heads: Annotated[int, Range(1)] = 3
    hidden_multiple: Annotated[int, Range(1)] = 256
    stem: Literal["convolutions", "patches"] = "convolutions"
    conv: bool = True
    activation: bool = False


class ViGModel(VisionModel):
    """A VisionModel with SwiGLU; of one stage with norms by root mean square, of several with strided convolutions."""

    config: ViGConfig

    def __init__(self, config: ViGConfig, mixer: Callable[[int], nn.Module]):
        stem = None
        if config.stem == "convolutions":
            stem = ConvolutionStem(
                config.channels, config.d_model, config.patch_size, eps=config.norm_eps,
                activation=nn.GELU() if config.depths else nn.SiLU(),
            )  # fmt: skip
        super().__init__(config, mixer, embed=stem)
        if self.norm is not None and not config.depths:
            norm: Any = RMSNorm(config.d_model, eps=config.norm_eps)
            self.norm = norm

    def _block(self, i: int, mixer: nn.Module, norm: Callable[[int], nn.Module]) -> Block:
        config = self.config
        stage = config.stage_of(i)
        d, eps = config.width(stage), config.norm_eps
        size = config.hidden_multiple * -(-int(8 * d / 3) // config.hidden_multiple)
        size = size if config.hidden_size is None else config.hidden_size * 2**stage
        return Block(
            d, mixer, SwiGLU(d, hidden_size=size) if size else None,
            norm=norm if config.depths else lambda d: RMSNorm(d, eps=eps),
            dropout=config.dropout, drop_path=config.drop_path * i / max(1, config.n_layers - 1),
        )  # fmt: skip

    def _downsample(self, d: int) -> nn.Module:
        return StridedDownsample(d, eps=self.config.norm_eps)


_DIGITS = {"image_size": 8, "patch_size": 1, "channels": 1, "n_classes": 10, "stem": "patches"}  # 64 patches
_STAGES = {"patch_size": 4, "positions": "none", "hidden_multiple": 32}


@register(
    "vig",
    config=ViGConfig,
    sizes={
        "tiny": {"d_model": 32, "n_layers": 2, "n_heads": 2, "hidden_size": 64, **_DIGITS},
        "t": {"activation": True},
        "s": {"d_model": 384, "n_heads": 6},
        "b": {"d_model": 768, "n_heads": 12},
        "h_t": {"d_model": 96, "depths": (2, 2, 5, 2), "n_layers": 11, **_STAGES},
        "h_s": {"d_model": 96, "depths": (2, 2, 17, 2), "n_layers": 23, **_STAGES},
        "h_b": {"d_model": 128, "depths": (2, 2, 17, 2), "n_layers": 23, "n_heads": 4, **_STAGES},
    },
    task="image_classification",
    data="digits_images",
    decoder=None,
    produces="classes",
    tags=("bidirectional", "linear", "vision"),
    paper="Liao et al., ViG, arXiv 2405.18425",
)
def vig(config: ViGConfig) -> ViGModel:
    """Linear attention from both ends of a picture's patches, with the neighbours beside it."""

    def mixer(i: int) -> ViG:
        stage = config.stage_of(i)
        return ViG(
            config.width(stage), n_heads=config.n_heads * 2**stage, conv=config.conv, activation=config.activation,
            xavier=not config.depths, norm_eps=config.norm_eps,
        )  # fmt: skip

    return ViGModel(config, mixer)

"""pLSTM-Vis: pLSTM over the patches of a picture, in four directions; layers propagate and diffuse in turn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from zoo.layers import DiffusionGates, PLSTMGrid, PropagationGates, VisionConfig, VisionModel
from zoo.layers.block import Block
from zoo.layers.norms import RMSNorm
from zoo.layers.state import refuse_state
from zoo.ranges import Range
from zoo.registry import register


@dataclass(frozen=True, kw_only=True)
class PLSTMVisionConfig(VisionConfig):
    """Fields of zoo.layers.VisionConfig, and those of pLSTM.

    pooling: "corners", the four corner patches side by side, or the "mean" over all.
    modes: of the layers in turn, propagation and diffusion.
    p_mode, chirality: of zoo.layers.PropagationGates and zoo.layers.DiffusionGates.
    """

    pooling: Literal["corners", "mean"] = "corners"  # type: ignore[assignment]
    norm_eps: Annotated[float, Range(0)] = 1e-5
    n_heads: Annotated[int, Range(1)] = 3
    modes: Literal["P+D", "P", "D"] = "P+D"
    p_mode: Literal["paper", "official"] = "paper"
    chirality: Literal["L", "R"] = "L"
    gate_std: Annotated[float, Range(0)] = 0.0


class PLSTMVision(VisionModel):
    """A VisionModel with norms by root mean square, whose head may see the four corners of the picture."""

    config: PLSTMVisionConfig

    def __init__(self, config: PLSTMVisionConfig, mixer: Callable[[int], nn.Module]):
        corners = config.pooling == "corners"
        head = None
        if corners and config.n_classes:
            head = nn.Linear(4 * config.width(len(config.stages) - 1), config.n_classes)
        super().__init__(config, mixer, head=head)
        if self.norm is not None:
            norm: Any = RMSNorm(config.width(len(config.stages) - 1), eps=config.norm_eps)
            self.norm = norm

    def _block(self, i: int, mixer: nn.Module, norm: Callable[[int], nn.Module]) -> Block:
        eps = self.config.norm_eps
        return super()._block(i, mixer, lambda d: RMSNorm(d, eps=eps))

    @property
    def num_features(self) -> int:
        """Width of what the head sees."""
        return super().num_features * (4 if self.config.pooling == "corners" else 1)

    def forward(self, images: Tensor, state: Any = None) -> tuple[Any, None]:
        """As of VisionModel: logits (B, n_classes), or maps of features; and None."""
        if self.head is None or self.norm is None or self.config.pooling == "mean":
            return super().forward(images, state)
        refuse_state(type(self).__name__, state)
        x, _ = self._run(images, (), self.config.n_layers)
        columns = images.shape[3] // self.config.reduction
        last = x.shape[1]
        corners = x[:, [0, columns - 1, last - columns, last - 1]]
        logits: Tensor = self.head(self.norm(corners).flatten(1))
        return logits, None


_DIGITS = {"image_size": 8, "patch_size": 2, "channels": 1}  # scikit-learn's: 16 patches of 2 x 2


@register(
    "plstm_vision",
    config=PLSTMVisionConfig,
    sizes={
        "tiny": {"d_model": 64, "n_layers": 4, "n_heads": 4, "n_classes": 10, **_DIGITS},
        "arrow": {"n_heads": 6, "n_classes": 2, "image_size": 192},
        "t": {},
        "s": {"d_model": 384, "n_heads": 6},
        "b": {"d_model": 768, "n_heads": 12},
    },
    task="image_classification",
    data="digits_images",
    decoder=None,
    produces="classes",
    tags=("bidirectional", "linear", "vision"),
    paper="Poeppel et al., pLSTM: parallelizable Linear Source Transition Mark networks, arXiv 2506.11997",
)  # fmt: skip
def plstm_vision(config: PLSTMVisionConfig) -> PLSTMVision:
    """States that travel over a picture in four directions, along angles or to every cell."""

    def mixer(i: int) -> PLSTMGrid:
        d, heads = config.width(config.stage_of(i)), config.n_heads
        gates: nn.Module
        if config.modes == "P" or (config.modes == "P+D" and i % 2 == 0):
            gates = PropagationGates(d, heads, parametrisation=config.p_mode, gate_std=config.gate_std)
        else:
            gates = DiffusionGates(d, heads, chirality=config.chirality, gate_std=config.gate_std)
        return PLSTMGrid(d, gates, n_heads=heads, norm_eps=config.norm_eps)

    return PLSTMVision(config, mixer)

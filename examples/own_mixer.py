"""A mixer of your own: register it, use it in a pattern, and cut time anywhere.

python examples/own_mixer.py
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import zoo
from zoo.layers import Mixer, register_mixer
from zoo.ops import affine_scan


class LeakyState(NamedTuple):
    """memory: (B, D) float32, the average after the last token."""

    memory: Tensor


@register_mixer("leaky")
class Leaky(Mixer):
    """A gated moving average, (B, T, D) -> (B, T, D).

    h_t = a_t h_{t-1} + (1 - a_t) v_t and y_t = W_o (h_t * silu(z_t)).
    """

    operators = (affine_scan,)  # what this layer's code calls: strategies and planners read it

    def __init__(self, d_model: int, *, slowest: float = 0.0):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)  # values, decays, output gates
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.slowest = slowest  # added to the decays' logits: larger remembers longer

    def forward(
        self, x: Tensor, state: LeakyState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LeakyState]:
        v, decay, z = self.in_proj(x).chunk(3, dim=-1)  # each (B, T, D)
        a = torch.sigmoid(decay + self.slowest)
        memory = None if state is None else state.memory
        h, memory = affine_scan(a, (1 - a) * v, memory, cu_seqlens=cu_seqlens)
        return self.out_proj(h * nn.functional.silu(z)), LeakyState(memory)

    def init_state(self, batch: int) -> LeakyState:
        weight = self.out_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return LeakyState(torch.zeros(batch, weight.shape[0], dtype=dtype, device=weight.device))


def main() -> None:
    torch.manual_seed(0)
    model = zoo.create_model("gla", pattern="leaky(slowest=2.0), gla", d_model=32, n_layers=4, vocab_size=100)
    tokens = torch.randint(100, (2, 50))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :20])
    second, _ = model(tokens[:, 20:], state)  # goes on from the state
    error = (torch.cat([first, second], dim=1) - whole).abs().max().item()
    print(f"layers: {[type(block.mixer).__name__ for block in model.blocks]}")
    print(f"cutting time after token 20 changes the logits by at most {error:.1e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()

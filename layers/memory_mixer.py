"""What mixers whose memory learns at test time share: streams, gates, the learnt start, and the way out."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.conv import ShortConvolution, initial_tails, side_by_side
from zoo.layers.mixer import Mixer
from zoo.layers.norms import GatedRMSNorm, l2_norm
from zoo.ops import MemoryRule, MemoryState, SoftmaxRetention, first_state, test_time_memory

__all__ = ["MemoryMixer", "MemoryMixerState"]


class MemoryMixerState(NamedTuple):
    """memory: of zoo.ops.test_time_memory, float32; tails: of the convolutions of q, k and v, empty without them."""

    memory: MemoryState
    tails: tuple[Tensor, ...]


class MemoryMixer(Mixer):
    """A memory that learns at test time, (B, T, D) -> (B, T, D).

    q, k and v are linear in x, each behind a short convolution and SiLU; q and k have length 1 in every head. Gates are
    linear in x, one number a head. The output is normalised by heads, gated by silu(x W), and projected.

    Args:
        d_model: D.
        rule: what is learnt, and how.
        n_heads: H, divides D; keys and values have D / H numbers.
        conv_size: width of the short convolutions, or None.
        eta_max: steps are in (0, eta_max / (D / H)); in that unit 1 is near the largest stable step of a matrix memory.
        keep: how much of the accumulator a step keeps in an untrained layer, in (0, 1); None for no decay at all.
        keep_momentum: the same of the running sum; read by rules with momentum.
        log_weights: deviation of the log weights at the start, for SoftmaxRetention.
        norm_eps: of the norm over each head's output.
        backend: of the operators.

    Raises:
        ValueError: n_heads does not divide d_model, or a number is out of its range.
    """

    operators = (test_time_memory,)

    def __init__(
        self,
        d_model: int,
        *,
        rule: MemoryRule,
        n_heads: int = 4,
        conv_size: int | None = 4,
        eta_max: float = 1.0,
        keep: float | None = 0.99,
        keep_momentum: float = 0.9,
        log_weights: float = 1.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        name = type(self).__name__
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"{name}: n_heads must divide d_model = {d_model}; got {n_heads}")
        if eta_max <= 0 or not all(0 < x < 1 for x in (keep_momentum, *([] if keep is None else [keep]))):
            raise ValueError(
                f"{name}: eta_max must be above 0, keep and keep_momentum between 0 and 1; got eta_max = {eta_max}, "
                f"keep = {keep}, keep_momentum = {keep_momentum}"
            )
        self.rule, self.n_heads, self.backend = rule, n_heads, backend
        self.size, self.eta_max, self.keep, self.keep_momentum = d_model // n_heads, eta_max, keep, keep_momentum
        self.log_weights = log_weights
        self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(5)
        )
        self.convs = nn.ModuleList()
        if conv_size is not None:
            self.convs.extend(ShortConvolution(d_model, conv_size, backend=backend) for _ in range(3))
        self.gates = nn.ModuleDict(
            {gate: nn.Linear(d_model, n_heads) for gate in rule.gates if gate != "g" or keep is not None}
        )
        shapes = rule.memory.shapes(self.size, self.size)
        self.start = nn.ParameterList(nn.Parameter(torch.empty(n_heads, *shape)) for shape in shapes)
        normed = rule.memory.norm
        self.gain = nn.Parameter(torch.empty(n_heads, self.size)) if normed else None
        self.offset = nn.Parameter(torch.empty(n_heads, self.size)) if normed else None
        self.o_norm = GatedRMSNorm(self.size, eps=norm_eps)
        self.initialise()

    def initialise(self, n_layers: int = 1) -> None:
        """Start weights that give every layer of the memory outputs of about 1 for keys of length 1; gates by bias."""
        memory, retention = self.rule.memory, self.rule.retention
        with torch.no_grad():
            for i, accumulator in enumerate(self.start):
                if isinstance(retention, SoftmaxRetention):
                    accumulator.normal_(std=self.log_weights)
                    continue
                columns = accumulator.shape[-1] - memory.bias
                weight = torch.randn_like(accumulator) * (1.0 if i in memory.on_keys else columns**-0.5)
                if memory.bias:
                    weight[..., -1] = 0
                accumulator.copy_(retention.start(weight))
            for name, bias in self._biases().items():
                gate = self.gates[name]
                assert isinstance(gate, nn.Linear)
                gate.bias.fill_(bias)
            for slow, value in ((self.gain, 1.0), (self.offset, 0.0)):
                if slow is not None:
                    slow.fill_(value)

    def _biases(self) -> dict[str, float]:
        """What gates say where x is 0: half the largest step, what is kept, a threshold of an output's length."""
        length = self.size**0.5
        biases = {"eta": 0.0, "theta": _logit(self.keep_momentum), "delta": length + math.log(-math.expm1(-length))}
        if self.keep is not None:
            biases["g"] = _logit(self.keep)
        return {name: biases[name] for name in self.gates}

    def forward(
        self, x: Tensor, state: MemoryMixerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MemoryMixerState]:
        """x (B, T, D) and the state before it -> y (B, T, D) and the state after it."""
        memory, tails = (None, ()) if state is None else state
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        streams, tails = side_by_side(self.convs, streams, tails, cu_seqlens=cu_seqlens)
        if not self.convs:
            streams = [F.silu(stream) for stream in streams]
        q, k, v = (stream.unflatten(-1, (self.n_heads, self.size)) for stream in streams)
        o, memory = test_time_memory(
            l2_norm(q), l2_norm(k), v, **self._gates(x), gain=self.gain, offset=self.offset, start=tuple(self.start),
            state=memory, rule=self.rule, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return self.o_proj(self.o_norm(o, self.g_proj(x).view_as(o)).flatten(2)), MemoryMixerState(memory, tails)

    def _gates(self, x: Tensor) -> dict[str, Tensor]:
        """(B, T, H) each, in float32 at least: a decay near 1 needs its digits."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        made = {name: gate(x).to(dtype) for name, gate in self.gates.items()}
        made["eta"] = (self.eta_max / self.size) * made["eta"].sigmoid()
        for name in ("g", "theta"):
            if name in made:
                made[name] = F.logsigmoid(made[name])
        if "delta" in made:
            made["delta"] = F.softplus(made["delta"])
        return made

    def init_state(self, batch: int) -> MemoryMixerState:
        """The learnt start in every row, and an empty chunk."""
        memory = first_state(self.rule, tuple(self.start), batch, self.size, self.size)
        return MemoryMixerState(memory, initial_tails(self.convs, batch))

    def extra_repr(self) -> str:
        """Heads, their size and the rule, for print(model)."""
        return f"n_heads={self.n_heads}, size={self.size}, rule={self.rule}"


def _logit(share: float) -> float:
    """The bias whose sigmoid is `share`."""
    return math.log(share / (1 - share))

"""An operator of your own: the definition as a loop, a fast form, the element by which it crosses ranks, its proofs.

    python examples/own_operator.py

Inside this repository the same four pieces are a folder, and the tests run all proofs: CONTRIBUTING.md says how.
"""

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core.algebra import Elementwise
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, parity, randn, red


def leaky_reference(x: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, obvious enough to check by eye: h_t = a_t h_{t-1} + x_t."""
    h, hs = state, []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]  # (B, D)
        hs.append(h)
    return torch.stack(hs, dim=1), h  # (B, T, D), (B, D)


def leaky_doubling(x: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same in log2(T) wide steps: after each, every position has summed up twice as many of those before it."""
    h = torch.cat([torch.addcmul(x[:, :1], a[:, :1], state.unsqueeze(1)), x[:, 1:]], dim=1)
    step = 1
    while step < x.shape[1]:
        h = torch.cat([h[:, :step], torch.addcmul(h[:, step:], a[:, step:], h[:, :-step])], dim=1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], dim=1)
        step *= 2
    return h, h[:, -1]


FORMS = {"reference": leaky_reference, "torch": leaky_doubling, "auto": leaky_doubling}


def leaky_summary(x: Tensor, a: Tensor) -> Elementwise:
    """What a stretch of time does to any state, h -> A h + b: a product of decays, and the state from zero."""
    return Elementwise(a.prod(dim=1), leaky_doubling(x, a, torch.zeros_like(x[:, 0]))[1])


def leaky(x: Tensor, a: Tensor, state: Tensor | None = None, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Run h_t = a_t h_{t-1} + x_t along time.

    Args:
        x: inputs, (B, T, D), T at least 1.
        a: decays, (B, T, D), between 0 and 1.
        state: h before the first step, (B, D); zeros when omitted.
        backend: "auto", "torch" or "reference".

    Returns:
        h: all states, (B, T, D).
        last: the state after the last step, (B, D).
    """
    if state is None:
        state = torch.zeros_like(x[:, 0])
    state = shard.incoming_state(leaky_summary(x, a), state)  # without context parallelism: the state as it is
    return FORMS[backend](x, a, state)


def inputs(batch: int, length: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    shape = (batch, length, sizes["D"])
    return {"x": randn(generator, *shape), "a": torch.sigmoid(randn(generator, *shape))}


SPEC = OperatorSpec(
    name="leaky",
    function=leaky,
    make=inputs,
    state=lambda n, sizes, generator: randn(generator, n, sizes["D"]),
    sizes=({"D": 6},),
    time=("x", "a"),
    extremes={"forget all": lambda i: i | {"a": i["a"] * 0}, "forget nothing": lambda i: i | {"a": i["a"] * 0 + 1}},
    summary=lambda i, cu_seqlens: leaky_summary(i["x"], i["a"]),
    packed=False,
)


def main() -> None:
    for length in (1, 2, 37):
        errors = parity(SPEC, SPEC.inputs(2, length), backend="torch", dtype=torch.float64)
        assert not red(errors, torch.float64), errors
        print(f"T = {length}: " + ", ".join(f"{what} {error:.1e}" for what, error in errors.items()))
    given = SPEC.inputs(2, 37)
    whole, last = SPEC.run(given)
    assert torch.allclose(leaky_summary(given["x"], given["a"]).apply(given["state"]), last)
    print("one element sums up the whole stretch of time")
    broken = dict(given, a=given["a"].roll(1, dims=1))  # a negative control: a wrong decay must be seen
    assert not torch.allclose(SPEC.run(broken)[0], whole)


if __name__ == "__main__":
    main()

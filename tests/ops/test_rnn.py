"""The recurrent cells against torch's own, the sLSTM without its stabiliser, and what the shared proofs leave out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from zoo.ops import elman, gru, lstm, slstm
from zoo.ops.core.spec import convert, outputs_and_gradients, parity, red, relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.recurrent.rnn_sequential import kernels
from zoo.ops.recurrent.slstm.reference import slstm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CELLS = ("lstm", "gru", "elman", "slstm")
FORMS = ("torch", "reference")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- torch's cells, one a head ----------------------------------------------------------------------------------------


def of_lstm(theirs: nn.LSTM) -> tuple[Tensor, Tensor]:
    D = theirs.hidden_size
    return theirs.weight_hh_l0.view(4, D, D), (theirs.bias_ih_l0 + theirs.bias_hh_l0).view(4, D)


def of_gru(theirs: nn.GRU) -> tuple[Tensor, Tensor]:
    (r, z, n), D = theirs.weight_hh_l0.chunk(3), theirs.hidden_size
    (i_r, i_z, i_n), (h_r, h_z, h_n) = theirs.bias_ih_l0.view(3, D), theirs.bias_hh_l0.view(3, D)
    return torch.stack([n, r, z]), torch.stack([h_n, i_r + h_r, i_z + h_z, i_n])


def of_rnn(theirs: nn.RNN) -> tuple[Tensor, Tensor]:
    return theirs.weight_hh_l0.unsqueeze(0), (theirs.bias_ih_l0 + theirs.bias_hh_l0).unsqueeze(0)


ORACLES: dict[str, tuple[Callable[..., Any], type[nn.RNNBase], Callable[[Any], tuple[Tensor, Tensor]], int]] = {
    "lstm": (lstm, nn.LSTM, of_lstm, 4),
    "gru": (gru, nn.GRU, of_gru, 3),
    "elman": (elman, nn.RNN, of_rnn, 1),
}


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_a_head_is_torchs_cell(name: str, dtype: torch.dtype, tolerance: float, backend: str) -> None:
    """Outputs, last states, and gradients of inputs, matrices, biases and initial states."""
    function, theirs, weights, gates = ORACLES[name]
    B, T, H, D, inputs = 3, 21, 2, 6, 5
    torch.manual_seed(0)
    cells = [theirs(inputs, D, batch_first=True).to(dtype) for _ in range(H)]
    u, states = random(B, T, inputs).to(dtype), 2 if name == "lstm" else 1
    start, dh, dlast = (
        random(B, *shape, D, seed=i).to(dtype) for i, shape in enumerate([(states, H), (T, H), (states, H)])
    )
    parameters = [p for cell in cells for p in cell.parameters()]

    state = start.clone().requires_grad_()
    found = []
    for i, cell in enumerate(cells):
        first = tuple(state[:, s, i].unsqueeze(0).contiguous() for s in range(states))
        y, last = cell(u, first if states == 2 else first[0])
        found.append((y, torch.stack([x[0] for x in (last if states == 2 else (last,))], dim=1)))
    want = torch.stack([y for y, _ in found], dim=2), torch.stack([last for _, last in found], dim=2)

    x = torch.stack([(u @ cell.weight_ih_l0.T).unflatten(-1, (gates, D)) for cell in cells], dim=3)
    R, b = (torch.stack(group, dim=1) for group in zip(*map(weights, cells), strict=True))
    ours = function(x, R, b, state, backend=backend)
    for a, exact in zip(ours, want, strict=True):
        assert_close(a, exact, rtol=tolerance, atol=tolerance)
    leaves = [state, *parameters]
    for a, exact in zip(*(torch.autograd.grad(out, leaves, (dh, dlast)) for out in (ours, want)), strict=True):
        assert relative_error(a, exact) < tolerance


# -- the stabiliser of the sLSTM --------------------------------------------------------------------------------------


def slstm_unstabilised(x: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """h from zeros, for gates whose exponentials float64 can hold."""
    h = c = n = torch.zeros_like(x[:, 0, 0])
    hs = []
    for x_t in x.unbind(1):
        i, f, z, o = (x_t + torch.einsum("ghpq,bhq->bghp", R, h) + b).unbind(1)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        hs.append(h)
    return torch.stack(hs, dim=1)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_stabiliser_changes_nothing(backend: str, scale: float) -> None:
    inputs = OPERATORS["slstm"].inputs(2, 50, {"H": 2, "D": 8})
    x, R, b = (inputs[name].requires_grad_() for name in "xRb")
    want, ours = slstm_unstabilised(scale * x, R, b), slstm(scale * x, R, b, backend=backend)[0]
    assert_close(ours, want, rtol=1e-12, atol=1e-12)
    dh = random(*want.shape)
    for a, exact in zip(*(torch.autograd.grad(y, (x, R, b), dh) for y in (ours, want)), strict=True):
        assert relative_error(a, exact) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_normaliser_is_at_least_one(dtype: torch.dtype) -> None:
    """Without a bound: one of the two stabilised gates is 1 exactly, also in floating point."""
    for scale in (0.0, 1.0, 30.0):
        x = scale * random(2, 40, 4, 2, 8).to(dtype)
        R, b = (random(4, *shape, seed=3).to(dtype) for shape in ((2, 8, 8), (2, 8)))
        for t in range(1, 40):
            _, last = slstm(x[:, :t], R, b)
            assert (last[:, 2] >= 1).all()


@pytest.mark.parametrize("backend", FORMS)
def test_an_empty_memory_never_overflows(backend: str) -> None:
    """Closed input gates and open forget gates: exp(logsigmoid(f) + m - i) would be infinite, times a memory of 0."""
    x = torch.tensor([-1000.0, 50.0, 1.0, 1.0], dtype=torch.float64).view(1, 1, 4, 1, 1).repeat(1, 3, 1, 1, 2)
    h, last = slstm(x, x.new_zeros(4, 1, 2, 2), backend=backend)
    assert_close(
        h, torch.full_like(h, 1.0).mul_(torch.tensor(1.0).sigmoid() * torch.tensor(1.0).tanh()), rtol=1e-6, atol=0
    )
    assert last.isfinite().all()


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("backend", FORMS)
def test_gradients_of_losses_on_each_state_of_the_slstm(slot: int, backend: str) -> None:
    """m alone, too: its gradient is zero for losses on h only."""
    inputs = OPERATORS["slstm"].inputs(2, 6, {"H": 2, "D": 3})
    x, R, b, state = (inputs[name].requires_grad_() for name in ("x", "R", "b", "state"))
    check = partial(torch.autograd.gradcheck, inputs=(x, R, b, state), fast_mode=True)
    assert check(lambda *given: slstm(*given, backend=backend)[1][:, slot])


def test_h_says_nothing_of_the_stabiliser() -> None:
    """The same memory over another exp(m) gives the same h."""
    inputs = OPERATORS["slstm"].inputs(2, 6)
    h, c, n, m = inputs["state"].unbind(1)
    moved = torch.stack([h, c * 2, n * 2, m - torch.tensor(2.0).log()], dim=1)
    assert_close(slstm(**inputs)[0], slstm(**inputs | {"state": moved})[0])


# -- what the harness leaves out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_losses_on_every_state(name: str) -> None:
    spec = OPERATORS[name]
    inputs = {key: x.requires_grad_() for key, x in spec.inputs(2, 5, {"H": 2, "D": 3}).items()}

    def run(*given: Tensor) -> Tensor:
        return spec.run(dict(zip(inputs, given, strict=True)), backend="torch")[1]

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("name", CELLS)
def test_several_heads_and_documents(name: str) -> None:
    spec, sizes = OPERATORS[name], {"H": 3, "D": 4}
    assert not red(parity(spec, spec.inputs(5, 9, sizes), backend="torch", dtype=torch.float64), torch.float64)
    cuts = torch.tensor([0, 4, 4, 11, 12, 19])
    inputs = spec.inputs(1, 19, sizes, documents=5)
    assert not red(parity(spec, inputs, backend="torch", dtype=torch.float64, cu_seqlens=cuts), torch.float64)


@pytest.mark.kernels
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("B", "T"), [(3, 1), (17, 4)])
def test_kernels_take_any_number_of_sequences(name: str, B: int, T: int) -> None:
    """A block of sequences that is not full, one that is, several heads, and a step that is the first and the last."""
    spec = OPERATORS[name]
    errors = parity(spec, spec.inputs(B, T, {"H": 2, "D": 18}), backend="triton", dtype=torch.float32, device=DEVICE)
    assert not red(errors, torch.float32)


@pytest.mark.kernels
@pytest.mark.parametrize("name", CELLS)
def test_kernels_read_matrices_in_every_step_where_they_do_not_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_HELD", 0)
    spec = OPERATORS[name]
    errors = parity(spec, spec.inputs(2, 3), backend="triton", dtype=torch.float32, device=DEVICE)
    assert not red(errors, torch.float32)


@pytest.mark.kernels
@pytest.mark.parametrize("name", CELLS)
def test_kernels_in_half_precision(name: str) -> None:
    """The interpreter multiplies no bfloat16; on a device the harness does."""
    spec = OPERATORS[name]
    inputs = spec.inputs(2, 12, {"H": 1, "D": 16})
    assert not red(parity(spec, inputs, backend="triton", dtype=torch.float16, device=DEVICE), torch.float16)


@pytest.mark.kernels
def test_kernels_start_from_an_empty_memory() -> None:
    inputs = convert(OPERATORS["slstm"].inputs(2, 4), torch.float32, DEVICE)
    inputs["state"] = inputs["state"] * 0
    spec = OPERATORS["slstm"]
    ours, want = (outputs_and_gradients(spec, inputs, backend=backend) for backend in ("triton", "torch"))
    for key, exact in want.items():
        assert relative_error(ours[key], exact) < 2e-5, key


def test_without_a_graph_nothing_is_kept() -> None:
    inputs = OPERATORS["lstm"].inputs(2, 7)
    kept = torch.ops.zoo.rnn_loop(*(inputs[name] for name in ("x", "R", "b", "state")), "lstm", None, False)[2:]
    assert [x.numel() for x in kept] == [0, 0]


@pytest.mark.parametrize("cu", [None, [0, 3, 3, 7]], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_the_loop_keeps_its_contract(name: str, cu: list[int] | None) -> None:
    """Schema, fake and autograd registration of both custom ops."""
    n = 1 if cu is None else len(cu) - 1
    inputs = OPERATORS[name].inputs(1, 7, documents=n)
    given = [inputs[key].requires_grad_() for key in ("x", "R", "b", "state")]
    torch.library.opcheck(torch.ops.zoo.rnn_loop, (*given, name, cu, True))
    given = [x.detach() for x in given]
    h, last, gates, kept = torch.ops.zoo.rnn_loop(*given, name, cu, True)
    torch.library.opcheck(torch.ops.zoo.rnn_loop_bwd, (h, last, given[1], given[3], gates, kept, name, cu))


def test_a_backward_may_run_twice() -> None:
    inputs = {key: x.requires_grad_() for key, x in OPERATORS["slstm"].inputs(2, 7).items()}
    h, _ = slstm(**inputs)
    first, second = (torch.autograd.grad(h.square().sum(), inputs["R"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", CELLS)
def test_biases_are_zeros_when_omitted(name: str) -> None:
    spec = OPERATORS[name]
    inputs = spec.inputs(2, 7)
    zeros = spec.run(inputs | {"b": inputs["b"] * 0})
    del inputs["b"]
    for without, given in zip(spec.run(inputs), zeros, strict=True):
        assert torch.equal(without, given)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("D", "dtype", "words"),
    [
        (129, torch.float32, "lstm: kernels take heads of at most 128 numbers; got D = 129, use more heads"),
        (8, torch.float64, "lstm: kernels take float32 or narrower; got float64, use backend='torch'"),
    ],
)
def test_kernels_refuse_what_they_cannot_hold(D: int, dtype: torch.dtype, words: str) -> None:
    x = torch.zeros(1, 2, 4, 1, D, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=words):
        lstm(x, x.new_zeros(4, 1, D, D), backend="triton")


def test_a_wrong_number_of_gates_is_refused() -> None:
    x = torch.zeros(1, 2, 4, 1, 3)
    with pytest.raises(ValueError, match=r"gru: x must be \(B, T, 3, H, D\) with 3 = 3; got \(1, 2, 4, 1, 3\)"):
        gru(x, x.new_zeros(3, 1, 3, 3))


def test_the_reference_of_the_slstm_is_the_one_that_is_proved() -> None:
    """One step by hand: i = 0, f = 0 from nothing writes tanh(z) and weighs it by 1."""
    x = torch.tensor([0.0, 0.0, 0.5, 0.0], dtype=torch.float64).view(1, 1, 4, 1, 1)
    h, last = slstm_reference(x, x.new_zeros(4, 1, 1, 1), x.new_zeros(4, 1, 1), x.new_zeros(1, 4, 1, 1))
    z = F.tanh(torch.tensor(0.5, dtype=torch.float64))
    assert_close(h.squeeze(), 0.5 * z)
    assert_close(last.flatten(), torch.stack([0.5 * z, z, torch.ones_like(z), torch.zeros_like(z)]))

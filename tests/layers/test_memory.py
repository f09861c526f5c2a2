"""Memory plans: no gradient changes, hooks fire once, and the bytes kept are those that the plan says."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

import zoo
from zoo.layers import Block
from zoo.layers.feed_forward import SwiGLU
from zoo.layers.memory import MemoryPlan
from zoo.layers.offload import Host, Layout, offload, to_host
from zoo.ops import gated_linear_attention, no_recompute

SMALL = {"d_model": 16, "n_layers": 3, "n_heads": 2, "hidden_size": 24, "vocab_size": 11, "init_std": 0.3}
MODELS = {
    "deltanet": {},
    "hybrid": {"pattern": "deltanet, attention, gla(n_heads=2)"},
    "mamba": {"pattern": "mamba, mamba2(head_dim=8, d_state=4), attention(window=5)"},
}
KNOBS: dict[str, tuple[Any, ...]] = {
    "recompute": ("none", "block", "mixer_saved"),
    "offload": ("none", "inputs", "alpha:0", "alpha:0.3", "alpha:1"),
    "tile_mlp": ("off", "auto", 7),
}


def plans() -> list[MemoryPlan]:
    found = []
    for values in itertools.product(*KNOBS.values()):
        try:
            found.append(MemoryPlan(**dict(zip(KNOBS, values, strict=True))))
        except ValueError:
            continue
    return found


PLANS = plans()
IDS = [f"{p.recompute}-{p.offload}-{p.tile_mlp}" for p in PLANS]


def build(case: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return zoo.create_model("deltanet", **{**SMALL, **MODELS[case], **changes}).double()


def step(model: Any, tokens: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    logits, _ = model(tokens, state, **options)
    return logits, list(torch.autograd.grad(logits.sin().sum(), list(model.parameters()), allow_unused=True))


@pytest.fixture(scope="module")
def exact() -> dict[str, tuple[Any, Tensor, Tensor, list[Tensor]]]:
    found = {}
    for case in MODELS:
        model = build(case)
        tokens = torch.randint(11, (2, 37), generator=torch.Generator().manual_seed(1))
        found[case] = model, tokens, *step(model, tokens)
    return found


@pytest.mark.parametrize("plan", PLANS, ids=IDS)
@pytest.mark.parametrize("case", MODELS)
def test_no_plan_changes_a_gradient(case: str, plan: MemoryPlan, exact: Any) -> None:
    model, tokens, logits, grads = exact[case]
    model.use_memory(plan)
    try:
        ours, found = step(model, tokens)
    finally:
        model.use_memory(MemoryPlan())
    if plan.tile_mlp == "off" and plan.alpha in (None, 0, 1):
        assert torch.equal(ours, logits)
    assert_close(ours, logits, rtol=1e-13, atol=1e-13)
    for got, want in zip(found, grads, strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm().clamp(min=1.0)


@pytest.mark.parametrize("plan", PLANS[3:], ids=IDS[3:])
def test_cut_and_packed_sequences(plan: MemoryPlan, exact: Any) -> None:
    """Gradients reach an earlier stretch through the state, and documents stay apart."""
    model = exact["deltanet"][0]
    tokens, cuts = exact["deltanet"][1].reshape(1, -1), torch.tensor([0, 5, 40, 74])

    def run() -> list[Tensor]:
        first, state = model(tokens[:, :30])
        second, _ = model(tokens[:, 30:], state)
        packed, _ = model(tokens, cu_seqlens=cuts)
        loss = first.sum() + second.sin().sum() + packed.cos().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    want = run()
    model.use_memory(plan)
    try:
        found = run()
    finally:
        model.use_memory(MemoryPlan())
    for ours, exact_ in zip(found, want, strict=True):
        assert (ours - exact_).norm() <= 1e-12 * exact_.norm().clamp(min=1.0)


class Mixer(nn.Module):
    """A mixer as a user would write it, with dropout on both sides of a counted operator."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(d_model, 4 * d_model), nn.Linear(d_model, d_model)
        self.calls = 0

        @no_recompute
        def operator(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            return gated_linear_attention(q, k, v, g)

        self.operator = operator

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Any = None) -> tuple[Tensor, Tensor]:
        q, k, v, g = nn.functional.dropout(self.proj(x), 0.3).unflatten(-1, (4, 2, -1)).unbind(2)
        o, state = self.operator(q, k, v, nn.functional.logsigmoid(g))
        return self.out(nn.functional.dropout(o.flatten(2), 0.3)), state


class Dropping(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.3))


@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_dropout_and_the_number_of_calls(plan: MemoryPlan) -> None:
    torch.manual_seed(0)
    mixer = Mixer(16)
    block = Block(16, mixer, Dropping(16, hidden_size=24)).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)

    def run(plan: MemoryPlan) -> list[Tensor]:
        torch.manual_seed(5)
        block.memory, mixer.calls = plan, 0
        y, _ = block(x)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])]

    one_pass = plan.tile_mlp == "off" and plan.alpha in (None, 0, 1)  # tiles draw their own numbers
    plain = run(MemoryPlan()) if one_pass else []
    found = run(plan)
    assert mixer.calls == {"none": 1, "block": 2, "mixer_saved": 1}[plan.recompute]
    for ours, want in zip(found, plain, strict=one_pass):
        assert_close(ours, want, rtol=0, atol=1e-12)
    if not one_pass:  # the recomputation draws what the first pass drew: a finite difference agrees
        direction = torch.randn_like(x)
        eps = 1e-6
        with torch.no_grad():
            moved = []
            for sign in (1, -1):
                torch.manual_seed(5)
                with torch.enable_grad():  # plans apply where gradients are asked for
                    moved.append(block(x + sign * eps * direction)[0].detach().sin().sum())
            slope = (moved[0] - moved[1]) / (2 * eps)
            assert_close((found[1] * direction).sum(), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_hooks_of_parameters_fire_once(plan: MemoryPlan, exact: Any) -> None:
    """What DistributedDataParallel and FSDP rely on."""
    model, counts = build("deltanet"), {}
    model.use_memory(plan)
    for name, parameter in model.named_parameters():
        counts[name] = 0

        def count(_: Tensor, name: str = name) -> None:
            counts[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    logits, _ = model(exact["deltanet"][1])
    logits.sum().backward()
    assert set(counts.values()) == {1}


# -- bytes ------------------------------------------------------------------------------------------------------


def kept(call: Callable[[], Any], parameters: Any) -> int:
    """Bytes of the storages that autograd saves, parameters left out, as hooks around the call see them."""
    own = {p.untyped_storage()._cdata for p in parameters}
    storages: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storage.nbytes() for storage in storages.values())


def the_block(D: int, F: int) -> tuple[Block, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    block = zoo.create_model("gla", d_model=D, n_layers=1, n_heads=2, hidden_size=F, vocab_size=11, expand_k=1.0)
    return block.blocks[0], lambda T: torch.randn(1, T, D, requires_grad=True)


@pytest.mark.parametrize("T", [512, 1024, 2048])
def test_bytes_follow_the_formulas(T: int) -> None:
    D, F = 64, 192
    block, inputs = the_block(D, F)
    x, unit = inputs(T), 4 * T * D

    def run(plan: MemoryPlan) -> int:
        block.memory = plan
        return kept(lambda: block(x), block.parameters())

    feed = kept(lambda: block.feed(x), block.parameters())
    # swiglu keeps the norm's input (here x itself), its output, gate, up, silu(gate), the product
    assert feed == pytest.approx(2 * unit + 4 * unit * F // D, rel=0.01)
    assert run(MemoryPlan(recompute="block")) == unit
    assert run(MemoryPlan(recompute="block", tile_mlp=5)) == unit
    tiled = MemoryPlan(recompute="none", tile_mlp=5)
    assert run(MemoryPlan()) - run(tiled) == pytest.approx(feed - unit, rel=0.01)


@pytest.mark.parametrize("T", [512, 1024, 2048])
def test_bytes_on_the_host_grow_with_alpha(T: int) -> None:
    """Block input, feed-forward input and operator's output always; of the feed-forward's values the fraction alpha."""
    D, F = 64, 192
    block, inputs = the_block(D, F)
    engine = offload(torch.device("cpu"))
    unit, sent = 4 * T * D, {}
    for alpha in (0.0, 0.25, 0.5, 1.0):
        block.memory = MemoryPlan(recompute="mixer_saved", offload=f"alpha:{alpha}")
        before = engine.packed
        y, _ = block(inputs(T))
        sent[alpha] = engine.packed - before
        y.sum().backward()
    others = unit * (1 + 4 * F / D)  # norm's output, gate, up, silu, product
    for alpha in sent:
        assert sent[alpha] - sent[0.0] == pytest.approx(alpha * others, rel=0.01, abs=4 * T * 2)
    block.memory = MemoryPlan(recompute="mixer_saved", offload="inputs")
    before = engine.packed
    block(inputs(T))
    assert engine.packed - before == unit


def test_the_operators_inputs_are_given_up() -> None:
    """q, k, v of mixer_saved are nowhere in memory between the passes."""
    block, inputs = the_block(64, 128)
    made: list[StorageWeakRef] = []
    hooks = [
        linear.register_forward_hook(lambda _, __, y: made.append(StorageWeakRef(y.untyped_storage())))
        for linear in (block.mixer.q_proj, block.mixer.k_proj, block.mixer.v_proj)
    ]
    for plan, held in ((MemoryPlan(), True), (MemoryPlan(recompute="mixer_saved"), False)):
        made.clear()
        block.memory = plan
        y, _ = block(inputs(1024))
        assert [not storage.expired() for storage in made] == [held] * 3
        y.sum().backward()
    for hook in hooks:
        hook.remove()


# -- offloading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 6).t(),
        torch.randn(2, 9, 5)[:, 2:6],
        torch.randn(3, 1, 4).expand(3, 7, 4),
        torch.arange(6.0).view(2, 3)[:, ::2],
        torch.randn(()),
        torch.randn(0, 3),
        torch.randn(5, 4).bfloat16(),
    ],
    ids=["transposed", "slice", "expanded", "strided", "scalar", "empty", "bfloat16"],
)
def test_tensors_come_back_with_their_strides(x: Tensor) -> None:
    engine = offload(x.device)
    handles = [engine.pack(x), engine.pack(torch.zeros(1))]  # the last one stays
    assert handles[0].source is None
    back = engine.unpack(handles[0])
    assert torch.equal(back, x)
    assert back.stride() == x.stride()
    assert back.dtype == x.dtype
    assert engine.unpack(handles[1]) is handles[1].source


def test_memory_of_parameters_stays() -> None:
    layer = nn.Linear(8, 8)
    engine, before = offload(torch.device("cpu")), offload(torch.device("cpu")).packed
    with to_host(torch.device("cpu"), layer.parameters()):
        y = layer(torch.randn(4, 8, requires_grad=True))
    assert engine.packed - before == 4 * 8 * 4
    y.sum().backward()
    assert layer.weight.grad is not None


def test_a_tensor_saved_twice_is_sent_once() -> None:
    engine, before = offload(torch.device("cpu")), offload(torch.device("cpu")).packed
    x = torch.randn(10, requires_grad=True)
    with to_host(torch.device("cpu")):
        y = x.sin() * 2 + x.cos()
    assert engine.packed - before == x.numel() * 4
    y.sum().backward()
    assert_close(x.grad, 2 * x.detach().cos() - x.detach().sin())


def test_the_host_is_guarded() -> None:
    host = Host(pinned=False, limit=100)
    buffer = host.take(20, torch.float32)
    with pytest.raises(MemoryError, match=r"needs 120"):
        host.take(10, torch.float32)
    host.give_back(buffer)
    host.take(25, torch.float32)
    assert Host(pinned=False).take(1, torch.float32).numel() == 1
    assert Layout(torch.ones(2, 3)).empty().shape == (2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recompute": "all"}, "recompute must be one of"),
        ({"offload": "inputs"}, "recompute=block"),
        ({"offload": "alpha:0.5", "recompute": "block"}, "needs recompute=mixer_saved"),
        ({"offload": "alpha:2", "recompute": "mixer_saved"}, "in \\[0, 1\\]"),
        ({"tile_mlp": 0}, "number of tiles"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryPlan(**fields)


def test_the_field_of_a_config_still_works() -> None:
    assert build("deltanet", activation_checkpointing=True).memory == MemoryPlan(recompute="block")
    assert build("deltanet").memory == MemoryPlan()


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_on_a_gpu(plan: MemoryPlan) -> None:
    """Copies run beside the computation, and nothing is read before it is there: the same gradients, three times."""
    model = build("hybrid", n_layers=6, d_model=64).float().cuda()
    tokens = torch.randint(11, (2, 700), device="cuda")
    want = step(model, tokens)[1]
    model.use_memory(plan)
    for _ in range(3):
        for ours, exact_ in zip(step(model, tokens)[1], want, strict=True):
            assert_close(ours, exact_, rtol=2e-3, atol=2e-3 * float(exact_.abs().max()))
    pinned = offload(tokens.device).host.bytes
    step(model, tokens)
    assert offload(tokens.device).host.bytes == pinned  # buffers are used again


def test_a_plan_is_a_value() -> None:
    """Models and runs share plans, so that none may change under another; its three knobs are words and need names."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryPlan().recompute = "block"  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        MemoryPlan("block")  # type: ignore[misc]

"""Every registered language model: published sizes, steps, padding, packing, streaming, save and load, learning."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from case_table import SMALL, CausalCase, make_model, models, parametrize
from torch.testing import assert_close

import zoo
from zoo.decoding import compiled, generate, generate_batch
from zoo.errors import UserError
from zoo.layers.state import state_bytes
from zoo.registry import INDEX, model_info

CAUSAL = models(CausalCase)
EVERY = parametrize("case", CAUSAL)
PUBLISHED = [(case.name or name, *size) for name, case in models().items() for size in case.published.items()]


def test_every_model_has_a_case() -> None:
    ours = {path.stem for path in INDEX.glob("*.json")}  # not what other tests registered
    missing = ours - {case.name or name for name, case in models().items()}
    assert not missing, f"tests/cases/NAME.py says what a model's proofs need; {', '.join(sorted(missing))} has none"


def tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    drawn: torch.Tensor = model.example(batch, length, seed=1)["tokens"]
    return drawn


def assert_same_logits(case: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """To 1e-5 of the largest logit, in float32, or what the case says."""
    scale = want.abs().max()
    assert_close(got / scale, want / scale, rtol=0, atol=models()[case].rounding)


@EVERY
def test_the_loss_without_logits_is_that_of_the_logits(case: str) -> None:
    for options in ({}, {"tie_embeddings": True}):
        model = make_model(case, **options).double()
        ids = tokens(model, 2, 20)
        targets = ids.roll(-1, dims=1).index_fill(1, torch.tensor([-1]), -100)
        found = []
        for loss in (
            model.head_loss(model.encode(ids)[0], targets),
            torch.nn.functional.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten()),
        ):
            found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        for ours, want in zip(*found, strict=True):
            assert_close(ours, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "size", "count"), PUBLISHED)
def test_published_parameter_counts(name: str, size: str, count: int) -> None:
    with torch.device("meta"):
        model = zoo.create_model(name, size=size)
    assert sum(p.numel() for p in model.parameters()) == count == model_info(name).params[size]


@EVERY
def test_prefill_and_steps_equal_one_forward(case: str) -> None:
    model = make_model(case)
    x = tokens(model, 2, 40)
    whole, last = model(x)
    logits, state = model(x[:, :23])
    parts = [logits]
    for t in range(23, 40):
        logits, state = model(x[:, t : t + 1], state)
        parts.append(logits)
    assert_same_logits(case, torch.cat(parts, dim=1), whole)
    assert state_bytes(state) == state_bytes(last) == model.state_bytes(2, 40)


@EVERY
@pytest.mark.parametrize("gradients", [True, False])  # without them tokens may take a shorter way
def test_in_float64_steps_equal_one_forward_exactly(case: str, gradients: bool) -> None:
    """What differs by 1e-5 of the largest logit in float32 is rounding: in float64 it is gone."""
    model = make_model(case).double()
    x = tokens(model, 2, 40)
    whole, _ = model(x)
    with torch.set_grad_enabled(gradients):
        logits, state = model(x[:, :23])
        parts = [logits]
        for t in range(23, 40):
            given = [z.clone() for z in torch.utils._pytree.tree_leaves(state)]
            logits, new = model(x[:, t : t + 1], state)
            assert all(map(torch.equal, given, torch.utils._pytree.tree_leaves(state))), "a step writes in its state"
            state = new
            parts.append(logits)
    # rotary tables are made in float32 from the same positions, so they agree to the bit
    assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_unpadded_ones(case: str, side: str) -> None:
    model, lengths = make_model(case), (17, 5, 1, 9)
    rows = [tokens(model, 1, 17)[:, :length] for length in lengths]
    x, mask = torch.full((4, 17), 3), torch.zeros(4, 17, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(17 - row.shape[1], 17) if side == "left" else slice(0, row.shape[1])
        x[i, place], mask[i, place] = row[0], True
    logits, state = model(x, mask=mask)
    following, _ = model(torch.tensor([[7]] * 4), state)
    for i, row in enumerate(rows):
        alone, alone_state = model(row)
        assert_same_logits(case, logits[i][mask[i]], alone[0])
        assert_same_logits(case, following[i], model(torch.tensor([[7]]), alone_state)[0][0])
    assert (logits[~mask] == 0).all()


@EVERY
def test_packed_documents_equal_separate_ones(case: str) -> None:
    model, bounds = make_model(case), [0, 11, 12, 30]
    x = tokens(model, 1, 30)
    logits, _ = model(x, cu_seqlens=torch.tensor(bounds))
    for left, right in itertools.pairwise(bounds):
        assert_same_logits(case, logits[:, left:right], model(x[:, left:right])[0])


@EVERY
def test_generation_streams(case: str) -> None:
    """The first token is there before the last one is computed."""
    model, calls = make_model(case), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    stream = generate(model, [1, 2, 3], max_tokens=5, seed=0)
    first = next(stream)
    assert len(calls) == 1
    rest = list(stream)
    assert len(calls) == 5
    assert [first, *rest] == list(generate(model, [1, 2, 3], max_tokens=5, seed=0))


@EVERY
def test_greedy_batches_equal_single_prompts(case: str) -> None:
    model = make_model(case)
    prompts = [[1, 2, 3, 4, 5, 6], [7], [8, 9]]
    rows = list(generate_batch(model, prompts, max_tokens=6, temperature=0))
    for i, prompt in enumerate(prompts):
        assert [row[i] for row in rows] == list(generate(model, prompt, max_tokens=6, temperature=0))


@EVERY
def test_compiled_decoding_is_one_program(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens; whatever grows with them, nothing is compiled twice and no layer falls out of the program."""
    model, prompts, graphs = make_model(case), [[1, 2, 3, 4, 5, 6], [7], [8, 9]], []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    compiled._program.cache_clear()
    torch.compiler.reset()
    try:
        found = list(generate_batch(model, prompts, max_tokens=12, temperature=0, compile=True))
    finally:
        compiled._program.cache_clear()
    assert found == list(generate_batch(model, prompts, max_tokens=12, temperature=0))
    assert len(graphs) == 1


@pytest.mark.everything
def test_compiled_decoding_by_torchs_own_compiler() -> None:
    model = make_model("mamba")
    plain = list(generate(model, [1, 2, 3], max_tokens=12, temperature=0.7, seed=3))
    assert list(generate(model, [1, 2, 3], max_tokens=12, temperature=0.7, seed=3, compile=True)) == plain


def test_compiled_decoding_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled._program.cache_clear()
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-compiler")))
    with pytest.raises(UserError, match=r"compile needs a compiler.*leave compile out"):
        list(generate(make_model("gla"), [1], max_tokens=3, compile=True))


@parametrize("case", CAUSAL, only=lambda case: CAUSAL[case].name is None and not case.startswith("para"))
def test_torch_compile_takes_a_training_step_as_one_program(case: str) -> None:
    """Newton's method asks the host how far it is, and is compiled in pieces."""
    model, found = make_model(case).train(), []
    x = tokens(model, 2, 20)
    torch.compiler.reset()
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        run(x)[0].square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@EVERY
def test_activation_checkpointing_changes_no_gradient(case: str) -> None:
    grads = []
    for on in (False, True):
        model = make_model(case, activation_checkpointing=on).train()
        model(tokens(model, 2, 20))[0].square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@EVERY
def test_save_and_load(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    x = tokens(model, 1, 9)
    zoo.save(model, tmp_path / "checkpoint")
    loaded = zoo.load(tmp_path / "checkpoint")
    assert loaded.config == model.config
    assert torch.equal(loaded(x)[0], model(x)[0])


@EVERY
def test_the_loss_falls(case: str) -> None:
    torch.manual_seed(0)
    model = zoo.create_model(CAUSAL[case].name or case, **SMALL, **CAUSAL[case].fields, tie_embeddings=True)
    x = tokens(model, 4, 24)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_tied_embeddings_share_one_matrix() -> None:
    model = make_model("deltanet", tie_embeddings=True)
    assert model.lm_head.weight is model.embedding.weight


def test_a_prompt_outside_the_vocabulary_is_refused_before_the_model_runs() -> None:
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 50\).*got 50"):
        next(generate(make_model("deltanet"), [50], max_tokens=1))
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(make_model("deltanet"), [], max_tokens=1))

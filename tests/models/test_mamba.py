"""Mamba and Mamba-2 against transformers' own, with the same weights; and how they start."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import zoo
from zoo.layers import Mamba, Mamba2

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
VOCAB, LAYERS, D = 60, 2, 32


def theirs_mamba() -> torch.nn.Module:
    config = transformers.MambaConfig(
        hidden_size=D, num_hidden_layers=LAYERS, state_size=4, vocab_size=VOCAB, use_mambapy=False
    )
    return transformers.MambaForCausalLM(config)


def theirs_mamba2() -> torch.nn.Module:
    config = transformers.Mamba2Config(
        hidden_size=D, num_hidden_layers=LAYERS, state_size=8, vocab_size=VOCAB, num_heads=4, head_dim=16, n_groups=2,
        expand=2, chunk_size=16, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


def same_weights(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    names = {"backbone.embeddings": "embedding", "backbone.norm_f": "norm", "backbone.layers": "blocks"}
    found: dict[str, Tensor] = {}
    for name, value in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        for old, new in names.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        if name.startswith("blocks") and name.split(".")[2] == "norm":
            name = name.replace(".norm.", ".mixer_norm.")
        found[name] = value.squeeze(1) if name.endswith("conv1d.weight") else value
    missing, unexpected = ours.load_state_dict(found, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected


CASES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, int]]] = {
    "mamba": (theirs_mamba, {"d_state": 4}),
    "mamba2": (theirs_mamba2, {"d_state": 8, "head_dim": 16, "n_groups": 2}),
}


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    make, fields = CASES[request.param]
    torch.manual_seed(0)
    theirs = make().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # far from the start, where everything matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = zoo.create_model(request.param, d_model=D, n_layers=LAYERS, vocab_size=VOCAB, **fields).eval()
    same_weights(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize("length", [1, 17, 65])
@torch.no_grad()
def test_same_logits_as_transformers(pair: tuple[torch.nn.Module, torch.nn.Module], length: int) -> None:
    theirs, ours = pair
    x = torch.randint(VOCAB, (2, length))
    want = theirs(x, use_cache=False).logits
    assert_close(ours(x)[0], want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@torch.no_grad()
def test_same_tokens_as_transformers(pair: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    """Greedy, token by token, 64 of them."""
    theirs, ours = pair
    prompt = torch.randint(VOCAB, (1, 9))
    want = theirs.generate(
        prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 9:]
    logits, state = ours(prompt)
    found = []
    for _ in range(64):
        token = logits[:, -1].argmax(-1, keepdim=True)
        found.append(token.item())
        logits, state = ours(token, state)
    assert found == want.tolist()


def test_the_published_start() -> None:
    model = zoo.create_model("mamba", d_model=D, n_layers=4, vocab_size=VOCAB)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mamba)
    assert_close(mixer.A_log[3].exp(), torch.arange(1.0, 17))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 9e-4 < steps.min() < steps.max() < 0.11
    assert steps.std() > 1e-3
    bound = (2 * D) ** -0.5 / 4**0.5  # kaiming-uniform with a = sqrt(5), over the root of the depth
    assert 0.9 * bound < mixer.out_proj.weight.abs().max() <= bound
    second = zoo.create_model("mamba2", d_model=D, n_layers=2, vocab_size=VOCAB, head_dim=16).blocks[0].mixer
    assert isinstance(second, Mamba2)
    assert 1 <= second.A_log.exp().min() <= second.A_log.exp().max() <= 16


def test_without_selection_no_token_chooses() -> None:
    torch.manual_seed(0)
    constant, selective = Mamba(8, selective=False), Mamba(8)
    x, other = torch.randn(2, 1, 5, 16)
    for ours, differs in ((constant, False), (selective, True)):
        for a, b in zip(ours._selection(x), ours._selection(other), strict=True):
            assert torch.equal(a, b) != differs
            assert torch.equal(a[:, 1:], a[:, :-1]) != differs


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Mamba2(32, head_dim=48), "head_dim must divide expand"),
    (lambda: Mamba2(32, head_dim=16, n_groups=3), "n_groups must divide the 4 heads; got 3"),
])  # fmt: skip
def test_refusals(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()

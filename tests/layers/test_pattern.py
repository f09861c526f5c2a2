"""The pattern grammar: layers, counts, groups, mixers side by side, and what is refused."""

import pytest

import zoo
from zoo.layers import Attention, GatedLinearAttention, Parallel, SequenceModel
from zoo.layers.pattern import Item, parse_pattern


def names(pattern: str) -> str:
    return " ".join("+".join(item.name for item in term) for term in parse_pattern(pattern))


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("gla", "gla"),
        ("deltanet*3, attention(window=512)", "deltanet deltanet deltanet attention"),
        ("mamba2 + attention", "mamba2+attention"),
        ("mamba2+attention(window=4) * 3, gla", "mamba2+attention mamba2+attention mamba2+attention gla"),
        ("(gla*2, attention)*2", "gla gla attention gla gla attention"),
        ("((a, b)*2, c + d)*2,e", "a b a b c+d a b a b c+d e"),
        (" ( gla ( n_heads = 2 ) ) ", "gla"),
    ],
)
def test_layers_of_a_pattern(pattern: str, layers: str) -> None:
    assert names(pattern) == layers


def test_options_are_literals_and_bare_words() -> None:
    assert parse_pattern("a(x=1, y=none, z=word, w=[1][0], v=true) + b") == [
        (Item("a", {"x": 1, "y": None, "z": "word", "w": "[1][0]", "v": True}), Item("b"))
    ]


@pytest.mark.parametrize(
    ("pattern", "rest"),
    [
        ("", "''"), ("gla,", "''"), ("gla +", "''"), ("+ gla", "'\\+ gla'"), ("(gla, attention", "''"),
        ("gla)", "'\\)'"), ("gla gla", "'gla'"), ("gla*", "'\\*'"), ("(gla)(n=1)", "'\\(n=1\\)'"),
        ("gla*0", "'gla\\*0'"), ("()", "'\\)'"), ("Gla", "'Gla'"), ("gla(n 2)", "'n 2\\)'"),
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused_where_it_breaks(pattern: str, rest: str) -> None:
    with pytest.raises(ValueError, match=rf"a pattern is .* unclear from {rest}; write for example"):
        parse_pattern(pattern)


def test_mixers_side_by_side_share_a_layer() -> None:
    model = zoo.create_model(
        "gla", d_model=32, n_layers=2, vocab_size=20, pattern="gla(n_heads=2) + attention(n_heads=2), gla"
    )
    assert isinstance(model, SequenceModel)
    first, second = (block.mixer for block in model.blocks.members())
    assert isinstance(first, Parallel)
    assert [type(mixer) for mixer in first.mixers] == [GatedLinearAttention, Attention]
    assert isinstance(second, GatedLinearAttention)


def test_an_unknown_mixer_beside_another_is_refused() -> None:
    with pytest.raises(ValueError, match="no mixer 'glaa' for a pattern"):
        zoo.create_model("gla", d_model=32, n_layers=1, vocab_size=20, pattern="gla + glaa")

"""flash-linear-attention's folders against its own classes: same keys, same shapes, same logits, there and back.

Its models run here on a CPU with their own wiring and the library's naive recurrences; only the leaves that exist as
GPU kernels alone are replaced: norms, short convolutions, the gated MLP's activation, rotation, softmax attention.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo import checkpoint
from zoo.errors import UserError

NEEDS = "needs flash-linear-attention; install the extra parity"
models = pytest.importorskip("fla.models", reason=NEEDS)
modules = pytest.importorskip("fla.modules", reason=NEEDS)
attn, delta_net, gated_deltanet, gla = (
    pytest.importorskip(f"fla.layers.{name}") for name in ("attn", "delta_net", "gated_deltanet", "gla")
)
delta_rule_recurrence = pytest.importorskip("fla.ops.delta_rule.naive").delta_rule_recurrence
gated_delta_rule = pytest.importorskip("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
naive_recurrent_gla = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
rotary_embedding_ref = pytest.importorskip("fla.modules.rotary.ops").rotary_embedding_ref

MODELS = {
    "gla": (models.GLAConfig, models.GLAForCausalLM),
    "delta_net": (models.DeltaNetConfig, models.DeltaNetForCausalLM),
    "gated_deltanet": (models.GatedDeltaNetConfig, models.GatedDeltaNetForCausalLM),
    "transformer": (models.TransformerConfig, models.TransformerForCausalLM),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 61, "intermediate_size": 40}


def rms_norm(self, x, residual=None, prenorm=False, residual_in_fp32=False):
    x = x if residual is None else x + residual
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
    return (y, x) if prenorm else y


def gated_rms_norm(self, x, g):
    assert self.activation in ("swish", "silu")
    return rms_norm(self, x) * F.silu(g)


def convolve(x, weight, activation):
    T, D = x.shape[1:]
    y = F.conv1d(x.transpose(1, 2), weight.reshape(D, 1, -1), padding=weight.shape[-1] - 1, groups=D)
    y = y[..., :T].transpose(1, 2)
    return F.silu(y) if activation in ("silu", "swish") else y


def short_convolution(self, x, **ignored):
    assert self.bias is None
    return convolve(x, self.weight, self.activation), None


def causal_conv1d(x, weight, bias=None, activation=None, **ignored):
    assert bias is None
    return convolve(x, weight, activation), None


def gated_mlp(self, x, **ignored):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def recurrent_gla(q, k, v, gk, **ignored):
    return naive_recurrent_gla(q, k, v, gk)


def recurrent_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel, **ignored):
    q, k = (unit(q), unit(k)) if use_qk_l2norm_in_kernel else (q, k)
    o, state = delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)))
    return o.transpose(1, 2), state


def recurrent_gated_delta_rule(
    q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, use_beta_sigmoid_in_kernel, **ignored
):
    assert use_beta_sigmoid_in_kernel
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    g = -A_log.exp() * F.softplus(g + dt_bias)
    q, k = (unit(x).repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    return gated_delta_rule(q, k, v, beta, g)


def softmax_attention(q, k, v, causal, window_size):
    assert causal
    T, behind = q.shape[1], window_size[0]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    back = torch.arange(T)[:, None] - torch.arange(T)[None]
    seen = (back >= 0) & ((back <= behind) if behind >= 0 else True)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def rotary(self, q, k, seqlen_offset=0, max_seqlen=None, cu_seqlens=None):
    angles = torch.arange(q.shape[1])[:, None] * self._compute_inv_freq()
    return tuple(rotary_embedding_ref(x, angles.cos(), angles.sin()) for x in (q, k))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Replace the leaves."""
    for owner, name, value in (
        (modules.RMSNorm, "forward", rms_norm),
        (modules.FusedRMSNormGated, "forward", gated_rms_norm),
        (modules.ShortConvolution, "forward", short_convolution),
        (modules.GatedMLP, "forward", gated_mlp),
        (modules.RotaryEmbedding, "forward", rotary),
        (gla, "fused_recurrent_gla", recurrent_gla),
        (delta_net, "fused_recurrent_delta_rule", recurrent_delta_rule),
        (gated_deltanet, "fused_recurrent_gated_delta_rule", recurrent_gated_delta_rule),
        (gated_deltanet, "causal_conv1d", causal_conv1d),
        (attn, "flash_attn_func", softmax_attention),
        (gla, "ACT2FN", {"swish": F.silu}),
    ):
        monkeypatch.setattr(owner, name, value)


def build(kind, **settings):
    """A model of the library, by its own classes, with weights that matter."""
    torch.manual_seed(0)
    config, model = MODELS[kind]
    built = model(config(**SMALL | settings)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            if parameter.ndim == 1 and "norm" in name:
                parameter.add_(1.0)
    return built


def assert_same_logits(ours, theirs, length=37):
    tokens = torch.randint(61, (2, length))
    with torch.no_grad():
        want, got = theirs(tokens, use_cache=False).logits, ours(tokens)[0]
    scale = want.abs().max()
    assert scale > 0.5
    assert_close(got / scale, want / scale, rtol=1e-5, atol=1e-5)


HYBRID = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 5, "rope_theta": 500.0}
CASES = {
    "gla": ("gla", {}),
    "gla, convolutions and grouped keys": ("gla", {"use_short_conv": True, "num_kv_heads": 1, "norm_eps": 1e-3}),
    "gla, floor, unfused norm": ("gla", {"clamp_min": -0.03, "fuse_norm": False, "expand_k": 1.0}),
    "gla, hybrid": ("gla", {"attn": HYBRID, "num_hidden_layers": 4}),
    "delta_net": ("delta_net", {"norm_eps": 1e-3}),
    "delta_net, gate, twice beta, tied": (
        "delta_net", {"use_gate": True, "allow_neg_eigval": True, "tie_word_embeddings": True, "conv_size": 3},
    ),
    "delta_net, elu and sum": ("delta_net", {"qk_activation": "elu", "qk_norm": "sum", "use_beta": False}),
    "delta_net, no convolution": ("delta_net", {"use_short_conv": False, "intermediate_size": None}),
    "delta_net, two kinds of attention": (
        "delta_net",
        {"num_hidden_layers": 4, "attn": [HYBRID, {"layers": [0, 3], "num_heads": 2, "num_kv_heads": 2}]},
    ),
    "gated_deltanet": ("gated_deltanet", {"head_dim": 12, "expand_v": 1.5}),
    "gated_deltanet, more value heads, no gate": (
        "gated_deltanet", {"head_dim": 8, "num_v_heads": 4, "use_gate": False, "allow_neg_eigval": True},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    kind, settings = CASES[case]
    theirs = build(kind, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.load(tmp_path / "theirs")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    for length in (1, 37):
        assert_same_logits(ours, theirs, length)
    zoo.save(ours, tmp_path / "own")
    assert_same_logits(zoo.load(tmp_path / "own"), theirs)

    checkpoint.export(ours, tmp_path / "back")
    written = MODELS[kind][0].from_pretrained(tmp_path / "back")
    for name, value in settings.items():
        if name not in ("attn", "fuse_norm", "intermediate_size"):
            assert getattr(written, name) == value, name
    again, report = MODELS[kind][1].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, again.eval())
    assert_same_logits(zoo.load(tmp_path / "back"), theirs)


@pytest.mark.parametrize(
    "settings", [{}, {"qk_norm": True, "num_kv_heads": 1}, {"window_size": 6, "rope_theta": 300.0, "num_heads": 4}]
)
def test_their_transformer(settings, tmp_path):
    theirs = build("transformer", **settings)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(zoo.load(tmp_path), theirs)


@pytest.mark.parametrize("name", ["gla", "deltanet", "gated_deltanet"])
@pytest.mark.parametrize("tied", [False, True])
def test_one_eps_stands_for_two(name, tied, tmp_path):
    """Our default has another eps in the output norm; theirs knows one for all."""
    torch.manual_seed(0)
    ours = zoo.create_model(
        name, d_model=32, n_layers=2, n_heads=2, vocab_size=61, hidden_size=40, tie_embeddings=tied,
        norm_eps=1e-2, output_norm_eps=3e-2,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    checkpoint.export(ours, tmp_path / "out")
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    theirs = MODELS[kind][1].from_pretrained(tmp_path / "out").eval()
    assert_same_logits(ours, theirs)
    with pytest.raises(UserError, match="which half precision would round; add --dtype float32"):
        checkpoint.export(ours.bfloat16(), tmp_path / "half")


def test_older_spellings(tmp_path):
    """A stacked gate_proj, embed_tokens, rms_norm_eps, a stored table of frequencies."""
    theirs = build("gla")
    theirs.save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(path)
    for i in range(2):
        up = tensors.pop(f"model.layers.{i}.mlp.up_proj.weight")
        gate = f"model.layers.{i}.mlp.gate_proj.weight"
        tensors[gate] = torch.cat([tensors[gate], up])
        tensors[f"model.layers.{i}.attn.rotary.inv_freq"] = torch.ones(3)
    tensors["model.embed_tokens.weight"] = tensors.pop("model.embeddings.weight")
    save_file(tensors, path)
    values = json.loads(config.read_text())
    values["rms_norm_eps"] = values.pop("norm_eps")
    config.write_text(json.dumps(values | {"share_conv_kernel": True, "norm_first": False}))
    assert_same_logits(zoo.load(tmp_path), theirs)


REFUSED = {
    "feature_map": ("gla", "relu", "says feature_map = 'relu', which zoo does not implement"),
    "use_output_gate": ("gla", False, "says use_output_gate = False, which zoo does not implement (only True)"),
    "hidden_act": ("gla", "powlu", "says hidden_act = 'powlu', which zoo does not implement"),
    "attnres_block_size": ("delta_net", 4, "says attnres_block_size = 4"),
    "qk_norm": ("delta_net", "sum", "divides by the sum of their absolute values, which zoo does not implement"),
    "use_output_norm": ("delta_net", False, "says use_output_norm = False"),
    "output_gate_activation": ("gated_deltanet", "sigmoid", "says output_gate_activation = 'sigmoid'"),
    "num_heads": ("gated_deltanet", "2", "'num_heads' in "),
    "brand_new": ("gated_deltanet", 3, "has fields that zoo does not know for this kind of model (brand_new = 3)"),
    "qkv_bias": ("transformer", True, "says qkv_bias = True"),
    "attn": ("gla", {"layers": [9], "num_heads": 2}, "names layer 9, and there are 2"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_zoo_does_not_implement_is_refused(field, tmp_path):
    kind, value, sentence = REFUSED[field]
    build(kind).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UserError) as refused:
        zoo.load(tmp_path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_architecture_than_the_config_names(tmp_path):
    build("delta_net").save_pretrained(tmp_path)
    other = tmp_path / "other"
    build("gla").save_pretrained(other)
    (tmp_path / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(UserError) as refused:
        zoo.load(tmp_path)
    said = str(refused.value)
    assert "does not hold the weights of model 'gla': 10 tensors are missing (model.layers.{0-1}.attn.gk_proj" in said
    assert "are unknown (model.layers.{0-1}.attn.b_proj.weight, model.layers.{0-1}.attn.k_conv1d.weight" in said


def test_what_the_library_cannot_hold_is_refused(tmp_path):
    small = {"d_model": 32, "n_layers": 2, "vocab_size": 61}
    for name, fields, sentence in (
        ("gla", {"temperature": 4.0}, "fixes GLA's gate_rank and temperature at 16"),
        ("gla", {"hidden_size": 0}, "has a feed-forward in every block"),
        ("gla", {"pattern": "gla, deltanet"}, "has no stack of gla and deltanet"),
        ("deltanet", {"qk_norm": "none"}, "has an output norm and a norm of queries and keys"),
        ("transformer", {"qk_norm": True}, "no norm of queries and keys"),
        ("transformer", {"pattern": "attention, attention(window=3)"}, "has the same attention in every layer"),
    ):
        with pytest.raises(UserError, match=sentence):
            checkpoint.export(zoo.create_model(name, **small, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()

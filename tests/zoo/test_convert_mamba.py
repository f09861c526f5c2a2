"""Mamba's and Mamba-2's folders: what configs mean, how tensors are called, and transformers' models as oracles."""

import json

import pytest
import torch
from torch.testing import assert_close

import zoo
from zoo import checkpoint
from zoo.convert import table
from zoo.convert.fields import Fields
from zoo.convert.formats.mamba import MAMBA
from zoo.decoding import generate
from zoo.errors import UserError

transformers = pytest.importorskip("transformers")

OF_THE_AUTHORS = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
SECOND = {
    "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "layer_norm_epsilon": 3e-5}
KINDS = {
    "mamba": (
        transformers.MambaConfig,
        transformers.MambaForCausalLM,
        {"state_size": 8, "use_associative_scan": False},
    ),
    "mamba2": (
        transformers.Mamba2Config,
        transformers.Mamba2ForCausalLM,
        {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    ),
}


def describe(values):
    return table.recognise(values, "config.json").describe(Fields(values, "config.json"))


def test_the_authors_configs():
    model, config = describe(OF_THE_AUTHORS)
    assert (model, config["vocab_size"], config["d_state"], config["dt_rank"]) == ("mamba", 50280, 16, None)
    assert (config["tie_embeddings"], config["norm_eps"], config["hidden_size"]) == (True, 1e-5, 0)
    model, config = describe(SECOND)
    assert (model, config["vocab_size"], config["d_state"], config["head_dim"]) == ("mamba2", 50288, 128, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_defaults_are_understood(kind):
    values = KINDS[kind][0]().to_dict()
    model, config = describe(values)
    assert model == kind
    assert config["d_model"] == values["hidden_size"]
    if kind == "mamba":  # as the converted folders of the authors have it
        repeated = {"d_model": 768, "d_inner": 1536, "n_layer": 32, "ssm_cfg": {}, "rms_norm": True}
        assert describe(values | repeated) == (model, config)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (OF_THE_AUTHORS | {"ssm_cfg": {"layer": "Mamba3"}}, "says layer 'Mamba3', and zoo reads 'Mamba1' and 'Mamba2'"),
        (OF_THE_AUTHORS | {"ssm_cfg": {"bias": True}}, "ssm_cfg in config.json says bias = True"),
        (OF_THE_AUTHORS | {"rms_norm": False}, "says rms_norm = False"),
        (OF_THE_AUTHORS | {"ssm_cfg": {"new": 1}}, "fields that zoo does not know for this kind of model (new = 1)"),
        (SECOND | {"attn_layer_idx": [3]}, "says attn_layer_idx = [3]"),
        (SECOND | {"d_intermediate": 64}, "says d_intermediate = 64"),
        (SECOND | {"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 1.0]}}, "says dt_limit = [0.0, 1.0]"),
        (transformers.MambaConfig(use_bias=True).to_dict(), "says use_bias = True"),
        (transformers.MambaConfig().to_dict() | {"time_step_rank": "many"}, "must be 'auto' or at least 1"),
        (transformers.MambaConfig().to_dict() | {"intermediate_size": 100}, "says intermediate_size = 100"),
        (transformers.Mamba2Config().to_dict() | {"time_step_limit": [0.1, 1.0]}, "says time_step_limit = [0.1, 1.0]"),
    ],
)
def test_what_zoo_does_not_implement_is_refused(values, sentence):
    with pytest.raises(UserError) as refused:
        describe(values)
    assert sentence in str(refused.value)


def test_names():
    assert MAMBA.names("blocks.11.mixer.in_proj.weight") == "backbone.layers.11.mixer.in_proj.weight"
    assert MAMBA.names("blocks.0.mixer_norm.weight") == "backbone.layers.0.norm.weight"
    assert MAMBA.names("norm.weight") == "backbone.norm_f.weight"
    assert MAMBA.stands_for("backbone.embedding.weight", ()) == ("backbone.embeddings.weight",)
    assert MAMBA.stored_shape("blocks.0.mixer.conv1d.weight", (64, 4)) == (64, 1, 4)
    with pytest.raises(KeyError, match=r"blocks.*|no foreign name for 'feed_forward.up_proj.weight'"):
        MAMBA.names("blocks.0.feed_forward.up_proj.weight")


def build(kind):
    torch.manual_seed(0)
    config, model, own = KINDS[kind]
    theirs = model(config(**SMALL | own)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs


def assert_same_logits(ours, theirs, length=37):
    tokens = torch.randint(61, (2, length))
    with torch.no_grad():
        want, got = theirs(tokens, use_cache=False).logits, ours(tokens)[0]
    scale = want.abs().max()
    assert scale > 0.5
    assert_close(got / scale, want / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, tmp_path):
    if kind not in zoo.list_models():
        pytest.skip(f"zoo has no {kind} yet")
    theirs = build(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.load(tmp_path / "theirs")
    for length in (1, 37):
        assert_same_logits(ours, theirs, length)
    checkpoint.export(ours, tmp_path / "back")
    again, report = KINDS[kind][1].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, again.eval())
    prompt = [5, 17, 3, 60, 42]
    want = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(generate(ours, prompt, max_tokens=64, temperature=0)) == want[0, 5:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_pickle(kind, tmp_path):
    if kind not in zoo.list_models():
        pytest.skip(f"zoo has no {kind} yet")
    theirs = build(kind)
    names = {name: name.replace("backbone.embeddings.", "backbone.embedding.") for name in theirs.state_dict()}
    torch.save({names[name]: value for name, value in theirs.state_dict().items()}, tmp_path / "pytorch_model.bin")
    own = {"d_state": 8} if kind == "mamba" else {"layer": "Mamba2", "d_state": 16, "headdim": 8, "ngroups": 2}
    values = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "ssm_cfg": own, "tie_embeddings": kind == "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for layer in theirs.backbone.layers:
        layer.norm.variance_epsilon = 1e-5
        if kind == "mamba2":
            layer.mixer.norm.variance_epsilon = 1e-5
    theirs.backbone.norm_f.variance_epsilon = 1e-5
    assert_same_logits(zoo.load(tmp_path), theirs)

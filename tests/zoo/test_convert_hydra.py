"""Hydra's BERT as its authors name it: what configs mean, and the loaded model against BERT's parts by hand."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.convert import table
from zoo.convert.fields import Fields
from zoo.errors import UserError
from zoo.layers import Hydra

transformers = pytest.importorskip("transformers")

OWN = {
    "use_position_embeddings": False, "matrix_mixer_type": "hydra", "is_prenorm": False, "d_conv": 7, "expand": 2,
    "chunk_size": 256, "d_state": 64, "is_data_dependent": True, "qk_dim": 16, "headdim": 64,
}  # fmt: skip
D, VOCAB = 32, 61
SMALL = {"hidden_size": D, "num_hidden_layers": 2, "vocab_size": VOCAB, "d_state": 8, "headdim": 16}


def config(**changes):
    return transformers.BertConfig(attention_probs_dropout_prob=0.0).to_dict() | OWN | changes


def describe(values):
    return table.recognise(values, "config.json").describe(Fields(values, "config.json"))


def test_the_published_config():
    model, fields = describe(config(num_hidden_layers=23, vocab_size=30528))
    assert model == "hydra"
    with torch.device("meta"):
        made = zoo.create_model("hydra", **fields)
    # the authors round the vocabulary up to a multiple of 8
    assert sum(p.numel() for p in made.parameters()) == 112_082_098 + 6 * 769


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"matrix_mixer_type": "toeplitz"}, "matrix_mixer_type 'toeplitz', and the only BERT that zoo reads is Hydra"),
        ({"matrix_mixer_type": None}, "with matrix_mixer_type 'none'"),
        ({"use_position_embeddings": True}, "says use_position_embeddings = True"),
        ({"hidden_act": "relu"}, "says hidden_act = 'relu'"),
        ({"layer_norm_eps": 1e-5}, "says layer_norm_eps = 1e-05, and zoo reads 1e-12 only"),
        ({"new": 1}, "fields that zoo does not know for this kind of model (new = 1)"),
    ],
)
def test_refusals(changes, sentence):
    with pytest.raises(UserError) as refused:
        describe(config(**changes))
    assert sentence in str(refused.value)


def stored():
    """A state dict with the authors' names and random numbers, the conv as torch.nn.Conv1d has it."""
    torch.manual_seed(0)
    made = {
        "bert.embeddings.word_embeddings.weight": torch.randn(VOCAB, D),
        "bert.embeddings.token_type_embeddings.weight": torch.randn(2, D),
    }
    for name in ("bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"):
        made |= {f"{name}.weight": 1 + 0.3 * torch.randn(D), f"{name}.bias": torch.randn(D)}
    made |= {"cls.predictions.transform.dense.weight": 0.3 * torch.randn(D, D)}
    made |= {"cls.predictions.transform.dense.bias": torch.randn(D), "cls.predictions.decoder.bias": torch.randn(VOCAB)}
    for i in range(2):
        layer = f"bert.encoder.layer.{i}.layer"
        mixer = {name: p + 0.2 * torch.randn_like(p) for name, p in Hydra(D, d_state=8, head_dim=16).named_parameters()}
        mixer["conv1d.weight"] = mixer["conv1d.weight"].unsqueeze(1)
        made |= {f"{layer}.mixer.{name}": value.detach() for name, value in mixer.items()}
        made |= {f"{layer}.norm.weight": 1 + 0.3 * torch.randn(D), f"{layer}.norm.bias": torch.randn(D)}
    return made


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("with_decoder", [True, False])
@torch.no_grad()
def test_the_loaded_model_is_bert_around_the_mixers(tmp_path, prefix, with_decoder):
    made = stored()
    written = {prefix + name: value for name, value in made.items()}
    if with_decoder:
        words = made["bert.embeddings.word_embeddings.weight"]
        written[prefix + "cls.predictions.decoder.weight"] = words.clone()
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config(**SMALL)))
    model = zoo.load(tmp_path)
    assert not model.training

    head = transformers.models.bert.modeling_bert.BertOnlyMLMHead(transformers.BertConfig(**{
        key: SMALL[key] for key in ("hidden_size", "vocab_size")}))  # fmt: skip
    head.predictions.decoder.weight = torch.nn.Parameter(made["bert.embeddings.word_embeddings.weight"])
    left = {n.removeprefix("cls."): v for n, v in made.items() if n.startswith("cls.")}
    head.load_state_dict(left | {"predictions.bias": left["predictions.decoder.bias"]}, strict=False)
    head.eval()

    def norm(x, name, eps):
        return F.layer_norm(x, (D,), made[f"{name}.weight"], made[f"{name}.bias"], eps)

    x = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))
    types = (torch.arange(19) > 9).long().expand(2, 19)
    h = made["bert.embeddings.word_embeddings.weight"][x] + made["bert.embeddings.token_type_embeddings.weight"][types]
    h = norm(h, "bert.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer, mixer = f"bert.encoder.layer.{i}.layer", Hydra(D, d_state=8, head_dim=16)
        own = {n.removeprefix(f"{layer}.mixer."): v for n, v in made.items() if n.startswith(f"{layer}.mixer.")}
        mixer.load_state_dict(own | {"conv1d.weight": own["conv1d.weight"].squeeze(1)})
        h = norm(h + mixer(h)[0], f"{layer}.norm", 1e-5)
    want = head(h)
    ours = model(x, token_types=types)[0]
    assert_close(ours / want.abs().max(), want / want.abs().max(), rtol=1e-5, atol=1e-5)

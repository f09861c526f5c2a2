"""Folders of other libraries: the same numbers in, the same numbers out, and nothing ignored."""

import json

import pytest
import torch
from torch.testing import assert_close

import zoo
from zoo import checkpoint
from zoo.decoding import generate

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 3e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "attn_implementation": "eager",
}  # fmt: skip


def randomise(model):
    """Weights that matter: norms away from one, logits of order one."""
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model.eval()


def llama(**changes):
    torch.manual_seed(0)
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes)))


def mistral(**changes):
    torch.manual_seed(1)
    settings = LLAMA | {"sliding_window": 7, "head_dim": 16}
    return randomise(transformers.MistralForCausalLM(transformers.MistralConfig(**settings | changes)))


def assert_same_logits(ours, theirs, length=37):
    tokens = torch.randint(ours.config.vocab_size, (2, length))
    with torch.no_grad():
        want, got = theirs(tokens).logits, ours(tokens)[0]
    scale = want.abs().max()
    assert scale > 0.5
    assert_close(got / scale, want / scale, rtol=1e-5, atol=1e-5)


CASES = {
    "grouped queries": llama,
    "one head each": lambda: llama(num_key_value_heads=4),
    "tied": lambda: llama(tie_word_embeddings=True),
    "window": mistral,
    "no window": lambda: mistral(sliding_window=None),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_there_and_back(case, tmp_path):
    theirs = CASES[case]()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.load(tmp_path / "theirs")
    assert (ours.name, ours.config.norm_eps, ours.config.rope_base) == ("transformer", 3e-6, 5e4)
    assert not ours.training
    for length in (1, 37):
        assert_same_logits(ours, theirs, length)
    checkpoint.export(ours, tmp_path / "back")
    kind = transformers.MistralForCausalLM if ours.config.window else transformers.LlamaForCausalLM
    again, report = kind.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, again.eval())
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    zoo.save(ours, tmp_path / "own")
    assert_same_logits(zoo.load(tmp_path / "own"), theirs)


@pytest.mark.parametrize("make", [llama, mistral])
def test_generation_token_by_token_is_theirs(make, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    ours = zoo.load(tmp_path)
    prompt = [5, 17, 3, 99, 42]
    got = list(generate(ours, prompt, max_tokens=64, temperature=0))
    want = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert got == want[0, len(prompt) :].tolist()
    assert len(set(got)) > 8  # not one token over and over


def test_shards_an_index_and_a_pickle_hold_the_same(tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    want = zoo.load(tmp_path / "parts")
    assert_same_logits(want, theirs)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tmp_path / "parts" / "config.json").read_text())
    state = theirs.state_dict()
    torch.save(state, tmp_path / "one" / "pytorch_model.bin")
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({n: t for n, t in state.items() if places[n] == file}, tmp_path / "two" / file)
    (tmp_path / "two" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for name in ("one", "two"):
        for key, value in zoo.load(tmp_path / name).state_dict().items():
            assert torch.equal(value, want.state_dict()[key]), key

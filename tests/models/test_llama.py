"""transformers' Llama as the oracle of the transformer: same weights, same logits."""

import pytest
import torch
from torch.testing import assert_close

import zoo

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_same_weights_same_logits(n_kv_heads: int) -> None:
    torch.manual_seed(0)
    ours = zoo.create_model(
        "transformer", d_model=64, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, hidden_size=96, vocab_size=100
    )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=n_kv_heads,
            intermediate_size=96, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    names = {
        "embedding.": "model.embed_tokens.", "blocks.": "model.layers.", "mixer_norm.": "input_layernorm.",
        "feed_forward_norm.": "post_attention_layernorm.", "mixer.": "self_attn.", "feed_forward.": "mlp.",
    }  # fmt: skip
    weights = {}
    for name, value in ours.state_dict().items():
        renamed = "model.norm.weight" if name == "norm.weight" else name
        for our_part, their_part in names.items():
            renamed = renamed.replace(our_part, their_part)
        weights[renamed] = value
    theirs.load_state_dict(weights)
    tokens = torch.randint(100, (2, 37))
    with torch.no_grad():
        want, got = theirs(tokens).logits, ours(tokens)[0]
    assert_close(got / want.abs().max(), want / want.abs().max(), rtol=1e-5, atol=1e-5)

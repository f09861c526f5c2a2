"""Qwen3 and SDAR folders give the logits of `transformers`' own Qwen3."""

import json
from pathlib import Path

import pytest
import torch

import zoo
from zoo import checkpoint
from zoo.errors import UserError
from zoo.ops import Visible

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_are_those_of_transformers(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, rope_theta=1e6, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "qwen")
    ours = zoo.load(str(tmp_path / "qwen")).eval()
    assert ours.name == "sdar"
    tokens = torch.randint(61, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-4)
        at = torch.arange(12)[None] // 4  # a block sees itself and all before it
        seen = at[0][:, None] >= at[0]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, 12, 12)
        blocks = ours.head(ours.hidden(tokens, visible=Visible(at, at, torch.full_like(at, 12))))
        want = theirs(tokens, attention_mask=mask).logits
        torch.testing.assert_close(blocks, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(blocks, ours(tokens)[0], atol=1e-2)


def test_an_sdar_folder_says_its_block_and_its_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    folder = tmp_path / "sdar"
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    said |= {"model_type": "sdar", "block_size": 8, "mask_token_id": 60, "fuse_cross_entropy": True}
    (folder / "config.json").write_text(json.dumps(said))
    ours = zoo.load(str(folder))
    assert (ours.config.block_size, ours.config.mask_token_id) == (8, 60)


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_is_read_by_transformers_and_by_us(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = zoo.create_model(
        "sdar", d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_size=48, vocab_size=61,
        tie_embeddings=tied, block_size=8, mask_token_id=60, init_std=0.3,
    ).eval()  # fmt: skip
    folder, tokens = tmp_path / "sdar", torch.randint(61, (2, 12))
    checkpoint.export(ours, folder)
    again = zoo.load(str(folder)).eval()
    said = json.loads((folder / "config.json").read_text())
    assert (said["model_type"], said["block_size"], said["mask_token_id"]) == ("sdar", 8, 60)
    (folder / "config.json").write_text(json.dumps(said | {"model_type": "qwen3"}))  # sdar is no class of transformers
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(tokens)[0], ours(tokens)[0], rtol=0, atol=0)


def test_what_qwen3_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"norms of queries and keys, .* this model has qk_norm=False"):
        checkpoint.export(zoo.create_model("sdar", qk_norm=False), tmp_path / "x")

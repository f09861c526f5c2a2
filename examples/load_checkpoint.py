"""Save a model, load it, go on from a state, and read a checkpoint of another library.

python examples/load_checkpoint.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoo


def own(folder: Path) -> None:
    """A checkpoint of zoo: model.safetensors and config.json. Nothing in it is code."""
    torch.manual_seed(0)
    model = zoo.create_model("gla", d_model=32, n_layers=2, n_heads=2, vocab_size=100).eval()
    zoo.save(model, folder)
    again = zoo.load(folder)  # zoo.load(folder, dtype="bfloat16", device="cuda") for large models
    tokens = torch.randint(100, (1, 20))
    assert torch.equal(model(tokens)[0], again(tokens)[0])
    _, state = again(tokens[:, :19])
    next_logits, _ = again(tokens[:, 19:], state)
    print(f"{again.name}: the next token after 20 is {next_logits[0, -1].argmax().item()}")


def foreign(folder: Path) -> None:
    """A checkpoint of transformers becomes zoo's transformer; its format is recognised by the config."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    ours = zoo.load(folder)
    tokens = torch.randint(100, (1, 20))
    with torch.no_grad():
        difference = (ours(tokens)[0] - theirs(tokens).logits).abs().max().item()
    print(f"{ours.name}: logits differ from transformers' by at most {difference:.1e}")
    assert difference < 1e-4


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        own(Path(folder) / "own")
        foreign(Path(folder) / "foreign")


if __name__ == "__main__":
    main()

"""Recall in one line of 16 tokens: four keys with their values, then the keys again; which value follows?

Vocabulary of 64, 2 layers of width 64, AdamW at 0.002 (one cycle), 1,200 steps of 32 sequences. Chance among the four
values is 0.25. Attention in chunks of 4 has each pair and its query in different chunks: what is recalled has to pass
through what moves between chunks.

    OMP_NUM_THREADS=1 python benchmarks/chunk_recall.py tcnca mega [--chunks 16,4] [--steps 1200] [--seed 0]
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.registry import model_info

PAIRS, VOCABULARY, BATCH, RATE = 4, 64, 32, 2e-3
SIZES: dict[str, Any] = {
    "d_model": 64, "n_layers": 2, "vocab_size": VOCABULARY, "hidden_size": 128, "d_key": 32, "d_value": 128,
    "conv_size": 3, "growth": 2, "n_levels": 3, "convolution": "dense", "d_state": 16, "n_heads": 2,
}  # fmt: skip


def sequences(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Tokens (batch, 16), and targets that are a value where a key is asked for and -100 elsewhere."""
    half = VOCABULARY // 2
    keys = torch.rand(batch, half, generator=generator).argsort(1)[:, :PAIRS]
    values = half + torch.randint(half, (batch, PAIRS), generator=generator)
    asked = torch.rand(batch, PAIRS, generator=generator).argsort(1)
    queries, answers = keys.gather(1, asked), values.gather(1, asked)
    told, said = (torch.stack(pair, dim=2).flatten(1) for pair in ((keys, values), (queries, answers)))
    targets = torch.full((batch, 4 * PAIRS), -100)
    targets[:, 2 * PAIRS :: 2] = answers
    return torch.cat([told, said], dim=1), targets


def accuracy(model: torch.nn.Module, generator: torch.Generator) -> float:
    """The share of right answers in 2,000 fresh sequences."""
    model.eval()
    tokens, targets = sequences(generator, 2000)
    with torch.no_grad():
        logits, _ = model(tokens)
    asked = targets != -100
    return (logits.argmax(-1)[asked] == targets[asked]).float().mean().item()


def run(name: str, *, steps: int = 1200, seed: int = 0, **fields: Any) -> float:
    """The accuracy of a model that was trained on fresh sequences."""
    torch.manual_seed(seed)
    known = model_info(name).fields
    sizes = {key: value for key, value in (SIZES | fields).items() if key in known}
    model = zoo.create_model(name, **sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens, targets = sequences(generator, BATCH)
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return accuracy(model, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="registered models")
    parser.add_argument("--chunks", default="16,4", help="sizes of chunks, for models that have such a field")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in given.names:
        chunked = "chunk_size" in model_info(name).fields
        for chunk in map(int, given.chunks.split(",") if chunked else "0"):
            start = time.perf_counter()
            fields = {"chunk_size": chunk} if chunked else {}
            right = run(name, steps=given.steps, seed=given.seed, **fields)
            words = f"{name}, chunks of {chunk}" if chunked else name
            print(f"{words}: {right:.3f} right, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""How fast does a plain chunked DeltaNet train on this machine, and how fast does zoo's?

The plain one is what one would write in an afternoon: torch's convolution, norms and loss, a bare loop, the chunked
delta rule with its gradients left to autograd. Same sizes, same step (forward, backward, clipping, AdamW), same batch;
both take turns, so that other load on the machine meets both.

    python benchmarks/plain_deltanet.py [--rounds 20] [--steps 3] [--threads N]
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo

WIDTH, LAYERS, HEADS, HIDDEN, VOCAB, BATCH, LENGTH, CHUNK = 128, 4, 2, 256, 257, 8, 256, 64


def plain_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """(B, H, T, K) each, beta (B, H, T): the UT transform chunk by chunk, gradients by autograd."""
    B, H, T, K = q.shape
    q, k, v = (x.reshape(B, H, T // CHUNK, CHUNK, K) for x in (q * K**-0.5, k, v))
    beta = beta.reshape(B, H, T // CHUNK, CHUNK, 1)
    eye = torch.eye(CHUNK, device=q.device)
    A = (beta * k @ k.mT).tril(-1)
    X = torch.linalg.solve_triangular(eye + A, eye.expand_as(A), upper=False, unitriangular=True)
    W, U = X @ (beta * k), X @ (beta * v)
    P = (q @ k.mT).tril()
    S, outputs = q.new_zeros(B, H, K, K), []
    for i in range(T // CHUNK):
        u = U[:, :, i] - W[:, :, i] @ S
        outputs.append(q[:, :, i] @ S + P[:, :, i] @ u)
        S = S + k[:, :, i].mT @ u
    return torch.stack(outputs, dim=2).reshape(B, H, T, K)


class PlainMixer(nn.Module):
    """DeltaNet's mixer as zoo's tiny model has it: short convolutions with silu, keys and queries of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.beta = nn.Linear(WIDTH, HEADS, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3, bias=False) for _ in range(3))
        self.norm = nn.RMSNorm(WIDTH // HEADS, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        streams = []
        for projection, conv in zip((self.q, self.k, self.v), self.convs, strict=True):
            y = F.silu(conv(projection(x).mT)[..., :T])  # (B, D, T)
            streams.append(y.reshape(B, HEADS, -1, T).mT)
        q, k, v = streams
        o = plain_delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, self.beta(x).sigmoid().mT)
        return self.o(self.norm(o).transpose(1, 2).reshape(B, T, WIDTH))


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.mixer = PlainMixer()
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def plain_model() -> nn.Module:
    blocks = [PlainBlock() for _ in range(LAYERS)]
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    return nn.Sequential(nn.Embedding(VOCAB, WIDTH), *blocks, nn.RMSNorm(WIDTH, eps=1e-6), head)


def stepper(model: nn.Module, logits: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], float]:
    """One training step of a bare loop; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        loss = F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps in one turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
    plain = plain_model()
    ours = zoo.create_model(
        "deltanet", d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_size=HIDDEN, vocab_size=VOCAB
    )
    models: dict[str, nn.Module] = {"plain": plain, "zoo": ours}
    sides = {"plain": stepper(plain, plain, tokens), "zoo": stepper(ours, lambda x: ours(x)[0], tokens)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn, (name, step) in itertools.product(range(args.rounds + 1), sides.items()):
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        if turn:  # the first turn warms up
            seconds[name].append((time.perf_counter() - start) / args.steps)

    rate = {name: BATCH * LENGTH / statistics.median(s) for name, s in seconds.items()}
    best = {name: BATCH * LENGTH / min(s) for name, s in seconds.items()}
    print(
        json.dumps(
            {
                "ratio": round(rate["zoo"] / rate["plain"], 3),
                "tokens_per_second": {name: round(x) for name, x in rate.items()},
                "best_turn": {name: round(x) for name, x in best.items()},
                "parameters": {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()},
                "threads": args.threads,
                "seed": args.seed,
                "torch": torch.__version__,
                "processor": platform.processor() or platform.machine(),
            },
            indent=2,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Training in plain PyTorch with time cut over two processes: losses and weights are those of one process.

    python examples/context_parallel_without_lightning.py

A loop of your own needs four things: `shard.use` around the model, targets that were shifted before the cut, the loss
of all tokens as the divisor, and gradients summed over the ranks.
"""

import multiprocessing
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.ops import shard

RANKS, STEPS, BATCH, LENGTH, VOCABULARY = 2, 8, 2, 65, 50  # 65 tokens: stretches of 32 and 33


def new_model() -> nn.Module:
    """A hybrid of a layer with a state and of attention, the same on every rank, by the same seed."""
    torch.manual_seed(0)
    model = zoo.create_model(
        "gla", pattern="gla, attention", d_model=32, n_layers=2, n_heads=2, hidden_size=32, vocab_size=VOCABULARY
    )
    return model.double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens after them, (BATCH, LENGTH): every rank makes the whole batch and keeps its stretch."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    text = (start + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
    return text[:, :-1], text[:, 1:]


def train(ranks: int, rank: int = 0, method: str | None = "zeco") -> tuple[list[float], Tensor]:
    """The loop, on this process's stretch of time; one rank has it all. Returns the losses and the weights."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    place = shard.SequenceShard(method=method, length=LENGTH) if ranks > 1 and method else None  # over all ranks
    left, right = shard.stretch(LENGTH, rank, ranks)
    losses = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        with shard.use(place):  # forward and backward pass: states, keys and values cross, and gradients cross back
            logits, _ = model(tokens[:, left:right])
            nll = F.cross_entropy(logits.flatten(0, 1), targets[:, left:right].flatten(), reduction="sum")
            loss = nll / targets.numel()  # of all tokens, not of this rank's
            optimizer.zero_grad()
            loss.backward()
        total = loss.detach()
        if ranks > 1:
            for value in [total, *(p.grad for p in model.parameters() if p.grad is not None)]:
                dist.all_reduce(value)
        optimizer.step()
        losses.append(total.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def process(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=RANKS)
    losses, weights = train(RANKS, rank)
    _, apart = train(RANKS, rank, method=None)  # a negative control: the stretches do not know of each other
    everywhere = [torch.empty_like(weights) for _ in range(RANKS)]
    dist.all_gather(everywhere, weights)
    if rank == 0:
        alone, exact = train(1)
        error = ((weights - exact).norm() / exact.norm()).item()
        print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} over {RANKS} processes, {alone[-1]:.4f} in one")
        print(f"relative difference of the weights after {STEPS} updates {error:.1e}")
        assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) < 1e-9
        assert error < 1e-9
        assert ((apart - exact).norm() / exact.norm()).item() > 1e-3
        assert losses[-1] < losses[0] - 0.5, "it learns"
        assert all(torch.equal(weights, other) for other in everywhere), "all ranks keep the same weights"
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    context = multiprocessing.get_context("fork")  # the imports above are there already; "spawn" works as well
    with tempfile.TemporaryDirectory() as store:
        processes = [context.Process(target=process, args=(rank, store)) for rank in range(RANKS)]
        for p in processes:
            p.start()
        for p in processes:
            p.join()
    assert [p.exitcode for p in processes] == [0] * RANKS


if __name__ == "__main__":
    main()

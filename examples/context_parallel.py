"""One sequence over two processes, without Lightning: loss and gradients equal those of one process.

    python examples/context_parallel.py

`shard.use` is all that is needed. The model and its operators have no line about ranks.
"""

import multiprocessing
import tempfile

import torch
import torch.distributed as dist
from torch.nn import functional as F

import zoo
from zoo.ops import shard

RANKS, LENGTH, VOCABULARY = 2, 101, 50  # 101 tokens: stretches of 50 and 51


def model_and_batch() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The same on every rank, by the same seed; targets are shifted before time is cut."""
    torch.manual_seed(0)
    model = zoo.create_model("deltanet", d_model=32, n_layers=2, n_heads=2, vocab_size=VOCABULARY).double()
    text = torch.randint(VOCABULARY, (2, LENGTH + 1))
    return model, text[:, :-1], text[:, 1:]


def loss_and_gradients(
    model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Of this process's tokens: their share of the mean over the whole sequence."""
    logits, _ = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (2 * LENGTH)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def process(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=RANKS)
    model, tokens, targets = model_and_batch()
    left, right = shard.stretch(LENGTH, rank, RANKS)  # this rank's tokens
    with shard.use(shard.SequenceShard(method="zeco")):
        loss, gradients = loss_and_gradients(model, tokens[:, left:right], targets[:, left:right])
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)  # losses and gradients of the stretches add up
    dist.all_reduce(gradients)
    if rank == 0:
        model.zero_grad()
        loss, exact = loss_and_gradients(model, tokens, targets)  # the whole sequence in one process
        error = ((gradients - exact).norm() / exact.norm()).item()
        print(f"loss over {RANKS} processes {total.item():.12f}, in one {loss:.12f}")
        print(f"relative difference of the gradients {error:.1e}")
        assert abs(total.item() - loss) < 1e-10
        assert error < 1e-10
        alone = loss_without_messages(model, tokens, targets)
        assert abs(alone - loss) > 1e-6, "without messages the second stretch would not know the first"
    dist.barrier()
    dist.destroy_process_group()


def loss_without_messages(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> float:
    """A negative control: the stretches one by one, each as if nothing came before it."""
    parts = [shard.stretch(LENGTH, rank, RANKS) for rank in range(RANKS)]
    return sum(loss_and_gradients(model, tokens[:, left:right], targets[:, left:right])[0] for left, right in parts)


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

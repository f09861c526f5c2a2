"""How does the peak memory of a training step grow with the length of the sequence?

Every length gets a process of its own, which runs one step (forward, loss, backward) of a model with activation
checkpointing and reports how much torch held at most above the model and its gradients, as torch.profiler counts
allocations. (Resident memory says little: it holds what the C library keeps, several times as much in some runs.)

    python benchmarks/memory_over_length.py [--model deltanet] [--lengths 4096 8192 16384 32768] [--threads N]
"""

import argparse
import json
import subprocess
import sys
import time

import torch

import zoo
from zoo.bench.measure import peak_bytes


def one(args: argparse.Namespace, length: int) -> dict[str, float]:
    """A step at one length, in this process."""
    torch.manual_seed(args.seed)
    model = zoo.create_model(
        args.model, d_model=args.width, n_layers=args.layers, n_heads=4, vocab_size=257, hidden_size=None,
        activation_checkpointing=not args.keep,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(257, (1, length + 1))
    start = time.perf_counter()

    def step() -> None:
        model.head_loss(model.hidden(tokens[:, :-1]), tokens[:, 1:]).backward()

    peak = peak_bytes(step, torch.device("cpu"))
    return {"tokens": length, "MiB": round(peak / 2**20), "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deltanet")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--keep", action="store_true", help="keep activations instead of recomputing them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        print(json.dumps(one(args, args.one)))
        return
    for length in args.lengths:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", str(length)], check=True)


if __name__ == "__main__":
    main()

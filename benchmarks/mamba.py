"""Mamba-130m on a CPU: against transformers' MambaForCausalLM with the same weights, against its own matrix products,
and over the length of the sequence.

    forward   logits of one sequence, all layers
    backward  forward + backward of single layers (the gradient of every step of transformers' loop over time is as long
              as the whole: its time grows with the square of the length, and 24 layers would take half an hour)
    decode    greedy, token by token, behind a short prompt, all layers; ours also as generate(compile=True) runs it
    scan      the selective scan of one layer beside the four matrix products of its projections
    length    a training step of a few layers, time per token from 1k to 16k tokens
    memory    forward of all layers, forward + backward of one layer: each side in a process of its own, as the rise of
              its resident memory

The sides take turns in one process; the first round warms up; medians. On a machine with other work --clock cpu with
one thread says more than the time on the wall.

    python benchmarks/mamba.py [--parts forward decode scan length memory backward] [--threads N] [--rounds 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from resident import peak, reset
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.decoding.compiled import CompiledStep, Step, step
from zoo.ops import selective_scan
from zoo.train.memory.malloc import keep_freed_arrays

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("forward", "decode", "scan", "length", "memory", "backward")
WIDTH, VOCAB, STATES = 768, 50280, 16
Sides = dict[str, Callable[[], Any]]


def pair(layers: int, vocab: int = VOCAB) -> tuple[Any, Any]:
    """transformers' model with random weights, and zoo's with the same."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, vocab_size=vocab, state_size=STATES, use_mambapy=False
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = zoo.load(folder)
    ours.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()}, assign=True)
    return theirs, ours.eval()


def turns(sides: Sides, args: argparse.Namespace, *, once: tuple[str, ...] = ()) -> dict[str, float]:
    """Median seconds of each side; those in `once` are run in a single round, for they take minutes."""
    rounds, now = args.rounds, CLOCKS[args.clock]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            if name in once and turn != 1:
                continue
            start = now()
            side()
            if turn:
                seconds[name].append(now() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def versus(what: str, times: dict[str, float], unit: float = 1e3, name: str = "ms") -> None:
    ratio = times["transformers"] / times["zoo"]
    sides = ", ".join(f"{side} {seconds * unit:.4g} {name}" for side, seconds in times.items())
    print(f"{what}: {ratio:.3g} times as fast ({sides})", flush=True)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-3) -> None:
    """After 24 layers at their random start both sides are 2e-4 from the same weights in float64."""
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < tolerance:
        raise SystemExit(f"the sides disagree: relative error {error:.1e}")


@torch.no_grad()
def forward(args: argparse.Namespace) -> None:
    theirs, ours = pair(args.layers)
    tokens = torch.randint(VOCAB, (1, 1024))
    close(ours(tokens)[0], theirs(tokens, use_cache=False).logits)
    linear = [module for module in ours.modules() if isinstance(module, torch.nn.Linear)]
    xs = [torch.randn(1, 1024, module.in_features) for module in linear]
    sides: Sides = {
        "transformers": lambda: theirs(tokens, use_cache=False),
        "zoo": lambda: ours(tokens),
        "zoo's matrix products": lambda: [F.linear(x, m.weight) for m, x in zip(linear, xs, strict=True)],
    }
    versus(f"forward, {args.layers} layers, B=1 T=1024", turns(sides, args))


@torch.inference_mode()
def decode(args: argparse.Namespace) -> None:
    theirs, ours = pair(args.layers)
    prompt, count, now = torch.randint(VOCAB, (1, 32)), 16, CLOCKS[args.clock]

    def zoos(advance: Step) -> list[int]:
        hidden, state = ours.encode(prompt)
        token = ours.head(hidden[:, -1:])[:, -1].argmax(-1, keepdim=True)
        logits, state = advance(ours, token, state)  # the first call of a compiled step is not compiled
        found, start = [token.item()], now()
        for _ in range(count):
            token = logits.argmax(-1, keepdim=True)
            found.append(token.item())
            logits, state = advance(ours, token, state)
        spent["zoo" if advance is step else "zoo, compiled"].append((now() - start) / count)
        return found

    def transformers_own() -> list[int]:
        out = theirs(prompt, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = theirs(token, cache_params=out.cache_params, use_cache=True)
        found, start = [token.item()], now()
        for _ in range(count):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(token.item())
            out = theirs(token, cache_params=out.cache_params, use_cache=True)
        spent["transformers"].append((now() - start) / count)
        return found

    def products() -> None:
        start = now()
        for _ in range(count):
            for module, x in zip(linear, xs, strict=True):
                F.linear(x, module.weight)
        spent["zoo's matrix products"].append((now() - start) / count)

    linear = [module for module in ours.modules() if isinstance(module, torch.nn.Linear)]
    xs = [torch.randn(1, 1, module.in_features) for module in linear]
    names = ("transformers", "zoo", "zoo, compiled", "zoo's matrix products")
    spent: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    zoos(CompiledStep())
    print(f"decoding: compiled in {time.perf_counter() - began:.0f} s", flush=True)
    for side in spent.values():
        side.clear()
    for _ in range(args.rounds + 1):
        if not transformers_own() == zoos(step) == zoos(CompiledStep()):
            raise SystemExit("the sides disagree about the tokens")
        products()
    times = {side: statistics.median(seconds[1:]) for side, seconds in spent.items()}
    versus(f"decoding, {args.layers} layers, {count} tokens", times, 1e3, "ms a token")
    print(f"    compiled: {times['transformers'] / times['zoo, compiled']:.3g} times as fast")


def backward(args: argparse.Namespace) -> None:
    for length in args.backward_lengths:
        sides, gradients = layer_steps(length)
        # transformers' fallback: seconds at 256, a minute and a half at 1024
        once = ("transformers",) if length > 256 else ()
        times = turns(sides, args, once=once)
        close(gradients["zoo"], gradients["transformers"])
        versus(f"forward + backward of one layer, B=1 T={length}", times)


def layer_steps(length: int) -> tuple[Sides, dict[str, Tensor]]:
    """One residual block of each side, forward and backward, and the gradient of the input that they left."""
    theirs, ours = pair(1, vocab=256)
    x, dy = torch.randn(1, length, WIDTH, requires_grad=True), torch.randn(1, length, WIDTH)
    gradients: dict[str, Tensor] = {}

    def step(name: str, block: Any, unpack: Callable[[Any], Tensor]) -> Callable[[], None]:
        weights = list(block.parameters())

        def run() -> None:
            gradients[name] = torch.autograd.grad(unpack(block(x)), [x, *weights], dy)[0]

        return run

    return {
        "transformers": step("transformers", theirs.backbone.layers[0], lambda y: y[0] if isinstance(y, tuple) else y),
        "zoo": step("zoo", ours.blocks[0], lambda y: y[0]),
    }, gradients


def scan(args: argparse.Namespace) -> None:
    _, ours = pair(1, vocab=256)
    mixer, T = ours.blocks[0].mixer, 1024
    E = mixer.d_inner
    u, delta = torch.randn(1, T, E), F.softplus(torch.randn(1, T, E) - 4)
    B, C = torch.randn(2, 1, T, STATES)
    given = [x.requires_grad_() for x in (u, delta, -mixer.A_log.detach().exp(), B, C, torch.ones(E))]
    dy = torch.randn(1, T, E)
    linear = [mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj]
    xs = [torch.randn(1, T, m.in_features, requires_grad=True) for m in linear]
    dys = [torch.randn(1, T, m.out_features) for m in linear]

    def products(grad: bool) -> None:
        for module, x, dy in zip(linear, xs, dys, strict=True):
            y = F.linear(x, module.weight)
            if grad:
                torch.autograd.grad(y, (x, module.weight), dy)

    def both() -> None:
        torch.autograd.grad(selective_scan(*given)[0], given, dy)

    times = turns(
        {
            "scan": torch.no_grad()(lambda: selective_scan(*given)),
            "products": torch.no_grad()(lambda: products(False)),
            "scan both": both,
            "products both": lambda: products(True),
        },
        args,
    )
    for name, what in (("", "forward"), (" both", "forward + backward")):
        ours_, floor = times["scan" + name], times["products" + name]
        print(
            f"scan, {what}, T={T} E={E} N={STATES}: {ours_ / floor:.2f} of the projections' products "
            f"({ours_ * 1e3:.0f} against {floor * 1e3:.0f} ms)",
            flush=True,
        )


def length(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("mamba", d_model=WIDTH, n_layers=args.length_layers, vocab_size=257)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(T: int) -> Callable[[], None]:
        tokens = torch.randint(257, (1, T + 1))

        def run() -> None:  # as many tokens at every length
            for _ in range(max(args.lengths) // T):
                hidden, _ = model.encode(tokens[:, :-1])
                model.head_loss(hidden, tokens[:, 1:]).backward()

        return run

    times = turns({str(T): step(T) for T in args.lengths}, args)
    for T, seconds in times.items():
        ratio, a_token = seconds / times[str(args.lengths[0])], seconds / max(args.lengths) * 1e6
        print(
            f"training step, {args.length_layers} layers, T={T}: {ratio:.3f} of the time a token at "
            f"T={args.lengths[0]} ({a_token:.0f} us a token)",
            flush=True,
        )


def memory(args: argparse.Namespace) -> None:
    for what in ("forward", *(f"{n}" for n in args.backward_lengths)):
        for side in ("transformers", "zoo"):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", what, side]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            label = f"forward, {args.layers} layers, T=1024" if what == "forward" else f"one layer, both, T={what}"
            print(f"memory, {label}, {side}: {json.loads(out.splitlines()[-1])['MiB']} MiB", flush=True)


def one(args: argparse.Namespace) -> None:
    """The memory of one pass of one side, in this process."""
    what, side = args.one
    if what == "forward":
        models = dict(zip(("transformers", "zoo"), pair(args.layers), strict=True))
        tokens = torch.randint(VOCAB, (1, 1024))
        run = torch.no_grad()(lambda: models[side](tokens))
    else:
        run = layer_steps(int(what))[0][side]
    reset()
    before = peak()
    run()
    print(json.dumps({"MiB": round((peak() - before) / 2**20)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--length-layers", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--backward-lengths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--keep-arrays", action=argparse.BooleanOptionalAction, default=True, help="as zoo train does")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept = args.keep_arrays and keep_freed_arrays()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.one is not None:
        one(args)
        return
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"{args.threads} threads; {args.clock} time; medians of {args.rounds} rounds; load {load}; "
        f"torch {torch.__version__}; transformers {transformers.__version__}; freed arrays kept: {kept}",
        flush=True,
    )
    for part in args.parts:
        globals()[part](args)


if __name__ == "__main__":
    main()

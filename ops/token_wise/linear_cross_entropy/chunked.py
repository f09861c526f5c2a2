"""The loss a chunk of tokens at a time: their logits, their losses, their gradients, and the logits are overwritten.

Both fast forms share the loop; they differ in the step that turns a chunk's logits into its losses and gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

# A chunk holds CHUNK_BYTES of logits, within (least, most) tokens. Too few tokens, and adding to a weight gradient that
# fits no cache dominates; too many, and the logits leave the cache. CPU, one thread, float32, forward and backward
# over F.linear + F.cross_entropy, on a shared machine: N=1024 D=512 V=50000: 64 tokens 1.05, 128 0.88, 192 0.86,
# 256 0.85, 512 0.84 (with 256 the process grows by 6.2 % of the logits of N=4096, besides the gradients); with two
# threads on two busy cores N=512: 192 1.00, 256 0.91; N=2048 D=256 V=4096: 256 0.75, 512 0.68, 1024 0.65, 2048 0.76;
# N=2048 D=128 V=257: 256 1.06, 512 0.91, 1024 0.90, 2048 0.94. Never slower than the plain path, so there is no size
# at which that is taken instead.
CHUNK_BYTES = 16 * 2**20
CPU_TOKENS = (256, 1024)
# Not measured on a device yet. Adding a chunk to the weight gradient moves 8 V D bytes for 6 c V D operations; a GPU
# that does 250 operations a byte needs c of some hundreds at least. A sixteenth of all tokens, within these bounds.
DEVICE_TOKENS = (256, 4096)
# Logits of half precision go through float32 so many bytes at a time; others are overwritten where they are, a chunk in
# one operation: with two threads on a busy machine the many small ones cost more time in waiting than they save.
ROW_BYTES = 2 * 2**20


class Step(NamedTuple):
    """What a form does with a chunk's logits z (n, V) and targets (n,), -1 where not scored.

    losses: (z, targets) -> (n,), in float32 or better, 0 where not scored; z is lost.
    gradients_: the same, and z becomes softmax(z) - onehot(targets), rows of zeros where not scored.
    """

    losses: Callable[[Tensor, Tensor], Tensor]
    gradients_: Callable[[Tensor, Tensor], Tensor]


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, weight, bias


def reduced_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    mean: bool, products: torch.dtype, drop: bool, step: Step,
) -> Tensor:  # fmt: skip
    """The sum or the mean over the scored tokens; gradients come out of the forward pass.

    Args:
        x, weight, bias, targets: (N, D), (V, D), (V,) or None, (N,) with -1 where not scored.
        products: the dtype of the matrix products' factors on a device; on a CPU it is float32, or float64.
        drop: leave tokens that are not scored out first. That reads the targets: not where a device would be waited
            for. The torch step needs it on a CPU.
    """
    y: Tensor = apply(_Reduced, x, weight, bias, targets, mean, products, drop, torch.is_grad_enabled(), step)
    return y


def token_losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, products: torch.dtype, drop: bool, step: Step
) -> Tensor:
    """The loss of every token, (N,); the backward pass makes the logits again, for it needs the upstream gradient."""
    y: Tensor = apply(_PerToken, x, weight, bias, targets, products, drop, step)
    return y


class _Reduced(torch.autograd.Function):
    """Three products in all: logits, dx and dweight, chunk by chunk; backward multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        mean: bool, products: torch.dtype, drop: bool, differentiable: bool, step: Step,
    ) -> Tensor:  # fmt: skip
        wanted = tuple(differentiable and needed for needed in ctx.needs_input_grad[:3])
        losses, gradients = _sweep(x, weight, bias, targets, None, wanted, products, drop, step)
        count = (targets >= 0).sum() if mean else targets.new_ones(())  # nothing here waits for the device
        ctx.gradients = gradients  # plain attributes: what checkpointing or offloading does to saved tensors costs here
        ctx.scale = 1 / count.to(losses.dtype)
        ctx.dtypes = _dtypes(x, weight, bias)
        loss: Tensor = losses.sum() * ctx.scale
        return loss

    @staticmethod
    @first_order("linear_cross_entropy", "use backend='reference', which holds all logits")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: its gradients are made in the forward pass and given away by the first backward "
                "pass, and this is a second one; pass retain_graph=True to the first, or call the operator again"
            )
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        # nothing scored: the mean is NaN, as torch's is, and gradients are zeros times infinity; they are zeros
        factor = dloss * torch.where(ctx.scale.isinf(), 0.0, ctx.scale)
        grads = tuple(
            None if g is None else _scaled(g, factor, dtype, kept)
            for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        if not kept:
            ctx.gradients = None
        return *grads, None, None, None, None, None, None


class _PerToken(torch.autograd.Function):
    """Losses that may be weighted afterwards: weights must enter before the sum over tokens, hence a second sweep."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        products: torch.dtype, drop: bool, step: Step,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, targets)
        ctx.how = products, drop, step
        return _sweep(x, weight, bias, targets, None, (False, False, False), *ctx.how)[0]

    @staticmethod
    @first_order("linear_cross_entropy", "use backend='reference', which holds all logits")
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets = ctx.saved_tensors
        # small upstream gradients would be lost in half precision: 1 at most here, the size comes back in float32
        size = dlosses.abs().amax().clamp(min=torch.finfo(dlosses.dtype).tiny)
        wanted = ctx.needs_input_grad[:3]
        _, gradients = _sweep(x, weight, bias, targets, dlosses / size, wanted, *ctx.how)
        grads = tuple(
            None if g is None else _scaled(g, size, dtype, False)
            for g, dtype in zip(gradients, _dtypes(x, weight, bias), strict=True)
        )
        return *grads, None, None, None, None


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if x is None else x.dtype for x in tensors)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype | None, keep: bool) -> Tensor:
    """gradient * factor, the product in float32 or better; in place unless the gradient is to be used again."""
    if keep or gradient.dtype != factor.dtype:
        return (gradient.to(factor.dtype) * factor).to(dtype)
    return gradient.mul_(factor).to(dtype)


def _sweep(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None,
    wanted: tuple[bool, ...], products: torch.dtype, drop: bool, step: Step,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """All tokens' losses (N,), and the wanted gradients of sum(rows * losses); without `rows` of their sum."""
    scored = torch.nonzero(targets >= 0)[:, 0] if drop else None
    if scored is None or len(scored) == len(targets):
        return _sweep_chunks(x, weight, bias, targets, rows, wanted, products, drop, step)
    some, (dx, dweight, dbias) = _sweep_chunks(
        x[scored], weight, bias, targets[scored], None if rows is None else rows[scored], wanted, products, drop, step
    )
    losses = some.new_zeros(len(targets)).index_copy_(0, scored, some)
    if dx is not None:
        dx = torch.zeros_like(x).index_copy_(0, scored, dx)
    return losses, (dx, dweight, dbias)


def _sweep_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None,
    wanted: tuple[bool, ...], products: torch.dtype, dropped: bool, step: Step,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    (n, D), V = x.shape, weight.shape[0]
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    # a CPU without units for it multiplies bfloat16 14 to 39 times slower than float32, float16 17 to 29 times (one
    # thread of an AMD EPYC); a GPU's units accumulate in float32 by themselves
    work = wide if x.device.type == "cpu" else products
    matrix, shift = weight.to(work), None if bias is None else bias.to(work)
    size = chunk_tokens(n, V, work, x.device)
    losses = torch.empty(n, dtype=wide, device=x.device)
    dx = torch.empty_like(x) if wanted[0] else None
    # sums over chunks in float32: in half precision they would lose a bit for every doubling of the number of chunks
    dweight = torch.zeros(V, D, dtype=wide, device=x.device) if wanted[1] else None
    dbias = torch.zeros(V, dtype=wide, device=x.device) if wanted[2] else None
    logits = torch.empty(size, V, dtype=work, device=x.device)
    for i in range(0, n, size):
        here = slice(i, min(i + size, n))
        xs, ts = x[here].to(work), targets[here]
        z = logits[: len(ts)]
        if shift is None:
            torch.mm(xs, matrix.T, out=z)
        else:
            torch.addmm(shift, xs, matrix.T, out=z)
        if not any(wanted):
            losses[here] = step.losses(z, ts)
            continue
        losses[here] = step.gradients_(z, ts)
        if dx is not None:
            part = z @ matrix
            dx[here] = part if rows is None else part * rows[here, None]
        if dweight is not None:
            if rows is not None:
                xs = xs * rows[here, None].to(work)
            if not dropped:  # what is not scored may be anything, and 0 * NaN is NaN
                xs = xs.masked_fill((ts < 0)[:, None], 0.0)
            if work == wide:
                dweight.addmm_(z.T, xs)
            else:
                dweight += z.T @ xs
        if dbias is not None:
            dbias += (z.sum(0, dtype=wide)) if rows is None else (z.T @ rows[here].to(work)).to(wide)
    return losses, (dx, dweight, dbias)


def chunk_tokens(n: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens' logits are held at once."""
    least, most = CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS
    wanted = CHUNK_BYTES // (vocabulary * dtype.itemsize)
    if device.type != "cpu":
        wanted = max(wanted, n // 16)
    return max(1, min(n, max(least, min(most, wanted))))


def _losses(z: Tensor, targets: Tensor) -> Tensor:
    safe, parts = targets.clamp(min=0)[:, None], []
    for here in _row_blocks(z):
        parts.append(_log_softmax_(z[here]).gather(1, safe[here])[:, 0])
    return torch.cat(parts).neg_().masked_fill_(targets < 0, 0.0)


def _gradients_(z: Tensor, targets: Tensor) -> Tensor:
    safe, parts = targets.clamp(min=0)[:, None], []
    for here in _row_blocks(z):
        log_p = _log_softmax_(z[here])
        parts.append(log_p.gather(1, safe[here])[:, 0])
        torch.exp(log_p, out=z[here])
    z.scatter_add_(1, safe, z.new_full((1, 1), -1.0).expand_as(safe))
    if z.device.type != "cpu":  # there they were left out
        z.masked_fill_((targets < 0)[:, None], 0.0)
    return torch.cat(parts).neg_().masked_fill_(targets < 0, 0.0)


def _log_softmax_(z: Tensor) -> Tensor:
    """log_softmax over the last dimension, in place where that is float32 at least; z is lost."""
    if z.dtype in (torch.float32, torch.float64):
        return torch.log_softmax(z, dim=1, out=z)
    return torch.log_softmax(z, dim=1, dtype=torch.float32)


def _row_blocks(z: Tensor) -> list[slice]:
    if z.dtype in (torch.float32, torch.float64):
        return [slice(0, len(z))]
    rows = max(1, ROW_BYTES // (z.shape[1] * z.element_size()))
    return [slice(i, i + rows) for i in range(0, len(z), rows)]


TORCH_STEP = Step(_losses, _gradients_)

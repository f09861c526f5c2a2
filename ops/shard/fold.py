"""The state at a rank's left edge where states join by any associative rule: a fold of the ranks' elements in order.

Z_{r+1} = join(Z_r, e_r), where Z_0 is the first rank's state. `incoming_state` is the same for affine elements, whose
gradients need transitions only. Here the rule is a function, and gradients return through it: with G_r the whole
gradient of Z_r and dZ_r the part that rank r's own use of it makes, G_r = dZ_r + (d join(Z_r, e_r) / d Z_r)^T G_{r+1}.
That is the same exchange from the other side.

| method | a rank receives | in |
|---|---|---|
| allgather, lasp2 | (P - 1) elements; backward (P - 1)(element + its gradient) | one all-gather each way |
| lasp, zeco | one state each way | P - 1 messages, one after the other |

A log-sum-exp is small, so that "zeco" cuts nothing into blocks here, and "lasp2" has no transitions to keep.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import ON_ONE_RANK, first_order
from zoo.ops.shard import exchange
from zoo.ops.shard.prefix_scan import cut_here
from zoo.ops.shard.scope import Scope
from zoo.ops.shard.sequence_shard import SequenceShard

S = TypeVar("S")
Leaves = Sequence[Tensor]


def incoming_fold(
    join: Callable[[S, S], S], element: S, state: S, several: bool = False, *, inputs: Sequence[Tensor | None] = ()
) -> S:
    """The state at the left edge of this rank's stretch: the state before the sequence, joined by all earlier elements.

    Args:
        join: (what came before, what follows) -> both together, trees like `state`. Associative, differentiable by
            autograd, and without messages of its own; as `zoo.ops.core.algebra.LogSumExp.then`.
        element: of this rank's stretch, a tree of tensors like `state`; with several documents of the last one, on its
            own. Integer leaves have no gradient.
        state: before the first token, a tensor or a tree of tensors with sequences or documents in dimension 0. On the
            first rank it is kept; on the others the first document's row, or all rows of a batch, is replaced.
        several: the stretch holds more than one packed document, so that what arrives ends inside.
        inputs: of the operator, where `element` is not made of them: wherever autograd asks for a gradient of one it
            must come by here, for other ranks wait. See also `tied`.

    Returns:
        As `state`. Gradients reach every rank whose tokens made it, and the first rank's `state`.

    Raises:
        ValueError: the shard's layout is not contiguous, its method sends heads and not states, or element and state
            differ in shapes or dtypes.

    Cost: by the shard's method, see the table of this file.
    """
    active = cut_here()
    if active is None:
        return state
    if several:
        element = join(tree_map(lambda x: x[-1:], state), element)
    given, structure = tree_flatten(tree_map(lambda x: x[:1], state) if several else state)
    own, _ = tree_flatten(element)
    told, wanted = ([(x.shape, x.dtype) for x in leaves] for leaves in (own, given))
    if told != wanted:  # else ranks would wait for bytes that never come
        raise ValueError(
            f"incoming_fold: the element must have the leaves of the state, of the same shapes and dtypes; got {told} "
            f"and {wanted}, convert the element"
        )
    rule = _Rule(join, structure, [x.is_floating_point() for x in given])
    first = apply(_Fold, active, rule, several, *given, *own, *inputs)
    if not several:
        arrived: S = tree_unflatten(list(first), structure)
        return arrived
    rows: S = tree_unflatten(
        [torch.cat([x, y[1:]]) for x, y in zip(first, tree_flatten(state)[0], strict=True)], structure
    )
    return rows


class _Rule(NamedTuple):
    """A join on the flat leaves of its trees."""

    join: Callable[[Any, Any], Any]
    structure: TreeSpec
    floating: list[bool]

    def __call__(self, first: Leaves, second: Leaves) -> list[Tensor]:
        together = self.join(tree_unflatten(list(first), self.structure), tree_unflatten(list(second), self.structure))
        return [x.contiguous() for x in tree_flatten(together)[0]]

    def pull(self, first: Leaves, second: Leaves, upstream: Leaves) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of both arguments under those of the result, floating leaves only."""
        with torch.enable_grad():
            first, second = (
                [x.detach().requires_grad_(f) for x, f in zip(leaves, self.floating, strict=True)]
                for leaves in (first, second)
            )
            together = self(first, second)
        pairs = [(x, g) for x, g in zip(self.of_floating(together), upstream, strict=True) if x.requires_grad]
        leaves = [*self.of_floating(first), *self.of_floating(second)]
        if not pairs:
            gradients = [torch.zeros_like(x) for x in leaves]
        else:
            gradients = list(
                torch.autograd.grad(
                    [x for x, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
                )
            )
        return gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :]

    def of_floating(self, leaves: Sequence[Any]) -> list[Any]:
        return [x for x, floating in zip(leaves, self.floating, strict=True) if floating]


class _Stretch(NamedTuple):
    """What a rank tells of its stretch: whether what arrives ends inside, its element, in the backward dZ, too."""

    ends: bool
    element: list[Tensor]
    gradients: list[Tensor]


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Scope, rule: _Rule, several: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(rule.floating)
        state, element = tensors[:count], [x.contiguous() for x in tensors[count : 2 * count]]
        way = _WAYS[active.shard.method]
        Z = active.arrivals(lambda: tuple(way.forward(active.shard, rule, several, element, state)))
        ctx.shard, ctx.rule, ctx.several, ctx.way, ctx.others = active.shard, rule, several, way, len(tensors) - count
        ctx.save_for_backward(*element, *Z)
        ctx.mark_non_differentiable(*(x for x, floating in zip(Z, rule.floating, strict=True) if not floating))
        return Z

    @staticmethod
    @first_order("shard.incoming_fold", ON_ONE_RANK)
    def backward(ctx: Any, *dZ: Tensor) -> tuple[Tensor | None, ...]:
        rule, count = ctx.rule, len(ctx.rule.floating)
        saved = ctx.saved_tensors  # checkpointing gives them once
        element, Z = saved[:count], saved[count:]
        own = [d.contiguous() for d in rule.of_floating(dZ)]
        dstate, delement = ctx.way.backward(ctx.shard, rule, ctx.several, element, Z, own)
        made = iter([*dstate, *delement])
        leaves = [next(made) if floating else None for floating in (*rule.floating, *rule.floating)]
        if ctx.shard.rank:
            leaves[:count] = [None] * count  # what was given there was not used
        return None, None, None, *leaves, *(None for _ in range(ctx.others - count))


class _Gathered:
    """The elements of all ranks to all, folded there in order."""

    @staticmethod
    def forward(shard: SequenceShard, rule: _Rule, several: bool, element: list[Tensor], state: Leaves) -> list[Tensor]:
        leaving = rule(state, element) if shard.rank == 0 and not several else element
        everyone = _gather(shard, _Stretch(several or shard.rank == 0, leaving, []))
        if shard.rank == 0:
            return [x.clone() for x in state]
        Z = everyone[0].element
        for stretch in everyone[1 : shard.rank]:
            Z = stretch.element if stretch.ends else rule(Z, stretch.element)
        return [x.clone() for x in Z]

    @staticmethod
    def backward(
        shard: SequenceShard, rule: _Rule, several: bool, element: Leaves, Z: Leaves, dZ: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        later = _gather(shard, _Stretch(several, list(element), dZ))[shard.rank + 1 :]
        states = [list(element) if several else rule(Z, element)]  # that enter the later ranks
        for stretch in later[:-1]:
            states.append(stretch.element if stretch.ends else rule(states[-1], stretch.element))
        G = [torch.zeros_like(x) for x in dZ]
        for stretch, entering in zip(reversed(later), reversed(states[: len(later)]), strict=True):
            passed = G if stretch.ends else rule.pull(entering, stretch.element, G)[0]
            G = list(stretch.gradients) if stretch.ends else _sum(stretch.gradients, passed)
        return _through(rule, several, element, Z, dZ, G)


class _Chain:
    """Each rank receives one state, joins its element and sends one state; gradients go the other way."""

    @staticmethod
    def forward(shard: SequenceShard, rule: _Rule, several: bool, element: list[Tensor], state: Leaves) -> list[Tensor]:
        Z = [x.clone(memory_format=torch.contiguous_format) for x in state]
        if shard.rank:
            Z = _receive(shard, Z, shard.rank - 1)
        if shard.rank + 1 < shard.size:
            _send(shard, element if several else rule(Z, element), shard.rank + 1)
        return Z

    @staticmethod
    def backward(
        shard: SequenceShard, rule: _Rule, several: bool, element: Leaves, Z: Leaves, dZ: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        G = [torch.zeros_like(x) for x in dZ]
        if shard.rank + 1 < shard.size:
            G = _receive(shard, G, shard.rank + 1)
        dstate, delement = _through(rule, several, element, Z, dZ, G)
        if shard.rank:
            _send(shard, dstate, shard.rank - 1)
        return dstate, delement


_WAYS: dict[str, type[_Gathered] | type[_Chain]] = {
    "allgather": _Gathered, "lasp2": _Gathered, "lasp": _Chain, "zeco": _Chain
}  # fmt: skip


def _through(
    rule: _Rule, several: bool, element: Leaves, Z: Leaves, dZ: list[Tensor], G: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the state that entered a stretch and of its element, under those of the state that left it."""
    if several:
        return dZ, G
    passed, delement = rule.pull(Z, element, G)
    return _sum(dZ, passed), delement


def _sum(first: Leaves, second: Leaves) -> list[Tensor]:
    return [x + y for x, y in zip(first, second, strict=True)]


def _gather(shard: SequenceShard, own: _Stretch) -> list[_Stretch]:
    """The stretches of all ranks, in one all-gather of bytes, for the leaves' dtypes differ."""
    leaves = [*own.element, *own.gradients]
    flag = torch.tensor([own.ends], dtype=torch.uint8, device=leaves[0].device)
    flat = torch.cat([flag, *(x.reshape(-1).view(torch.uint8) for x in leaves)])
    sizes = [1, *(x.nbytes for x in leaves)]
    everyone = []
    for flat_of_rank in exchange.all_gather(shard, flat, "state"):
        ends, *parts = flat_of_rank.split(sizes)
        # copies: a view in another dtype must begin at a multiple of its size
        whole = [part.clone().view(x.dtype).view(x.shape) for part, x in zip(parts, leaves, strict=True)]
        everyone.append(_Stretch(bool(ends.item()), whole[: len(own.element)], whole[len(own.element) :]))
    return everyone


def _send(shard: SequenceShard, leaves: Leaves, rank: int) -> None:
    exchange.meet(shard, {rank: leaves}, {}, "state").wait()


def _receive(shard: SequenceShard, like: Leaves, rank: int) -> list[Tensor]:
    return exchange.meet(shard, {}, {rank: like}, "state").wait()[rank]

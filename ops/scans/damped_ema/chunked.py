"""Fast torch form: matrix products inside chunks of time, and a scan of the states between them.

The averages do not depend on time, so all chunks of a channel share their matrices. With C tokens a chunk,

    y_i   = sum_{j<=i} k_{i-j} x_j + sum_n c_n a_n^{i+1} h_n      k_l = sum_n c_n b_n a_n^l
    h'_n  = a_n^C h_n + sum_j a_n^{C-1-j} b_n x_j

where h is the state before the chunk. The sums over j are one product a channel, (chunks, C) by (C, C + N); what the
states show is another. Between them `affine_scan` runs over the chunks, C times fewer steps than tokens. Powers of a
lie in [0, 1], nothing is divided, and no transform is taken: cost and memory are linear in time.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import shard
from zoo.ops.core.cached import cached_tensors
from zoo.ops.scans.affine_scan import affine_scan

# Tokens of a chunk. CPU time of forward / forward + backward in ms, float32, one EPYC core, N = 16, for C = 16, 32, 64,
# 128, and of `fft_convolution` with the kernel of the averages: B=1 T=2048 D=64 takes 2.0/5.2, 2.6/6.3, 4.4/9.8,
# 7.7/18.7, Fourier 22/32; B=1 T=16384 D=512 takes 150/418, 267/778, 375/838, 496/1110, Fourier 2049/4191. Not tuned on
# a GPU yet.
CHUNK = 16
# Numbers of x that go through all steps before the next ones do, so that they lie in a CPU's cache. As above with
# C = 16 and memory that is kept: T=16384 D=64 takes 24/59, 17/37, 14/32, 14/37 with 2**15, 2**17, 2**18, 2**19, and
# 17/41 at once; B=4 T=2048 D=128 takes 19/56, 14/35, 13/31, 13/35, and 19/44 at once.
SEGMENT = 2**18


class Cut(NamedTuple):
    """Documents as whole chunks, one behind the other, for a stream of T tokens and then one of zeros; all int64.

    tokens: (G, C) the token at each place, T where a document has ended; places: (T,) where each token stands, of G C.
    bounds: (n + 1,) the first chunk of every document with tokens.
    filled: (n,) which documents have tokens; last: (n,) the last chunk of each.
    ends: (n, C) its tokens behind missing ones (T); counts: (n,) how many of them there are.
    """

    tokens: Tensor
    places: Tensor
    bounds: Tensor
    filled: Tensor
    last: Tensor
    ends: Tensor
    counts: Tensor


@cached_tensors()
def cut(cuts: tuple[int, ...], size: int, device: torch.device) -> Cut:
    """Where the tokens of the documents between `cuts` go."""
    T, tokens, places, bounds = cuts[-1], list[int](), list[int](), [0]
    filled, ends, counts = list[int](), list[list[int]](), list[int]()
    for i, (left, right) in enumerate(itertools.pairwise(cuts)):
        if left == right:
            continue
        places += range(len(tokens), len(tokens) + right - left)
        tokens += [*range(left, right), *[T] * (-(right - left) % size)]
        bounds.append(len(tokens) // size)
        begin = right - 1 - (right - left - 1) % size
        filled.append(i)
        ends.append([*[T] * (size - right + begin), *range(begin, right)])
        counts.append(right - begin)
    made = (tokens, places, bounds, filled, [n - 1 for n in bounds[1:]], ends, counts)
    index = [torch.tensor(x, dtype=torch.int64, device=device) for x in made]
    return Cut(index[0].view(-1, size), *index[1:])


def damped_ema_chunked(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, cuts: tuple[int, ...] | None, *,
    backend: str = "auto", chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All of one dtype: x (B, T, D) with T at least 1, a, b, c (D, N), state (B, D, N) or (n, D, N).

    Args:
        cuts: borders of packed documents, of which one has a token; None for a batch.
        backend: of the scan over chunks.
        chunk: C.
    """
    if cuts is None:
        chunk = min(chunk, x.shape[1])
        matrices = _Matrices.of(a, b, c, chunk)
        if not x.is_cpu or (steps := max(1, SEGMENT // (x[:, :1].numel() * chunk)) * chunk) >= x.shape[1]:
            return _batch(x, matrices, a, state, backend)
        outputs = []
        for piece in x.split(steps, dim=1):
            y, state = _batch(piece, matrices, a, state, backend)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state
    index = cut(cuts, chunk, x.device)
    stream = F.pad(x[0], (0, 0, 0, 1))  # (T + 1, D)
    matrices = _Matrices.of(a, b, c, chunk)
    chunks = stream[index.tokens].permute(2, 0, 1)  # (D, G, C)
    inside, written = matrices.inside(chunks)
    before = state[index.filled]
    starts, _ = _between(matrices, written, before, index.bounds, backend)
    y = matrices.shown(inside, starts).permute(1, 2, 0).flatten(0, 1)[index.places]
    # the last chunk of a document may be short: its state is made of its own tokens, at the right edge of a chunk
    _, end = matrices.inside(stream[index.ends].permute(2, 0, 1))
    end = end.transpose(0, 1) + a ** index.counts[:, None, None] * starts[index.last]
    return y[None], state.index_copy(0, index.filled, end)


def _batch(
    x: Tensor, matrices: "_Matrices", a: Tensor, state: Tensor, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows of one length."""
    (B, T, _), chunk = x.shape, matrices.write.shape[1]
    n, rest = -(-T // chunk), T % chunk or chunk
    padded = F.pad(x, (0, 0, 0, n * chunk - T)) if n * chunk > T else x
    chunks = padded.unflatten(1, (n, chunk)).permute(3, 0, 1, 2).flatten(1, 2)  # (D, B n, C)
    inside, written = matrices.inside(chunks)
    starts, last = _between(matrices, written, state, None, backend)  # (B n, D, N), (B, D, N)
    y = matrices.shown(inside, starts).unflatten(1, (B, n)).permute(1, 2, 3, 0).flatten(1, 2)[:, :T]
    if rest < chunk:
        _, end = matrices.inside(F.pad(x[:, T - rest :], (0, 0, chunk - rest, 0)).permute(2, 0, 1))
        last = end.transpose(0, 1) + a**rest * starts.unflatten(0, (B, n))[:, -1]
    return y, last


def _between(
    matrices: "_Matrices", written: Tensor, state: Tensor, bounds: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The states before all chunks, (G, D, N), and those behind the last ones.

    Args:
        written: (D, G, N), what each chunk adds to a state.
        state: (n, D, N), before the first chunk of every document.
        bounds: (n + 1,) the first chunk of every document; None for n documents of as many chunks.
    """
    rows = written.transpose(0, 1)  # (G, D, N)
    steps = rows[None] if bounds is not None else rows.unflatten(0, (len(state), -1))
    with shard.unsharded():  # what crosses the edges is in `state`
        h, last = affine_scan(matrices.whole[None, None], steps, state, cu_seqlens=bounds, backend=backend)
    before = torch.cat([state.unsqueeze(1) if bounds is None else state[None, :1], h[:, :-1]], dim=1)
    if bounds is not None:
        before = before.index_copy(1, bounds[:-1], state[None])
    return before.flatten(0, 1), last


class _Matrices(NamedTuple):
    """What a chunk of C tokens does, for all chunks of a channel alike.

    write: (D, C, C + N), tokens to outputs and to the state after them; show: (D, N, C), a state to outputs;
    whole: (D, N), what is left of a state after C tokens.
    """

    write: Tensor
    show: Tensor
    whole: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, c: Tensor, size: int) -> "_Matrices":
        """From a, b, c (D, N)."""
        steps = torch.arange(size + 1, device=a.device)
        powers = a.unsqueeze(-1) ** steps  # (D, N, C + 1)
        kernel = torch.einsum("dn,dnl->dl", b * c, powers[..., :-1])  # (D, C)
        lag = steps[None, :-1] - steps[:-1, None]  # (C, C), from token j to output i
        toeplitz = F.pad(kernel, (0, 1))[:, torch.where(lag < 0, size, lag)]  # (D, C, C)
        adds = (b.unsqueeze(-1) * powers[..., :-1]).flip(-1).mT  # (D, C, N)
        return cls(torch.cat([toeplitz, adds], dim=-1), c.unsqueeze(-1) * powers[..., 1:], powers[..., -1])

    def inside(self, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (D, G, C) and increments of the state (D, G, N) of chunks (D, G, C), from a state of zeros."""
        size = self.write.shape[1]
        made = torch.bmm(chunks, self.write)
        return made[..., :size], made[..., size:]

    def shown(self, inside: Tensor, starts: Tensor) -> Tensor:
        """Outputs (D, G, C) with what the states before the chunks (G, D, N) show."""
        return torch.baddbmm(inside, starts.transpose(0, 1), self.show)

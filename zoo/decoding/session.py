"""A decoding session: rows of text, their state, and the way back from what was only proposed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from zoo.decoding.causal import refuse_unless_causal
from zoo.decoding.compiled import CompiledStep, Step, step
from zoo.errors import UserError
from zoo.files import write_atomically
from zoo.layers import SequenceModel
from zoo.layers.kv_cache import trimmed, values
from zoo.layers.state import Prefixes, State, flatten, reserve, select, state_bytes, unflatten

__all__ = ["Session"]

FORMAT, VERSION = "zoo-state", 1
AHEAD = 32  # tokens of room beyond the next: half of what the slots of a cache are counted in


class _Proposal(NamedTuple):
    windows: list[list[int]]
    prefixes: Prefixes | None  # None: no row has a token


class Session:
    """Rows of text that a model reads and a decoder continues; the only part of decoding that changes in place.

    The state holds the rows' `tokens`. A token that was drawn from the logits is not among them yet: it is the first of
    the row's next window. `draw` notes it as `newest`, so that `text` and a saved file have it.

    Args:
        model: causal, in eval mode, on one device.
        compile: single tokens run through torch.compile; see `zoo.decoding.generate_batch`.

    Attributes:
        tokens: what the state of each row holds, its prompt included.
        newest: the token of each row that was drawn and not run yet, or None.
        forwards: calls of the model so far.

    Raises:
        UserError: the model is not causal.
    """

    def __init__(self, model: SequenceModel, *, compile: bool = False):
        refuse_unless_causal(model)
        self.model = model
        self.tokens: list[list[int]] = []
        self.newest: list[int | None] = []
        self.forwards = 0
        self._device = next(model.parameters()).device
        self._state: State = None
        self._room = 0  # tokens a row that caches have slots for
        self._open: _Proposal | None = None
        self._advance: Step = CompiledStep() if compile else step

    @property
    def state(self) -> State:
        """The state of all rows, as a value: nothing that the session does later changes it."""
        return None if self._state is None else values(self._state)

    @property
    def proposing(self) -> bool:
        """A proposal is open: `commit` or `rollback` comes next."""
        return self._open is not None

    def text(self, row: int) -> list[int]:
        """The tokens of a row, with the newest."""
        newest = self.newest[row]
        return [*self.tokens[row], *([] if newest is None else [newest])]

    def draw(self, tokens: Sequence[int | None]) -> None:
        """Note the token that each row goes on with; None leaves a row as it is."""
        self._check_rows("newest tokens", tokens)
        self.newest = [old if new is None else new for new, old in zip(tokens, self.newest, strict=True)]

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, one a row; the logits (B, vocab) behind each.

        Raises:
            ValueError: no prompt, an empty one, a token outside the vocabulary, or the session has rows already.
        """
        if self.tokens:
            raise ValueError(f"begin is for a session without rows, and this one has {len(self.tokens)}; use extend")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt must have at least one token; got an empty one")
        rows = self._checked(prompts)
        tokens, mask = self._padded(rows)
        hidden, self._state = self._encode(tokens, None, mask)
        self.forwards += 1
        self.tokens, self.newest = rows, [None] * len(rows)
        last = mask.sum(dim=1) - 1
        return self.model.head(hidden[torch.arange(len(rows), device=last.device), last][:, None])[:, 0]

    @torch.inference_mode()
    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read some tokens more in each row, none in some; the logits behind each of them, (B, most, vocab).

        Logits where a row has no token mean nothing.
        """
        windows = self._windows(tokens)
        most = max(map(len, windows))
        if not most:
            return self._nothing()
        self._reserve(most)
        logits = self._one_token(windows) if most == 1 else None
        if logits is None:
            padded, mask = self._padded(windows)
            hidden, self._state = self._encode(padded, self._state, mask)
            logits = self.model.head(hidden)
            self.forwards += 1
        self._append(windows, [len(window) for window in windows])
        return logits

    @torch.inference_mode()
    def propose(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """As `extend`, and nothing is decided: `commit` keeps the first tokens of each window, `rollback` none."""
        checked = self._windows(windows)
        if not any(checked):
            self._open = _Proposal(checked, None)
            return self._nothing()
        padded, mask = self._padded(checked)
        self._reserve(padded.shape[1])
        hidden, prefixes = self.model.look_ahead(padded, mask, self._state)
        self.forwards += 1
        self._open = _Proposal(checked, prefixes)
        return self.model.head(hidden)

    @torch.inference_mode()
    def commit(self, n: Sequence[int] | Tensor) -> None:
        """Keep the first n[b] tokens of each row's window; the others leave no trace.

        Raises:
            ValueError: nothing is proposed, or n is not one number a row, from 0 to the window's length.
        """
        if self._open is None:
            raise ValueError("commit keeps tokens of a proposal, and none is open; propose comes first")
        windows, prefixes = self._open
        kept = [int(m) for m in n]
        self._check_rows("counts", kept)
        if any(not 0 <= m <= len(window) for m, window in zip(kept, windows, strict=True)):
            raise ValueError(f"commit takes 0 to {[len(w) for w in windows]} tokens of the windows; got {kept}")
        self._open = None
        if prefixes is not None:
            self._state = prefixes.at(torch.tensor(kept, device=prefixes.lengths.device))
        self._append(windows, kept)

    def rollback(self) -> None:
        """Drop the proposal: everything is as before it."""
        self.commit([0] * len(self.tokens))

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be named several times."""
        self._refuse_open("select")
        if any(not 0 <= row < len(self.tokens) for row in rows):
            raise ValueError(f"rows are 0 to {len(self.tokens) - 1}; got {list(rows)}")
        self._state = select(self._state, torch.tensor(list(rows), dtype=torch.long, device=self._device))
        self.tokens = [list(self.tokens[row]) for row in rows]
        self.newest = [self.newest[row] for row in rows]

    def fork(self, row: int, k: int) -> list[int]:
        """Add k copies of a row behind the others; their numbers."""
        before = len(self.tokens)
        self.select([*range(before), *[row] * k])
        return list(range(before, before + k))

    def nbytes(self) -> int:
        """Bytes of the state, and of what an open proposal holds beside it."""
        held = 0 if self._open is None or self._open.prefixes is None else self._open.prefixes.nbytes()
        return held + (0 if self._state is None else state_bytes(self._state))

    def save(self, path: Path) -> None:
        """Write text and state to a file of safetensors; `load` goes on from it.

        Raises:
            UserError: the session has no rows, or the file cannot be written.
        """
        self._refuse_open("save")
        if not self.tokens:
            raise UserError("a session is saved after it has read a prompt; this one has no rows, begin it first")
        tensors = {name: x.cpu().contiguous() for name, x in flatten(trimmed(self._state)).items()}
        metadata = {
            "format": FORMAT, "version": str(VERSION), "model": _name(self.model),
            "fingerprint": fingerprint(self.model),
            "tokens": json.dumps(self.tokens), "newest": json.dumps(self.newest),
        }  # fmt: skip
        try:
            write_atomically(Path(path), lambda file: file.write(to_bytes(tensors, metadata)))
        except OSError as error:
            raise UserError(f"no state could be written to {path} ({error.strerror}); choose another file") from error

    @classmethod
    def load(cls, path: Path, model: SequenceModel, *, compile: bool = False) -> Self:
        """The session that `save` wrote, for the same model.

        Raises:
            UserError: no such file, another format, or a state that other weights made.
        """
        session = cls(model, compile=compile)
        try:
            with safe_open(path, framework="pt", device=str(session._device)) as file:
                metadata = file.metadata() or {}
                session._check_file(path, metadata)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"no state can be read from {path} ({reason}); give a file of --save-state") from error
        session.tokens, session.newest = json.loads(metadata["tokens"]), json.loads(metadata["newest"])
        like = model.init_state(len(session.tokens))
        if set(flatten(like)) != set(tensors):
            raise UserError(f"{path} is damaged: it has not the tensors of a {_name(model)}; prefill again")
        session._state = unflatten(like, tensors)
        return session

    def _check_file(self, path: Path, metadata: dict[str, str]) -> None:
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise UserError(f"{path} holds no state of a session; give a file of --save-state")
        own = fingerprint(self.model)
        if metadata["fingerprint"] != own:
            raise UserError(
                f"this state was made by other weights ({metadata['model']} {metadata['fingerprint'][:8]}, yours "
                f"{_name(self.model)} {own[:8]}); prefill again"
            )

    def _encode(self, tokens: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
        """A model is told of padding only where there is some."""
        if bool(mask.all()):
            return self.model.encode(tokens, state)
        return self.model.encode(tokens, state, mask=mask)

    def _reserve(self, more: int) -> None:
        """Room for `more` tokens in the longest row; layers are asked once in AHEAD tokens, for asking takes time."""
        need = max(map(len, self.tokens)) + more
        if need > self._room:
            self._room = need + AHEAD
            self._state = reserve(self.model, self._state, self._room)

    def _one_token(self, windows: list[list[int]]) -> Tensor | None:
        """One token a row, none in some: those run with any token, and keep their state. None where states grow."""
        token = torch.tensor([window or [0] for window in windows], device=self._device)
        logits, after = self._advance(self.model, token, self._state)
        self.forwards += 1
        if all(windows):
            self._state = after
            return logits[:, None]
        merged = _merged(torch.tensor([bool(window) for window in windows], device=self._device), after, self._state)
        if merged is None:
            self.forwards -= 1
            return None
        self._state = merged
        return logits[:, None]

    def _append(self, windows: list[list[int]], kept: list[int]) -> None:
        for row, (window, n) in enumerate(zip(windows, kept, strict=True)):
            self.tokens[row].extend(window[:n])
            if n:
                self.newest[row] = None

    def _windows(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """The windows of all rows, checked: a drawn token comes first."""
        self._refuse_open("another window")
        self._check_rows("windows", tokens)
        if not self.tokens:
            raise ValueError("a session has rows after begin; call it first")
        rows = self._checked(tokens)
        for row, (window, newest) in enumerate(zip(rows, self.newest, strict=True)):
            if window and newest is not None and window[0] != newest:
                raise ValueError(
                    f"a window begins with the token that was drawn before it; row {row} has {window[0]} for {newest}"
                )
        return rows

    def _checked(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        vocab = self.model.config.vocab_size
        rows = [list(row) for row in tokens]
        for token in {token for row in rows for token in row}:
            if not 0 <= token < vocab:
                raise ValueError(f"tokens must be in [0, {vocab}), the model's vocabulary; got {token}")
        return rows

    def _check_rows(self, what: str, given: Sequence[Any]) -> None:
        if len(given) != len(self.tokens):
            raise ValueError(f"{what} are given for every row, {len(self.tokens)}; got {len(given)}")

    def _refuse_open(self, what: str) -> None:
        if self._open is not None:
            rows = ", ".join(str(row) for row, window in enumerate(self._open.windows) if window)
            raise ValueError(f"{what}: a proposal is still open (rows {rows}); commit or roll it back first")

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Tokens (B, most), zeros behind a row's own, and which are tokens."""
        most = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (most - len(row)) for row in rows], device=self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        return tokens, torch.arange(most, device=self._device) < lengths[:, None]

    def _nothing(self) -> Tensor:
        return next(self.model.parameters()).new_zeros(len(self.tokens), 0, self.model.config.vocab_size)


def fingerprint(model: nn.Module) -> str:
    """A number of a model: its configuration, dtypes and weights, as sha256 in hexadecimal."""
    config: Any = model.config
    said = asdict(config) if is_dataclass(config) and not isinstance(config, type) else repr(config)
    digest = hashlib.sha256(json.dumps([_name(model), said], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _name(model: nn.Module) -> str:
    return str(getattr(model, "name", type(model).__name__))


def _merged(alive: Tensor, after: State, before: State) -> State | None:
    """The state after a step for rows that are alive, before it for the others; None where shapes differ."""
    if isinstance(after, Tensor):
        if after.shape != before.shape:
            return None
        if after.data_ptr() == before.data_ptr():  # a cache that was written behind every row's length
            return after
        return torch.where(alive.view(-1, *[1] * (after.ndim - 1)), after, before)
    parts = [_merged(alive, a, b) for a, b in zip(after, before, strict=True)]
    if any(part is None for part in parts):
        return None
    return type(after)(*parts) if hasattr(after, "_fields") else tuple(parts)

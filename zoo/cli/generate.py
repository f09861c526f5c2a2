"""`zoo generate`: text as it is sampled."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from zoo import checkpoint, decoding, tokenizers
from zoo.config import read_run
from zoo.errors import UsageError, UserError
from zoo.layers import SequenceModel
from zoo.registry import model_info


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; see `zoo.decoding.generate`."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, got {self.max_tokens}")
        if not self.temperature >= 0:
            raise UsageError(f"--temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"--top-k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, got {self.top_p}")


class StopText:
    """Lets text through up to the first of some stop texts, holding back what may yet become one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.reached = False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        text = self.held + text
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.held, self.reached = "", True
            return text[: min(ends)]
        longest = max(map(len, self.stops), default=1)
        keep = next((n for n in range(min(longest - 1, len(text)), 0, -1) if self._may_become(text[-n:])), 0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back when no more text comes."""
        held, self.held = self.held, ""
        return held

    def _may_become(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stops)


def generate_command(path: str, prompt: str, sampling: Sampling, *, stop: Sequence[str], compile: bool = False) -> int:
    """Print the continuation of a prompt piece by piece."""
    found = checkpoint.locate(path)
    model = checkpoint.load(found)
    refuse_unless_text(str(model.name))
    decoding.refuse_unless_causal(model)
    tokenizer = _tokenizer(found)
    size = cast(SequenceModel, model).config.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} symbols and the model only {size}; "
            "they belong to different runs"
        )
    ids = [tokenizer.start_id, *tokenizer.encode(prompt)]
    pieces, text = tokenizer.stream(), StopText(stop)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    stops = (tokenizer.eos_id,)
    drawn = decoding.generate(cast(SequenceModel, model), ids, **asdict(sampling), stop_ids=stops, compile=compile)
    if compile:
        print("compiling behind the second token, up to a minute the first time", file=sys.stderr)
    for token in drawn:
        _show(text.push(pieces.push(token)))
        if text.reached:
            break
    else:
        _show(text.push(pieces.finish()) + text.finish())
    _show("\n")
    return 0


def refuse_unless_text(name: str) -> None:
    """Refuse a model that was not registered as one that text can be drawn from.

    Raises:
        UserError: it makes something else, or has no decoder.
    """
    info = model_info(name)
    if info.produces != "text":
        raise UserError(
            f"zoo generate continues text, and {name} makes {info.produces}; zoo eval measures it, and zoo train shows "
            "what it makes in the run's folder"
        )
    if info.decoder is None:
        raise UserError(f"zoo generate draws by a model's decoder, and {name} has none; zoo eval measures it")


def _show(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _tokenizer(found: Path) -> tokenizers.Tokenizer:
    """A checkpoint folder holds its tokenizer; a trainer's .ckpt lies in a run that says which data made it."""
    if found.suffix != ".ckpt":
        return tokenizers.load(found)
    run = checkpoint.run_of(found)
    if run is None:
        raise UserError(f"{found} lies in no run's folder, so its tokenizer is unknown; give the folder of a run")
    from zoo.train.run.instantiate import instantiate

    data = instantiate("data", read_run(run / "config.yaml")["data"])
    if getattr(data, "tokenizer", None) is None:
        raise UserError(f"the run {run} was trained on data without text, so it cannot continue a prompt; see zoo eval")
    tokenizer: tokenizers.Tokenizer = data.tokenizer
    return tokenizer

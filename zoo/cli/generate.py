"""`zoo generate`: text as it is decoded."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from zoo import checkpoint, decoding, tokenizers
from zoo.codecs import TextCodec
from zoo.config import compose_decoder, read_run
from zoo.decoding.decoder import DECODERS, why_not
from zoo.errors import UsageError, UserError
from zoo.layers import SequenceModel
from zoo.registry import model_info
from zoo.targets import TARGET, load_class


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What `zoo generate` is asked for, beside the model and the prompt.

    settings: decoder=NAME and decoder.KEY=VALUE.
    flags: {field of the decoder: value} of the flags that are short for them, None where one is not given.
    stop: texts to end before.
    out: where the text goes, standard output when None.
    stats: report forwards at the end.
    save_state, load_state: files of a session, to go on from and to go on with later.
    """

    settings: Sequence[str] = ()
    flags: Mapping[str, Any]
    stop: Sequence[str] = ()
    out: Path | None = None
    stats: bool = False
    save_state: Path | None = None
    load_state: Path | None = None

    def decoder(self, usual: str | None = None) -> decoding.Decoder:
        """The decoder that settings and flags choose; `usual`, the model's own, where no decoder=NAME is given.

        Raises:
            UsageError: unknown words, values out of range, or a flag and a setting that say the same.
        """
        given = {f"decoder.{name}": value for name, value in self.flags.items() if value is not None}
        for setting in self.settings:
            key = setting.partition("=")[0]
            if key in given:
                flag = "--" + key.removeprefix("decoder.").replace("_", "-")
                raise UsageError(f"{flag} and {key}= are the same setting; give one of them")
        words = [f"{key}={str(value).lower()}" for key, value in given.items()]
        if usual is not None and not any(setting.startswith("decoder=") for setting in self.settings):
            words.insert(0, f"decoder={usual}")
        filled = compose_decoder([*words, *self.settings])
        kind = cast("type[decoding.Decoder]", load_class("decoder", filled.pop(TARGET)))
        return kind(**filled)


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


def generate_command(path: str, prompt: str, request: GenerateRequest) -> int:
    """Print the continuation of a prompt piece by piece, or write it to a file."""
    source = checkpoint.locate(path)
    model = cast(SequenceModel, checkpoint.load(source))
    refuse_unless_text(str(model.name))
    decoder = request.decoder(model_info(str(model.name)).decoder)
    tokenizer = _tokenizer(source)
    size = model.config.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} symbols and the model only {size}; "
            "they belong to different runs"
        )
    decoder.refuse(model)
    session = None if request.load_state is None else decoding.Session.load(request.load_state, model)
    ids = [*([] if session else [tokenizer.start_id]), *(tokenizer.encode(prompt) if prompt or not session else [])]
    given = decoding.Prompt([ids], stop_ids=(tokenizer.eos_id,), session=session)
    if request.flags.get("compile"):
        print("compiling behind the second token, up to a minute the first time", file=sys.stderr)
    pieces, sums = decoding.decode(decoder, model, given, TextCodec(tokenizer)), Counter[str]()
    if request.out is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        _write_text(sys.stdout, pieces, tokenizer, StopText(request.stop), sums)
    else:
        try:
            with request.out.open("w", encoding="utf-8", errors="replace") as file:
                _write_text(file, pieces, tokenizer, StopText(request.stop), sums)
        except OSError as error:
            raise UserError(f"--out {request.out} cannot be written ({error.strerror}); choose another file") from error
    if request.save_state is not None and given.session is not None:
        given.session.save(request.save_state)
    if request.stats:
        print(statistics(sums), file=sys.stderr)
    return 0


def _write_text(
    to: TextIO, pieces: Iterator[decoding.Piece], tokenizer: tokenizers.Tokenizer, text: StopText, sums: "Counter[str]"
) -> None:
    stream = tokenizer.stream()
    for piece in pieces:
        (row,) = piece.tokens
        sums.update({"tokens": len(row), **piece.info})
        _show(to, text.push("".join(map(stream.push, row))))
        if text.reached:
            break
    else:
        _show(to, text.push(stream.finish()) + text.finish())
    _show(to, "\n")


def statistics(sums: Mapping[str, float]) -> str:
    """What --stats prints: tokens and forwards, and how the drafts fared where there were any."""
    tokens, forwards = int(sums["tokens"]), int(sums["forwards"])
    line = f"{tokens} tokens in {forwards} forwards, {tokens - forwards} saved"
    if proposed := int(sums.get("proposed", 0)):
        accepted = int(sums["accepted"])
        line += f"; {accepted} of {proposed} drafted tokens accepted ({accepted / proposed:.0%})"
    return line


def decoders_command(path: str) -> int:
    """Print the decoders; with a run or checkpoint, which ones its model can use, and why not the others."""
    model = checkpoint.load(checkpoint.locate(path)) if path else None
    width = max(map(len, DECODERS))
    for name, kind in sorted(DECODERS.items()):
        line = (kind.__doc__ or "").strip().splitlines()[0]
        reason = None if model is None else why_not(kind, model)
        print(f"{name:<{width}}  {line if reason is None else f'no: {reason}'}")
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


def _show(to: TextIO, text: str) -> None:
    if text:
        to.write(text)
        to.flush()


def _tokenizer(source: Path) -> tokenizers.Tokenizer:
    """A checkpoint folder holds its tokenizer; a trainer's .ckpt lies in a run that says which data made it."""
    if source.suffix != ".ckpt":
        return tokenizers.load(source)
    run = checkpoint.run_of(source)
    if run is None:
        raise UserError(f"{source} lies in no run's folder, so its tokenizer is unknown; give the folder of a run")
    from zoo.train.run.instantiate import instantiate

    data = instantiate("data", read_run(run / "config.yaml")["data"])
    if getattr(data, "tokenizer", None) is None:
        raise UserError(f"the run {run} was trained on data without text, so it cannot continue a prompt; see zoo eval")
    tokenizer: tokenizers.Tokenizer = data.tokenizer
    return tokenizer

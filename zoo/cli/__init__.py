"""The command line: one verb per job. Everything heavy is imported inside the verb that needs it.

Exit codes: 0 done, 1 failed, 2 the words of the command are off, 130 interrupted.
"""

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import zoo
from zoo._deprecation import RenamedWarning
from zoo.cli.imports import collector_paused
from zoo.cli.threads import limit_spinning
from zoo.errors import UsageError, UserError, remedy

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
Settings are key=value (Hydra's grammar): model=gla model.size=tiny optim.lr=1e-3 run_dir=runs/first.
ZOO_TRACEBACK=1 shows where an error came from."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End the command by a UsageError that names the mistake and where the help is."""
        raise UsageError(f"{message}; {self.prog} --help shows how")


@dataclass(frozen=True)
class Verb:
    """One verb: a line for `zoo --help`, its arguments, and what it does (returning the exit code)."""

    line: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def _settings(parser: Parser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="Hydra overrides; zoo config lists the keys")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with further YAML files by group")


def _list_arguments(parser: Parser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="a shell pattern such as '*delta*'")
    parser.add_argument("--tag", action="append", default=[], help="only models with this tag; may be repeated")
    parser.add_argument("--max-params", metavar="N", help="only models whose smallest size has at most N: 200M, 1.3B")
    parser.add_argument("--json", action="store_true", help="all that is known, as JSON")
    parser.add_argument(
        "--decoders", nargs="?", const="", metavar="RUN|CKPT", help="ways to continue text; which ones a model can use"
    )


def _list(args: argparse.Namespace) -> int:
    if args.decoders is not None:
        from zoo.cli.generate import decoders_command

        return decoders_command(args.decoders)
    from zoo.cli.models import list_command

    return list_command(args.pattern, args.tag, args.max_params, as_json=args.json)


def _show_arguments(parser: Parser) -> None:
    parser.add_argument("name", help="a model of zoo list")
    parser.add_argument("settings", nargs="*", metavar="field=value", help="size=NAME and any field of the config")


def _show(args: argparse.Namespace) -> int:
    with collector_paused():  # half of it is imported while the model is built
        from zoo.cli.show import show_command

        return show_command(args.name, args.settings)


def _train_arguments(parser: Parser) -> None:
    _settings(parser)
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of key=a,b values")
    parser.add_argument("--metric", help="with -m: the column of metrics.csv to sort by")


def _train(args: argparse.Namespace) -> int:
    if args.multirun:
        from zoo.cli.sweep import sweep_command

        return sweep_command(args.settings, args.config_dir, args.metric)
    if args.metric is not None:
        raise UsageError("--metric sorts the table of a sweep; add -m")
    spins_long = limit_spinning()
    from zoo.cli.runs import train_command

    return train_command(args.settings, args.config_dir, spins_long=spins_long)


def _resume_arguments(parser: Parser) -> None:
    parser.add_argument("run", type=Path, help="the folder of an interrupted run")
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)  # refused, with a reason


def _resume(args: argparse.Namespace) -> int:
    if args.settings:
        raise UsageError(
            f"a run goes on with the settings in its config.yaml, and {' '.join(args.settings)} was given; leave it "
            f"out, or start a new run from these weights: zoo train init_from={args.run}"
        )
    spins_long = limit_spinning()
    from zoo.cli.runs import resume_command

    return resume_command(args.run, spins_long=spins_long)


def _eval_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="RUN|CKPT", help="a run's folder, or a checkpoint")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for example data=text_files data.path=FILE")


def _eval(args: argparse.Namespace) -> int:
    limit_spinning()
    from zoo.cli.runs import eval_command

    return eval_command(args.path, args.settings)


def _generate_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="RUN|CKPT", help="a run's folder, or a checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue; - reads standard input")
    parser.add_argument(
        "settings", nargs="*", metavar="decoder=NAME|decoder.KEY=VALUE", help="how the text is continued"
    )
    short = "short for decoder."
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"{short}max_tokens=N")
    parser.add_argument("--temperature", type=float, metavar="X", help=f"{short}temperature=X; 0: the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="N", help=f"{short}top_k=N, only the N likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help=f"{short}top_p=P, the likeliest tokens that sum to P")
    parser.add_argument("--seed", type=int, metavar="N", help=f"{short}seed=N, the same text again for the same seed")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--compile", action="store_true", default=None, help=f"{short}compile=true, after up to a minute of compiling"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the text there, not to standard output")
    parser.add_argument("--stats", action="store_true", help="say at the end how many forwards it took")
    parser.add_argument("--save-state", type=Path, metavar="FILE", help="keep text and state, to go on from them later")
    parser.add_argument("--load-state", type=Path, metavar="FILE", help="go on from such a file; the prompt is added")


def _generate(args: argparse.Namespace) -> int:
    limit_spinning()
    from zoo.cli.generate import GenerateRequest, generate_command

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    flags = ("max_tokens", "temperature", "top_k", "top_p", "seed", "compile")
    request = GenerateRequest(
        settings=args.settings,
        flags={name: getattr(args, name) for name in flags},
        stop=args.stop,
        out=args.out,
        stats=args.stats,
        save_state=args.save_state,
        load_state=args.load_state,
    )
    return generate_command(args.path, prompt, request)


def _convert_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder of another library, or owner/name on the hub")
    parser.add_argument("folder", metavar="DST", type=Path, help="the checkpoint to write")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16, float16 or float64; as stored when omitted")


def _convert(args: argparse.Namespace) -> int:
    from zoo.cli.convert import convert_command

    return convert_command(args.source, args.folder, args.dtype)


def _export_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="RUN|CKPT", help="a run's folder, or a checkpoint")
    parser.add_argument("folder", metavar="DST", type=Path, help="the folder to write")
    parser.add_argument("--to", required=True, choices=("hf", "onnx"), help="hf: transformers, flash-linear-attention")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16, float16 or float64; as stored when omitted")


def _export(args: argparse.Namespace) -> int:
    if args.to == "onnx":
        raise UsageError("--to onnx does not exist yet; --to hf writes a folder that other libraries load")
    from zoo.cli.convert import export_command

    return export_command(args.path, args.folder, args.dtype)


def _config_arguments(parser: Parser) -> None:
    _settings(parser)
    parser.add_argument("--groups", action="store_true", help="list what can be chosen instead")


def _config(args: argparse.Namespace) -> int:
    if args.groups:
        from zoo.cli.models import groups_command

        if args.settings:
            raise UsageError("--groups lists the choices and takes no settings")
        return groups_command(args.config_dir)
    from zoo.cli.runs import config_command

    return config_command(args.settings, args.config_dir)


def _bench_arguments(parser: Parser) -> None:
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="op=NAME or op=all with sizes (T=2048,16384), shapes=cpu|fla, dtype=, backends=, device=, seed=; or "
        "model=NAME with any setting of zoo train, steps=; both: repeats=, out=FILE.json or out=FOLDER; or "
        "report=FILE ... to print tables of results",
    )
    parser.add_argument("--base", metavar="REV", help="compare with this commit of zoo's repository, in turns")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with further YAML files by group")


def _bench(args: argparse.Namespace) -> int:
    limit_spinning()
    _silence_profiler()
    from zoo.cli.bench import bench_command

    return bench_command(args.settings, args.base, args.config_dir)


def _profile(args: argparse.Namespace) -> int:
    limit_spinning()
    _silence_profiler()
    from zoo.cli.bench import profile_command

    return profile_command(args.settings, args.config_dir)


def _silence_profiler() -> None:
    """Keep the notes that torch's profiler writes from C++ off the terminal; to be said before torch is loaded."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _silence_libraries() -> None:
    """Keep what datasets and the hub's client log off the terminal: what matters of it is in our own sentence.

    They read these variables when they are imported, and so do the processes that a run starts.
    """
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _doctor_arguments(parser: Parser) -> None:
    parser.add_argument("--device", help="check operators there only: cpu, cuda, cuda:1")


def _doctor(args: argparse.Namespace) -> int:
    from zoo.cli.doctor import doctor_command

    return doctor_command(args.device)


def _completion_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def _completion(args: argparse.Namespace) -> int:
    from zoo.cli.completion import completion_command

    return completion_command(args.shell)


VERBS = {
    "list": Verb("models and their sizes", _list_arguments, _list),
    "show": Verb("one model: config, parameters, FLOPs per token, state bytes", _show_arguments, _show),
    "train": Verb("train a model: zoo train model=deltanet (-m: a sweep)", _train_arguments, _train),
    "resume": Verb("continue an interrupted run as if it had not stopped", _resume_arguments, _resume),
    "eval": Verb("measure a trained model on data", _eval_arguments, _eval),
    "generate": Verb("continue a text, printed as it is sampled", _generate_arguments, _generate),
    "convert": Verb("another library's checkpoint as one of zoo: zoo convert SRC DST", _convert_arguments, _convert),
    "export": Verb("a checkpoint for another library: zoo export CKPT --to hf DST", _export_arguments, _export),
    "bench": Verb("speed of an operator or a model, proved right in the same run", _bench_arguments, _bench),
    "profile": Verb("where a training step's time and memory go: zoo profile model=gla", _settings, _profile),
    "config": Verb("print the settings that a command would use", _config_arguments, _config),
    "doctor": Verb("versions, devices, and operators checked on this machine", _doctor_arguments, _doctor),
    "completion": Verb("a completion script for bash, zsh or fish", _completion_arguments, _completion),
}


def usage() -> str:
    """The text of `zoo --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.line}" for name, verb in VERBS.items())
    return f"usage: zoo VERB [...]; zoo VERB --help explains one\n\n{verbs}\n\n{EPILOG}\n"


def parse(arguments: Sequence[str]) -> tuple[Verb, argparse.Namespace]:
    """The verb and its arguments.

    Raises:
        UsageError: the words do not make a command.
    """
    name, *rest = arguments
    if name not in VERBS:
        what = "option" if name.startswith("-") else "verb"
        raise UsageError(
            f"no {what} {name!r}{remedy(name, [*VERBS, '--help', '--version'], 'zoo --help lists the verbs')}"
        )
    verb = VERBS[name]
    parser = Parser(prog=f"zoo {name}", description=verb.line, allow_abbrev=False)
    verb.arguments(parser)
    options = [option for action in parser._actions for option in action.option_strings]
    takes_settings = any(action.dest == "settings" for action in parser._actions)
    for word, following in itertools.pairwise([*rest, ""]):
        option, equals, value = word.partition("=")
        if word.startswith("--") and len(word) > 2 and option not in options:
            value = value if equals or following.startswith("-") or "=" in following else following
            if takes_settings and value and not get_close_matches(option, options, cutoff=0.8):
                raise UsageError(f"zoo {name} takes settings without dashes; write {option[2:]}={value}, not {option}")
            raise UsageError(
                f"zoo {name} has no option {option!r}{remedy(option, options, f'zoo {name} --help lists them')}"
            )
    return verb, parser.parse_intermixed_args(rest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see the module for the exit codes."""
    warnings.simplefilter("default", RenamedWarning)  # Python hides deprecations outside of scripts
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough: zoo list | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None or os.environ.get("ZOO_TRACEBACK") == "1":
            raise
        print(f"zoo: {sentence}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED


def _run(words: list[str]) -> int:
    if not words:
        print(usage(), end="", file=sys.stderr)
        return USAGE
    if words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return DONE
    if words[0] == "--version":
        print(f"zoo {zoo.__version__}")
        return DONE
    try:
        verb, args = parse(words)
    except SystemExit as end:  # argparse, after printing --help
        return int(end.code or DONE)
    _silence_libraries()
    return verb.run(args)


def _sentence(error: Exception) -> str | None:
    """The one sentence for an error that a user can cause; None for a bug, whose traceback is the message."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, UserError):
        return text
    if type(error).__name__ == "OutOfMemoryError":  # torch's, for any device; torch may not be imported here
        return f"the device is out of memory ({text}); lower data.batch_size or the model's size"
    # Lightning's MisconfigurationException: a device that is not there, options that exclude each other.
    if isinstance(error, ValueError | OSError) or type(error).__name__ == "MisconfigurationException":
        return f"{text or type(error).__name__} (ZOO_TRACEBACK=1 shows where)"
    return None

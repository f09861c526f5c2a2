"""Who counts: one layer of each mixer trained on parity (or words of a group) and tested at greater lengths.

Every row is `zoo train experiment=EXPERIMENT model=...` and, for each length, `zoo eval RUN data=DATA data.seq_len=T
data.labels=last`: the accuracy of the last position. Rows are printed as they are finished.

    python benchmarks/state_tracking.py [--experiment parity] [--seeds 0 1] [--lengths 32 100 500] [--runs FOLDER]
        [--models "deltanet" "deltanet model.allow_neg_eigval=true" ...]
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = (
    "para_gru model.recurrent_clip=null",
    "para_gru",
    "para_lstm model.recurrent_clip=null",
    "para_lstm",
    "lstm",
    "gru",
    "slstm",
    "mamba",
    "gla",
    "deltanet",
    "deltanet model.allow_neg_eigval=true",
    "transformer",
)
DATA = {"parity": "parity", "s5": "word_problem"}


def zoo(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "zoo", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"zoo {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def number(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.MULTILINE)
    return str(found[-1]) if found else "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=DATA, default="parity")
    parser.add_argument("--models", nargs="+", default=MODELS, help="a name and overrides each, in one word")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 100, 500])
    parser.add_argument("--runs", type=Path, help="where runs are kept; a temporary folder when left out")
    args = parser.parse_args()
    folder = args.runs or Path(tempfile.mkdtemp())
    lengths = " | ".join(f"T = {T}" for T in args.lengths)
    print(f"| `zoo train experiment={args.experiment} model=` | seed | {lengths} | parameters | seconds |")
    print("|---|---" + "|---" * len(args.lengths) + "|---|---|", flush=True)
    for seed in args.seeds:
        for i, words in enumerate(args.models):
            run = folder / f"{i}-{words.split()[0]}-{seed}"
            begin = time.monotonic()
            log = zoo(
                "train", f"experiment={args.experiment}", f"model={words.split()[0]}", *words.split()[1:],
                f"seed={seed}", f"run_dir={run}",
            )  # fmt: skip
            seconds = time.monotonic() - begin
            accuracies = [
                number(
                    r"^accuracy (\S+)",
                    zoo("eval", str(run), f"data={DATA[args.experiment]}", f"data.seq_len={T}", "data.labels=last"),
                )
                for T in args.lengths
            ]
            parameters = number(r"\(([\d,]+) parameters\)", log)
            shown = " | ".join(f"{float(x):.3f}" for x in accuracies)
            print(f"| {words} | {seed} | {shown} | {parameters} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

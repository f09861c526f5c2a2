"""Who counts: one layer of each mixer trained on parity (or words of a group) and tested at greater lengths.

Every row is `zoo train experiment=EXPERIMENT model=... data.val_lengths=[...]` and shows the accuracy of the last
position at each length, as `zoo eval RUN data=DATA data.seq_len=T data.labels=last` gives it, too. Rows are printed,
and added to the file of --table, as they are finished. Seconds are those of training alone.

    python benchmarks/state_tracking.py [--experiment parity] [--seeds 0 1] [--lengths 32 100 500] [--runs FOLDER]
        [--table FILE] [--models "deltanet" "deltanet model.allow_neg_eigval=true" ...]
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
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


def zoo(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "zoo", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"zoo {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=("parity", "s5"), default="parity")
    parser.add_argument("--models", nargs="+", default=MODELS, help="a name and overrides each, in one word")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 100, 500])
    parser.add_argument("--runs", type=Path, help="where runs are kept; a temporary folder when left out")
    parser.add_argument("--table", type=Path, help="a file that rows are added to")
    args = parser.parse_args()

    begun = args.table is not None and args.table.exists()

    def say(line: str, heading: bool = False) -> None:
        print(line, flush=True)
        if args.table and not (heading and begun):
            with args.table.open("a") as file:
                file.write(line + "\n")

    folder = args.runs or Path(tempfile.mkdtemp())
    lengths = " | ".join(f"T = {T}" for T in args.lengths)
    say(f"| `zoo train experiment={args.experiment} model=` | seed | {lengths} | parameters | seconds |", heading=True)
    say("|---|---" + "|---" * len(args.lengths) + "|---|---|", heading=True)
    for seed in args.seeds:
        for i, words in enumerate(args.models):
            run = folder / f"{i}-{words.split()[0]}-{seed}"
            log = zoo(
                "train", f"experiment={args.experiment}", f"model={words.split()[0]}", *words.split()[1:],
                f"data.val_lengths={args.lengths}".replace(" ", ""), "trainer.val_every=1000000", f"seed={seed}",
                f"run_dir={run}",
            )  # fmt: skip
            with (run / "metrics.csv").open() as file:
                rows = list(csv.DictReader(file))
            seconds = next(float(row["elapsed"]) for row in reversed(rows) if row["elapsed"])
            shown = " | ".join(f"{float(rows[-1][f'val_last_accuracy_at_{T}']):.3f}" for T in args.lengths)
            parameters = re.findall(r"\(([\d,]+) parameters\)", log)[0]
            say(f"| {words} | {seed} | {shown} | {parameters} | {seconds:.0f} |")


if __name__ == "__main__":
    main()

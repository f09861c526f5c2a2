"""Train a small DeltaNet on real text, then let it write: the command line's work from Python. About 10 seconds.

    python examples/train.py [FOLDER]

The same by the command line: zoo train model=deltanet model.d_model=64 model.n_layers=2 trainer.max_steps=120.
"""

import sys
import tempfile
from pathlib import Path

import zoo
from zoo import tokenizers
from zoo.config import compose
from zoo.decoding import generate
from zoo.train import fit

SETTINGS = [
    "model=deltanet", "model.d_model=64", "model.n_layers=2", "model.hidden_size=128",
    "data.batch_size=4", "data.seq_len=128", "optim.lr=5e-3",
    "trainer.max_steps=120", "trainer.val_every=120", "trainer.limit_val_batches=2",
]  # fmt: skip


def main(folder: Path) -> None:
    config = compose(SETTINGS)  # every default filled in, every key and type checked
    code = fit.run(config, folder)  # data, model, task and Lightning's Trainer
    if code != 0:
        sys.exit(code)
    model = zoo.load(folder / "checkpoint")  # in eval mode
    tokenizer = tokenizers.load(folder / "checkpoint")
    tokens = list(generate(model, tokenizer.encode("The "), max_tokens=40, temperature=0.8, seed=0))
    print(repr("The " + tokenizer.decode(tokens)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "run")

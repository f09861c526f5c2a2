"""One run, from a composed config to a trained model in a folder.

| file | its one idea |
|---|---|
| `fit.py` | train what a config asks for; go on after an interruption |
| `evaluate.py` | measure a trained model on data |
| `instantiate.py` | a section of a config becomes the object that it names |
| `init_from.py` | a run that starts from the weights of another |
| `build.py` | the model, which must hold what the data have; the surroundings of a run's processes |
| `trainer.py` | the trainer's options; Lightning's Trainer, made in one place |
| `folder.py`, `loggers.py`, `checkpoint_io.py` | the files of a run: its folder, its table, its checkpoints |
| `endless_epoch.py` | training data as one epoch without an end |
| `interrupt.py`, `quiet.py` | signals that end a run well; Lightning's messages that do not apply |
"""

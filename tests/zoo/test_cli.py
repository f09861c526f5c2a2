"""The verbs: what they print, how they refuse, and what they leave unimported."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import zoo
import zoo.train.run
from zoo import cli, decoding, tokenizers
from zoo.cli import sweep as sweep_module
from zoo.cli.generate import GenerateRequest, StopText
from zoo.cli.models import parse_count, short_count
from zoo.cli.show import forward_flops, parameter_rows
from zoo.config import read_yaml
from zoo.decoding import Piece
from zoo.decoding.decoder import DECODERS
from zoo.errors import UsageError, UserError

LIGHT = (["--help"], ["list"], ["completion", "bash"], ["list", "--json"], ["config", "--groups"])


def python(*words, env=None, **settings):
    return subprocess.run(
        [sys.executable, "-P", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (env or {}),
        **settings,
    )


def run(capsys, *words):
    """(exit code, stdout, stderr) of a command in this process."""
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *words):
    """(exit code, the one sentence on stderr)."""
    code, out, err = run(capsys, *words)
    assert out == ""
    assert err.startswith("zoo: ")
    assert err.count("\n") == 1
    return code, err.removeprefix("zoo: ").rstrip()


# -- light verbs -------------------------------------------------------------------------------------------------


def test_light_verbs_import_neither_torch_nor_hydra():
    code = (
        "import sys; from zoo.cli import main\n"
        f"for words in {LIGHT}: assert main(words) == 0\n"
        "heavy = {'torch', 'lightning', 'hydra', 'omegaconf', 'numpy', 'ops', 'layers', 'train'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.timing
def test_light_verbs_cost_little_more_than_an_interpreter():
    def seconds(*words):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            assert python(*words).returncode == 0
            times.append(time.perf_counter() - start)
        return min(times)

    bare = seconds("-c", "pass")
    for words in LIGHT[:3]:
        assert seconds("-m", "zoo", *words) - bare < 0.5, words


def test_help_has_one_line_per_verb(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, verb in cli.VERBS.items():
        assert sum(line.split()[:1] == [name] and verb.line in line for line in out.splitlines()) == 1
        assert run(capsys, name, "--help")[0] == 0
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: zoo VERB")
    assert run(capsys, "--version")[1] == f"zoo {zoo.__version__}\n"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["trian"], 2, "no verb 'trian'; did you mean 'train'? zoo --help lists the verbs"),
        (["push"], 2, "no verb 'push'; "),
        (["--hlep"], 2, "no option '--hlep'; did you mean '--help'?"),
        (["list", "--tags", "x"], 2, "zoo list has no option '--tags'; did you mean '--tag'?"),
        (["list", "a", "b"], 2, "unrecognized arguments: b; zoo list --help shows how"),
        (["list", "--max-params", "many"], 2, "--max-params must be a number such as 200M, 1.3B or 200e6, got 'many'"),
        (["list", "nothing*"], 1, "no model matches 'nothing*'"),
        (["show"], 2, "the following arguments are required: name"),
        (["show", "toi"], 2, "no model 'toi'; did you mean 'toy'? zoo list shows all"),
        (["show", "toy", "d_modell=3"], 2, "model 'toy' has no field 'd_modell'; did you mean 'd_model'?"),
        (["show", "toy", "n_layers=0"], 2, "model 'toy': n_layers must be at least 1, got 0"),
        (["config", "model=delatnet"], 2, "no model 'delatnet'; did you mean 'deltanet'?"),
        (["config", "data=nowhere"], 2, "no data 'nowhere'"),
        (["config", "--groups", "seed=1"], 2, "--groups lists the choices and takes no settings"),
        (["train", "seed=1,2"], 2, "seed=1,2 gives several values, and one run takes one; zoo train -m runs them all"),
        (["train", "--metric", "val_loss"], 2, "--metric sorts the table of a sweep; add -m"),
        (["train", "-m", "run_dir=a,b"], 2, "a sweep has one run_dir, in which each run gets a folder"),
        (
            ["resume", "no/run", "init_from=other"],
            2,
            "a run goes on with the settings in its config.yaml, and init_from=other was given; leave it out, or start",
        ),
        (["resume", "no/run"], 1, "no run at no/run: there is no such folder"),
        (["resume", "."], 1, ". is not the folder of a run: it has no config.yaml"),
        (["completion", "csh"], 2, "argument shell: invalid choice: 'csh'"),
        (["doctor", "--device", "warp"], 2, "--device must be cpu, cuda or cuda:N, got 'warp'"),
        (["doctor", "--device", "cuda:99"], 2, "--device cuda:99 is not on this machine; there is cpu"),
    ],
)
def test_refusals_are_one_sentence_and_the_right_code(capsys, monkeypatch, tmp_path, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    got, said = refused(capsys, *words)
    assert (got, said[: len(sentence)]) == (code, sentence)


def test_list(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "tiny 232, big 720" in lines["toy"]
    assert lines["toy"].endswith("recurrent toy")
    assert set(lines) == set(zoo.list_models())
    assert run(capsys, "list", "t?y", "--tag", "toy", "--max-params", "1k")[1].startswith("toy")
    known = json.loads(run(capsys, "list", "toy", "--json")[1])
    assert known[0]["params"] == {"tiny": 232, "big": 720}


def test_counts():
    assert [parse_count(t) for t in ("200M", "1.3B", "200e6", "5k", "7")] == [200e6, 1.3e9, 200e6, 5e3, 7]
    assert [short_count(n) for n in (999, 1000, 374_475_776, 999_999, 1_365_514_240)] == [
        "999",
        "1k",
        "374M",
        "1M",
        "1.37B",
    ]


def test_groups(capsys):
    out = run(capsys, "config", "--groups")[1]
    groups = {line.split()[0]: line for line in out.splitlines()}
    assert list(groups) == [
        "model",
        "data",
        "task",
        "optim",
        "trainer",
        "strategy",
        "memory",
        "logger",
        "experiment",
        "decoder",
    ]
    assert "toy" in groups["model"]


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("no space"), 1, "no space"),
        (UsageError("no such key"), 2, "no such key"),
        (ValueError("K must be\nat most 256"), 1, "K must be (ZOO_TRACEBACK=1 shows where)"),
        (OSError(28, "No space left"), 1, "[Errno 28] No space left (ZOO_TRACEBACK=1 shows where)"),
        (MisconfigurationException("No supported gpu backend"), 1, "No supported gpu backend (ZOO_TRACEBACK=1"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "the device is out of memory (CUDA out of memory)"),
    ],
)
def test_errors_of_users_are_one_sentence(capsys, monkeypatch, error, code, sentence):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.VERBS, "list", cli.Verb("", lambda parser: None, fail))
    got, said = refused(capsys, "list")
    assert got == code
    assert said.startswith(sentence)
    monkeypatch.setenv("ZOO_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["list"])


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "list", cli.Verb("", lambda parser: None, lambda args: {}["key"]))
    with pytest.raises(KeyError):
        cli.main(["list"])


def test_ctrl_c_is_130(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "list", cli.Verb("", lambda parser: None, interrupted))
    assert run(capsys, "list") == (130, "", "zoo: interrupted\n")


def test_a_reader_that_leaves_is_no_error():
    zoo_list = f"'{sys.executable}' -P -m zoo list"
    done = subprocess.run(
        ["bash", "-c", f"(sleep 0.3; {zoo_list}) | true; {zoo_list} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"


# -- show --------------------------------------------------------------------------------------------------------


def test_show(capsys):
    code, out, _ = run(capsys, "show", "toy", "size=big", "n_layers=3", "pattern='a, b'")
    assert code == 0
    assert "\x1b" not in out
    total = 11 * 16 + 3 * (16 * 16 + 16)
    assert f"{total:,}" in out
    assert "3  (default 2)" in out
    assert "a, b" in out
    assert "4 at T = 1024, the same at any length" in out
    flops = 2 * (3 * 16 * 16 + 16 * 11)
    assert f"{short_count(flops)} forward, {short_count(3 * flops)} in training" in out


def test_show_counts_shared_weights_once_and_blocks_together():
    with torch.device("meta"):
        tied, untied = zoo.create_model("toy"), zoo.create_model("toy", tied=False)
    assert parameter_rows(tied) == [("embedding", "Embedding", 1, 88), ("blocks.*.0", "Linear", 2, 144)]
    assert parameter_rows(untied)[-1] == ("head", "Linear", 1, 88)
    assert forward_flops(tied, 32) == forward_flops(untied, 32)


def test_show_every_model(capsys):
    for name in zoo.list_models():
        code, out, _ = run(capsys, "show", name)
        assert code == 0
        assert f"{zoo.model_info(name).params['tiny']:,}" in out


# -- completion --------------------------------------------------------------------------------------------------

ASK_BASH = """
ask() {
  COMP_LINE="$1"; COMP_POINT=${#1}; COMP_WORDS=($1); [[ "$1" == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _zoo; echo "${COMPREPLY[*]}"
}
"""


def test_bash_completes(capsys, tmp_path):
    script = run(capsys, "completion", "bash")[1]
    lines = [
        "zoo tr",
        "zoo list --j",
        "zoo train model=delt",
        "zoo train seed=1 model.d_mo",
        "zoo show de",
        "zoo show deltanet d_mo",
        "zoo bench op=delta_r",
        "zoo resume ru",
    ]
    (tmp_path / "runs").mkdir()
    asked = "\n".join(f"ask {line!r}" for line in lines)
    done = subprocess.run(
        ["bash", "-c", script + ASK_BASH + asked], capture_output=True, text=True, timeout=20, cwd=tmp_path
    )
    assert done.stderr == ""
    # bash itself cuts words at "=", so only what follows is replaced
    assert done.stdout.splitlines() == [
        "train",
        "--json",
        "deltanet",
        "model.d_model=",
        "deltanet",
        "d_model=",
        "delta_rule",
        "runs",
    ]


def test_other_shells_name_every_verb_and_model(capsys):
    for shell in ("zsh", "fish"):
        script = run(capsys, "completion", shell)[1]
        for word in (*cli.VERBS, "model=deltanet", "model.d_model=", "--max-params".lstrip("-")):
            assert word in script


# -- verbs that train --------------------------------------------------------------------------------------------


@pytest.fixture
def fit(monkeypatch):
    """A stand-in for training that notes how it was called."""
    calls = []
    fake = types.ModuleType("zoo.train.run.fit")
    fake.run = lambda config, folder: calls.append(("run", config, folder)) or 0
    fake.resume = lambda folder: calls.append(("resume", folder)) or 130
    measures = types.ModuleType("zoo.train.run.evaluate")
    measures.evaluate = lambda path, words: calls.append(("evaluate", path, words)) or {"bits_per_byte": 1.23456789}
    monkeypatch.setitem(sys.modules, "zoo.train.run.fit", fake)
    monkeypatch.setitem(sys.modules, "zoo.train.run.evaluate", measures)
    monkeypatch.setattr(zoo.train.run, "fit", fake, raising=False)
    monkeypatch.setattr("zoo.cli.runs.compose", compose_toy)
    monkeypatch.setattr(sweep_module, "compose", compose_toy)
    return calls


def compose_toy(settings, config_dir=None):
    named = [word.partition("=")[2] for word in settings if word.startswith("run_dir=")]
    return {"model": {"name": "toy"}, "run_dir": named[0] if named else None, "settings": list(settings)}


def test_train_resume_and_eval_hand_over(capsys, fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "train", "model=toy", "seed=1", "run_dir=here")[0] == 0
    assert run(capsys, "train", "model=toy")[0] == 0
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.yaml").write_text("seed: 1\n")
    assert run(capsys, "resume", "here")[0] == 130
    assert run(capsys, "eval", "here", "data=mqar") == (0, "bits_per_byte 1.23457\n", "")
    kinds = [call[0] for call in fit]
    assert kinds == ["run", "run", "resume", "evaluate"]
    assert (fit[0][1]["settings"], str(fit[0][2])) == (["model=toy", "seed=1", "run_dir=here"], "here")
    assert str(fit[1][2]).startswith("runs/toy-2")
    assert fit[1][1]["run_dir"] == str(fit[1][2])
    assert fit[3][1:] == ("here", ["data=mqar"])


CHILD = """
import json, pathlib, signal, sys, time
run, value = pathlib.Path(sys.argv[1]), float(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
with open(run / "calls.txt", "a") as file: print(sys.argv[3], file=file)
(run / "config.yaml").write_text("{}")
if value == 3: sys.exit(1)
if value == 4:
    signal.signal(signal.SIGINT, lambda *_: ((run / "signals.txt").open("a").write("x"), sys.exit(130)))
    (run / "ready").touch()
    time.sleep(60)
(run / "metrics.csv").write_text(f"step,loss,val_loss\\n1,9,\\n1,,{value + 1}\\n2,8,\\n2,,{value}\\n")
(run / "checkpoint").mkdir()
(run / "checkpoint" / "config.json").write_text("{}")
"""


@pytest.fixture
def children(fit, monkeypatch):
    """Runs of a sweep as small scripts: x=3 crashes, x=4 waits for Ctrl-C."""
    real = sweep_module._command

    def command(run, common, config_dir):
        words = real(run, common, config_dir)
        assert words[1:4] == ["-P", "-m", "zoo"]
        return [sys.executable, "-c", CHILD, str(run.folder), run.values["optim.lr"], words[4]]

    monkeypatch.setattr(sweep_module, "_command", command)


def read_table(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_contains_a_crash_sorts_and_goes_on(capfd, children, tmp_path):
    words = ["train", "model=toy", "optim.lr=2,3,1", "-m", f"run_dir={tmp_path / 's'}"]
    assert cli.main(words) == 1
    table = read_table(tmp_path / "s")
    assert [(row["optim.lr"], row["val_loss"], row["status"]) for row in table] == [
        ("1", "1.0", "done"),
        ("2", "2.0", "done"),
        ("3", "", "failed (1)"),
    ]
    assert "1.0000" in capfd.readouterr().out
    assert cli.main(words) == 1  # finished runs are kept, the failed one is tried again
    assert [row["status"] for row in read_table(tmp_path / "s")] == ["kept", "kept", "failed (1)"]
    calls = {p.parent.name: p.read_text().split() for p in (tmp_path / "s").glob("*/calls.txt")}
    assert calls == {"optim.lr=1": ["train"], "optim.lr=2": ["train"], "optim.lr=3": ["train", "resume"]}


def test_ctrl_c_stops_a_sweep_once_and_says_how_to_go_on(capfd, children, tmp_path):
    waiting = tmp_path / "s" / "optim.lr=4" / "ready"

    def interrupt():
        while not waiting.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert cli.main(["train", "optim.lr=1,4,2", "-m", f"run_dir={tmp_path / 's'}"]) == 130
    assert [row["status"] for row in read_table(tmp_path / "s")] == ["done", "interrupted", "not run"]
    assert (waiting.parent / "signals.txt").read_text() == "x"
    assert f"zoo train -m optim.lr=1,4,2 run_dir={tmp_path / 's'}" in capfd.readouterr().err


def test_a_folder_holds_one_sweep(capsys, children, tmp_path):
    folder = tmp_path / "s"
    assert cli.main(["train", "optim.lr=1,2", "-m", f"run_dir={folder}"]) == 0
    assert cli.main(["train", "optim.lr=1,2,5", "-m", f"run_dir={folder}"]) == 0  # more values are welcome
    capsys.readouterr()
    code, said = refused(capsys, "train", "seed=9", "optim.lr=1,2", "-m", f"run_dir={folder}")
    assert (code, said.startswith(f"{folder} holds a sweep with other settings")) == (2, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    code, said = refused(capsys, "train", "optim.lr=1,2", "-m", f"run_dir={tmp_path / 'full'}")
    assert (code, said.startswith(f"{tmp_path / 'full'} is not empty and holds no sweep")) == (2, True)


def test_folder_names_tell_values_apart():
    name = sweep_module.folder_name
    assert name({"model": "gla", "optim.lr": "0.001"}) == "model=gla,optim.lr=0.001"
    assert name({"p": "a/b"}) != name({"p": "a:b"})
    assert "/" not in name({"p": "a/b"})
    assert len(name({"p": "x" * 500})) < 120


def test_metrics_where_more_is_better_sort_the_other_way(tmp_path):
    runs = []
    for value in (0.5, 0.9, 0.1):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "metrics.csv").write_text(f"step,val_loss,val_accuracy\n1,{value},{value}\n2,{value},\n")
        runs.append(sweep_module.Run({"x": str(value)}, folder))
    rows, column = sweep_module.collect(runs, {}, None)
    assert (column, [row["x"] for row in rows]) == ("val_accuracy", ["0.9", "0.5", "0.1"])
    rows, column = sweep_module.collect(runs, {}, "val_loss")
    assert [row["x"] for row in rows] == ["0.1", "0.5", "0.9"]
    with pytest.raises(UserError, match=r"no column 'val_los' in metrics.csv; did you mean 'val_loss'"):
        sweep_module.collect(runs, {}, "val_los")


# -- generate ----------------------------------------------------------------------------------------------------


def test_stop_text_is_never_shown_even_in_pieces():
    text = StopText(["\n\n", "END"])
    assert [text.push(piece) for piece in ("a\n", "b", "\nE", "x", "EN", "Dtail")] == ["a", "\nb", "\n", "Ex", "", ""]
    assert text.reached
    text = StopText(["stop"])
    assert text.push("sto") + text.finish() == "sto"
    assert StopText([]).push("all of it") == "all of it"


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 1.5}]
)
def test_sampling_is_checked(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=f"decoder.{name} must be"):
        GenerateRequest(flags=wrong).decoder()


@pytest.fixture
def talker(tmp_path):
    """A model of bytes with its tokenizer, untrained."""
    torch.manual_seed(0)
    model = zoo.create_model("transformer", d_model=16, n_layers=1, n_heads=2, vocab_size=257)
    return zoo.save(model, tmp_path / "talker", tokenizer=tokenizers.ByteTokenizer())


def test_generate_is_the_same_for_the_same_seed(capsys, talker):
    words = ["generate", str(talker), "--prompt", "The ", "--max-tokens", "9"]
    code, first, err = run(capsys, *words, "--seed", "3")
    assert (code, err) == (0, "")
    assert first.endswith("\n")
    assert 1 < len(first) <= 10
    assert run(capsys, *words, "--seed", "3")[1] == first
    assert run(capsys, *words, "--seed", "4")[1] != first
    assert run(capsys, *words, "--seed", "3", "--stop", first[2])[1] == first[:2] + "\n"
    greedy = run(capsys, *words, "--temperature", "0")[1]
    assert run(capsys, *words, "--top-k", "1", "--seed", "8")[1] == greedy


def test_generate_prints_a_token_before_it_computes_the_next(talker, monkeypatch):
    class Output(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    shown = Output()

    def run(self, model, prompt, codec, generator):
        assert list(prompt.rows[0]) == [256, *b"ab"]
        assert list(prompt.stop_ids) == [256]
        for n, token in enumerate("x\u00e9y".encode()):
            assert shown.flushed == ["", "x", "x", "x\u00e9"][n]  # never half a character
            yield Piece([[token]], [False], {"forwards": 1})

    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(decoding.Sampling, "run", run)
    assert cli.main(["generate", str(talker), "--prompt", "ab", "--max-tokens", "4"]) == 0
    assert shown.getvalue() == "x\u00e9y\n"


def test_generate_compiles_when_asked(capsys, talker, monkeypatch):
    asked = []
    monkeypatch.setattr(
        decoding.Sampling, "run", lambda self, *_: asked.append(self.compile) or iter([Piece([[65]], [True], {})])
    )
    assert cli.main(["generate", str(talker)]) == cli.main(["generate", str(talker), "--compile"]) == 0
    said = capsys.readouterr()
    assert asked == [False, True]
    assert said.out == "A\nA\n"
    assert said.err.count("compiling") == 1


def test_generate_refuses_a_tokenizer_of_another_model(capsys, talker):
    tokenizers.ByteTokenizer().save(talker)
    zoo.save(zoo.create_model("toy"), talker)
    tokenizers.ByteTokenizer().save(talker)
    code, said = refused(capsys, "generate", str(talker))
    assert (code, said.split("; ")[0]) == (1, f"the tokenizer of {talker} has 257 symbols and the model only 11")


def test_generate_reads_its_prompt_from_a_pipe(capsys, talker, monkeypatch):
    words = ["generate", str(talker), "--max-tokens", "5", "--seed", "1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The "))
    assert run(capsys, *words, "--prompt", "-")[1] == run(capsys, *words, "--prompt", "The ")[1]


def test_generate_by_another_decoder_is_the_same_text_in_fewer_forwards(capsys, talker, tmp_path):
    words = ["generate", str(talker), "--prompt", "abcabcabc", "--temperature", "0", "--max-tokens", "40", "--stats"]
    code, plain, said = run(capsys, *words)
    assert (code, said) == (0, "40 tokens in 40 forwards, 0 saved\n")
    code, text, said = run(capsys, *words, "decoder=speculative", "decoder.gamma=6", "decoder.shortest=1")
    assert (code, text) == (0, plain)
    tokens, forwards, saved, accepted, proposed = map(int, re.findall(r"\d+(?!\d*%)", said))
    assert (tokens, saved) == (40, 40 - forwards)
    assert saved == accepted > 0
    assert proposed >= accepted
    assert run(capsys, *words, "decoder=speculative", "--out", str(tmp_path / "text"))[1] == ""
    assert (tmp_path / "text").read_text() == plain


def test_generate_goes_on_from_a_saved_state(capsys, talker, tmp_path):
    words, file = ["generate", str(talker), "--temperature", "0"], str(tmp_path / "state")
    whole = run(capsys, *words, "--prompt", "The ", "--max-tokens", "12")[1]
    first = run(capsys, *words, "--prompt", "The ", "--max-tokens", "5", "--save-state", file)[1]
    for decoder in ("sampling", "speculative"):
        rest = run(capsys, *words, "--max-tokens", "7", "--load-state", file, f"decoder={decoder}")[1]
        assert first[:-1] + rest == whole
    other = zoo.save(zoo.create_model("transformer", d_model=16, n_layers=1, n_heads=2, vocab_size=257), tmp_path / "o",
                     tokenizer=tokenizers.ByteTokenizer())  # fmt: skip
    code, said = refused(capsys, "generate", str(other), "--load-state", file)
    assert code == 1
    assert said.startswith("this state was made by other weights (transformer ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["decoder=speculativ"], "no decoder 'speculativ'; did you mean 'speculative'?"),
        (["decoder.gamma=3"], "no setting 'decoder.gamma'"),
        (["decoder=speculative", "decoder.gamma=0"], "decoder.gamma must be in [1, 64], got 0"),
        (["decoder=speculative", "decoder.drafter=oracle"], "decoder.drafter must be 'ngram', got 'oracle'"),
        (["decoder=speculative", "decoder.shortest=9"], "decoder.shortest must be at most longest = 6, got 9"),
        (["decoder=speculative", "--compile"], "no setting 'decoder.compile'"),
        (["decoder.seed=3", "--seed", "4"], "--seed and decoder.seed= are the same setting; give one of them"),
        (["model=gla"], "zoo generate takes decoder=NAME and decoder.KEY=VALUE, one value each; got model=gla"),
    ],
)
def test_words_about_decoders_that_are_off(capsys, talker, words, said):
    code, sentence = refused(capsys, "generate", str(talker), *words)
    assert code == 2
    assert sentence.startswith(said)


def test_list_says_which_decoders_a_model_can_use(capsys, talker, tmp_path):
    for words in (["--decoders"], ["--decoders", str(talker)]):
        code, out, _ = run(capsys, "list", *words)
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == sorted(DECODERS)
        assert " no: " not in out
    both = zoo.save(zoo.create_model("hydra", d_model=32, n_layers=1, vocab_size=257, head_dim=16), tmp_path / "both")
    out = run(capsys, "list", "--decoders", str(both))[1]
    assert all(
        "no: a text is continued by a causal model, and hydra sees both sides" in line for line in out.splitlines()
    )
    code, said = refused(capsys, "generate", str(both), "decoder=speculative")
    assert code == 1
    assert "hydra has none" in said


# -- doctor ------------------------------------------------------------------------------------------------------


def test_doctor_is_red_when_an_operator_is_wrong(capsys, monkeypatch):
    from zoo.cli import doctor

    few = {"causal_conv1d": doctor.OPERATORS["causal_conv1d"]}
    monkeypatch.setattr(doctor, "OPERATORS", few)
    monkeypatch.setattr(doctor, "cases", lambda device: [("torch", torch.float32)])
    code, out, _ = run(capsys, "doctor", "--device", "cpu")
    assert code == 0
    assert "torch 2." in out
    assert "agree with their definitions" in out
    for broken in ({"output 0": 1.0}, RuntimeError("kernel died\nat line 3")):

        def parity(*args, found=broken, **kwargs):
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(doctor, "parity", parity)
        code, out, _ = run(capsys, "doctor", "--device", "cpu")
        assert code == 1
        assert "WRONG" in out
        assert "do NOT all agree" in out
    assert "RuntimeError: kernel died" in out


def test_the_composed_config_is_printed_as_yaml(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("zoo.cli.runs.compose", lambda settings, config_dir=None: {"seed": 3, "optim": {"lr": 1e-5}})
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("ZOO_TRACEBACK")
    (tmp_path / "c.yaml").write_text(run(capsys, "config", "seed=3")[1])
    assert read_yaml(tmp_path / "c.yaml") == {"seed": 3, "optim": {"lr": 1e-5}}

"""zoo bench --base: another commit in turns with this one, and nothing left behind."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo import cli
from zoo.bench import compare_commits, report
from zoo.bench.record import read
from zoo.cli.status import StatusLine
from zoo.errors import UserError

ROOT = Path(zoo.__file__).resolve().parent.parent
SLOW = "    time.sleep(0.02)  # the mark of the slow commit\n"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with two more commits: `slow`, whose convolution sleeps, and `without`, which has none."""
    if not (ROOT / ".git").exists():
        pytest.skip("zoo runs from an installation, not from a checkout")
    folder = tmp_path_factory.mktemp("base") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True, capture_output=True)
    convolution, table = (
        folder / "ops/convolutions/causal_conv1d/__init__.py",
        folder / "ops/convolutions/causal_conv1d/spec.py",
    )
    original = convolution.read_text()
    body = '    call = OPERATOR.begin(args, alike=("x", "weight", "bias")'
    assert body in original
    convolution.write_text(
        original.replace(body, SLOW + body, 1).replace("import torch\n", "import time\n\nimport torch\n", 1)
    )
    git(folder, "commit", "--quiet", "--all", "--message", "Slow down")
    git(folder, "tag", "slow")
    convolution.write_text(original)
    text = table.read_text()
    assert 'name="causal_conv1d"' in text
    table.write_text(text.replace('name="causal_conv1d"', 'name="renamed"'))
    git(folder, "commit", "--quiet", "--all", "--message", "Rename")
    git(folder, "tag", "without")
    git(folder, "reset", "--quiet", "--hard", "HEAD~2")
    return folder


@pytest.fixture
def bench(clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit code, stdout, stderr) of `zoo bench op=causal_conv1d` run as if zoo lived in the clone."""
    monkeypatch.setattr("zoo.bench.run.repository", lambda: clone)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["bench", "op=causal_conv1d", "device=cpu", "T=16", "B=1", "D=4", "repeats=3", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def left_behind(clone: Path) -> list[str]:
    """Worktrees besides the clone itself."""
    return git(clone, "worktree", "list").splitlines()[1:]


def test_the_other_commit_is_measured_with_its_own_code(bench: Any, clone: Path, tmp_path: Path) -> None:
    code, out, err = bench("--base", "slow", f"out={tmp_path}/x.json")
    assert code == 0
    slow = git(clone, "rev-parse", "slow")
    rounds = [line.partition("] ")[2] for line in err.splitlines() if "round" in line]
    assert rounds[0] == "round 1 of 3"
    for number, line in enumerate(rounds[1:], 2):
        assert re.fullmatch(
            rf"round {number} of 3; 0:\d\d left; {slow[:10]}, forward\+backward: torch [\d.]+ ms.*", line
        )
        assert "; here, forward+backward: torch " in line
    record = read(tmp_path / "x.json")
    assert record.about["base"] == slow
    first, here = record.cases[0].sides
    assert (first.name, here.name) == (f"torch @ {slow[:10]}", "torch @ here")
    assert len(first.phases["forward"].times) == len(here.phases["forward"].times) == 3
    assert first.phases["forward"].median > 0.02
    assert report.ratio(here, first, "forward") < 0.9
    assert f"| torch @ {slow[:10]} | " in out
    assert left_behind(clone) == []


def test_the_time_that_is_left_is_that_of_the_rounds_so_far() -> None:
    assert compare_commits.progress(0, 10, 0.0, {}) == "round 1 of 10"
    said = compare_commits.progress(
        4, 10, 100.0, {"a1": "forward: torch 2.0 ms", "here": "", "b": "forward: torch 1 s"}
    )
    assert said == "round 5 of 10; 2:30 left; a1, forward: torch 2.0 ms; b, forward: torch 1 s"


def test_an_operator_that_is_not_there(bench: Any, clone: Path) -> None:
    code, out, err = bench("--base", "without")
    name = git(clone, "rev-parse", "without")[:10]
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"zoo: {name}: there is no operator 'causal_conv1d' here; there is ")
    assert "renamed, " in last
    assert left_behind(clone) == []


def test_an_unknown_commit(bench: Any, clone: Path) -> None:
    code, _, err = bench("--base", "nowhere")
    sentence = f"--base takes a commit and {clone} has no 'nowhere'; git log --oneline lists them"
    assert (code, err) == (1, f"zoo: {sentence}\n")
    assert bench("--base=--help")[0] == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind_when_it_is_stopped(
    clone: Path, stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def say(text: str) -> None:
        seen.append(text)
        seen.extend(left_behind(clone))
        raise stop

    processes: list[Any] = []
    popen = subprocess.Popen

    class Noted(popen):  # type: ignore[type-arg,misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(compare_commits.subprocess, "Popen", Noted)
    with pytest.raises(stop):
        compare_commits.compare({"do": "operators"}, 1, "slow", clone, say)
    assert len(seen) == 2  # one message, and the worktree that was there then
    assert left_behind(clone) == []
    workers = [p for p in processes if "worker.py" in str(p.args)]
    assert len(workers) == 2
    assert all(p.returncode is not None for p in workers)


def test_ctrl_c_keeps_the_rounds_that_were_measured(bench: Any, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping(StatusLine):
        def __call__(self, text: str) -> None:
            super().__call__(text)
            if "round 3 of 3" in text:
                raise KeyboardInterrupt

    monkeypatch.setattr("zoo.cli.bench.StatusLine", Stopping)
    code, out, err = bench("--base=slow")
    assert code == 130, err
    assert "**interrupted**" in out
    rows = [line for line in out.splitlines() if line.startswith("| torch @")]
    assert len(rows) == 4, "two trees, two phases"
    assert all("n=2" in row for row in rows)
    assert left_behind(clone) == []


def test_an_installation_has_no_commits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare_commits.zoo, "__file__", str(tmp_path / "site" / "zoo" / "__init__.py"))
    with pytest.raises(UserError, match=r"zoo runs from .*site, which is no git checkout of it"):
        compare_commits.repository()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import os\nos._exit(3)\n", "old: the measuring process ended with code 3; see above"),
        ("import zoo.nothing\n", "old: its code is too old for this benchmark (No module named 'zoo.nothing')"),
        ("import zoo.ops\n", "old: its code is too old for this benchmark (No module named 'zoo.ops')"),  # not ours
    ],
)
def test_a_tree_that_cannot_be_measured(tmp_path: Path, code: str, sentence: str) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text(code)
    with compare_commits.worker("old", tmp_path) as old:
        with pytest.raises(UserError) as refusal:
            old.ask({"do": "round"})
        assert str(refusal.value) == sentence

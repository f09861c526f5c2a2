"""This tree beside another commit of the repository, in turns, so that noise hits both."""

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import zoo
from zoo.bench.record import CaseResult, case_from, git
from zoo.errors import UserError

__all__ = ["compare", "repository"]

BENCH = Path(__file__).parent


def repository() -> Path:
    """The checkout that this zoo runs from.

    Raises:
        UserError: it was installed from a package.
    """
    root = Path(zoo.__file__).resolve().parent.parent
    if not (root / ".git").exists() or not (root / "ops").is_dir():
        raise UserError(
            f"--base compares commits and zoo runs from {root}, which is no git checkout of it; clone zoo's "
            "repository and pip install -e it"
        )
    return root


def compare(
    message: Mapping[str, Any], repeats: int, revision: str, root: Path, say: Callable[[str], None]
) -> tuple[list[CaseResult], str, bool]:
    """Measure the same in a temporary checkout of `revision` and in `root` as it is.

    Args:
        message: what `zoo.bench.measure_requests` takes to begin with.
        repeats: rounds; the two trees take turns and turn about in going first.
        revision: anything that git understands as a commit.
        root: the checkout.
        say: hears what is going on.

    Returns:
        the cases, with the sides of the base first; the base's full hash; whether Ctrl-C or SIGTERM ended it early.

    Raises:
        KeyboardInterrupt: stopped before the first round was over.
    """
    with _stop_on_terminate(), checkout(revision, root) as (tree, commit), contextlib.ExitStack() as stack:
        base_name = commit[:10]
        trees = {base_name: tree, "here": root}
        workers = {name: stack.enter_context(worker(name, where)) for name, where in trees.items()}
        for name, one in workers.items():
            say(f"{name}: checking against float64, warming up")
            one.ask(message)
        done, stopped, began = 0, False, time.monotonic()
        newest: dict[str, str] = {}
        try:
            for number in range(repeats):
                say(progress(number, repeats, time.monotonic() - began, newest))
                for name, one in list(workers.items())[:: 1 if number % 2 == 0 else -1]:
                    newest[name] = one.ask({"do": "round"})["newest"]
                done += 1
        except KeyboardInterrupt:
            if not done:
                raise
            stopped = True
            say(f"interrupted in round {done + 1}; its end is awaited, another Ctrl-C drops all")
        results = {name: [case_from(c) for c in one.ask({"do": "results"})["cases"]] for name, one in workers.items()}
    return (
        [_merge({name: cases[i] for name, cases in results.items()}) for i in range(len(results["here"]))],
        commit,
        stopped,
    )


def progress(done: int, repeats: int, spent: float, newest: Mapping[str, str]) -> str:
    """Which round begins, how long all that are left will take, and the medians so far.

    Args:
        done: rounds that are over.
        repeats: rounds in all.
        spent: seconds that those took.
        newest: by tree, what `zoo.bench.report.newest` says of the case that was measured last.
    """
    parts = [f"round {done + 1} of {repeats}"]
    if done:
        minutes, seconds = divmod(round(spent / done * (repeats - done)), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "; ".join(parts + [f"{name}, {text}" for name, text in newest.items() if text])


def _merge(by_tree: Mapping[str, CaseResult]) -> CaseResult:
    """One case of both trees: their sides next to each other."""
    merged = dataclasses.replace(by_tree["here"], sides=[], notes=list(by_tree["here"].notes))
    names = dict.fromkeys(side.name for case in by_tree.values() for side in case.sides)
    for name in names:
        for tree, case in by_tree.items():
            for side in case.sides:
                if side.name == name:
                    merged.sides.append(dataclasses.replace(side, name=f"{name} @ {tree}"))
    return merged


@contextlib.contextmanager
def checkout(revision: str, root: Path) -> Iterator[tuple[Path, str]]:
    """A temporary worktree of a commit, and the commit's hash; removed whatever happens."""
    commit = git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None or revision.startswith("-"):
        raise UserError(f"--base takes a commit and {root} has no {revision!r}; git log --oneline lists them")
    folder = Path(tempfile.mkdtemp(prefix="zoo-base-"))
    tree = folder / "tree"
    try:
        if git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit) is None:
            raise UserError(f"git could not check {revision} out to {tree}; see whether the disk has room")
        yield tree, commit
    finally:
        with _uninterrupted():
            git(root, "worktree", "remove", "--force", str(tree))
            shutil.rmtree(folder, ignore_errors=True)
            git(root, "worktree", "prune")


class _Worker:
    """The other end of a process that runs `zoo.bench.worker`."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name, self.process = name, process
        self.unanswered = 0  # requests whose answers nobody has read: one, where Ctrl-C came meanwhile

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            UserError: it could not be done, or the process has died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its last words say why
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        self.unanswered += 1
        while self.unanswered:
            line = self.process.stdout.readline()
            self.unanswered -= 1
        if not line:
            raise UserError(f"{self.name}: the measuring process ended with code {self.process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.name}: {answer['error']}")
        return answer


@contextlib.contextmanager
def worker(name: str, tree: Path) -> Iterator[_Worker]:
    """A measuring process for a tree; ended whatever happens."""
    words = [sys.executable, "-P", str(BENCH / "worker.py"), str(tree), str(BENCH)]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=tree
    )  # in a session of its own: a Ctrl-C is for us to pass on
    try:
        yield _Worker(name, process)
    finally:
        with _uninterrupted():
            _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not stop the clearing up after the first."""
    with _handlers((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _stop_on_terminate() -> Iterator[None]:
    """SIGTERM ends the comparison like Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handlers((signal.SIGTERM,), stop):
        yield


@contextlib.contextmanager
def _handlers(signals: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set them
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)

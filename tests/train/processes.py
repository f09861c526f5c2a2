"""Runs in processes of their own, which may be killed. Started as a script it imports everything once
and forks one process per job, so that ten killed runs cost one import."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import tiny

from zoo.errors import UserError
from zoo.train.run import fit


def run_jobs(folder: Path, jobs: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Run jobs one after the other; (exit code, or minus the signal; what it printed) of each.

    A job is {"do": "run" or "resume", "run_dir": ..., "config": ..., "environment": {...}, "file_size": ...}.
    """
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(listed)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]


def _job(job: dict[str, Any], output: Path) -> int:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(job.get("environment", {}))
    if "file_size" in job:  # a file that grows beyond it fails like one on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    try:
        return fit.run(job["config"], job["run_dir"]) if job["do"] == "run" else fit.resume(job["run_dir"])
    except UserError as error:
        print(f"error: {error}", flush=True)
        return 1
    except BaseException:
        traceback.print_exc()
        return 99


def main(listed: Path) -> None:
    """Fork a process per job."""
    assert threading.active_count() == 1  # a fork keeps only this thread
    results = []
    for i, job in enumerate(json.loads(listed.read_text())):
        output = listed.with_name(f"output-{i}.txt")
        pid = os.fork()
        if pid == 0:
            code = _job(job, output)
            sys.stdout.flush()
            os._exit(code)
        watchdog = threading.Timer(60, os.kill, (pid, signal.SIGKILL))
        watchdog.start()
        status = os.waitpid(pid, 0)[1]
        watchdog.cancel()
        watchdog.join()
        results.append((os.waitstatus_to_exitcode(status), output.read_text()))
    print(json.dumps(results))


if __name__ == "__main__":
    assert tiny.V
    main(Path(sys.argv[1]))

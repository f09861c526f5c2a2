"""Four gloo processes and a slow link: All-Scan in different numbers of blocks; started as a script by test_shard.py.

Every message that arrives costs LATENCY + bytes / bandwidth. Writes FOLDER/seconds.json: {blocks: seconds}.
"""

import faulthandler
import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from zoo.ops import shard
from zoo.ops.core.algebra import Diagonal

RANKS, COLUMNS = 4, 64
LATENCY, WHOLE = 0.008, 0.128  # seconds of a message, and of all bytes of the state
BLOCKS = (1, 2, 3, 4, 6, 8, 12, 24, 64)
STATE = (1, 2, 8, COLUMNS)


def process(rank: int, folder: Path) -> None:
    faulthandler.dump_traceback_later(180, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    element = Diagonal(torch.zeros(STATE[:-1]), torch.ones(STATE))
    size = element.b.nbytes

    def slow(message: shard.Message) -> None:
        if message.kind == "receive":
            time.sleep(LATENCY + WHOLE * message.received / size)

    found = {}
    for blocks in BLOCKS:
        times = []
        for _ in range(3):
            dist.barrier()
            start = time.perf_counter()
            with shard.observed(slow), shard.use(shard.SequenceShard(method="zeco", blocks=blocks)):
                state = shard.incoming_state(element, torch.zeros(STATE))
            assert (state == rank).all()
            times.append(time.perf_counter() - start)
        found[blocks] = min(times)  # the others wait for the processor, not for the link
    if rank == RANKS - 1:
        (folder / "seconds.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(r, Path(sys.argv[1])), daemon=True) for r in range(RANKS)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    sys.exit(any(p.exitcode for p in processes))

"""Programs run by several processes at once, as torchrun runs them, on gloo."""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class Failure(NamedTuple):
    """An exception, which need not be one that can be pickled."""

    kind: type
    text: str
    traceback: str


PATIENCE = 60  # seconds until a rank that waits for another one gives up


def run(programs, size=2):
    """Calls ``program(argument, rank, size)`` for all programs by name, in `size` processes.

    Args:
        programs: pairs of a program and its argument.

    Returns:
        By name the results of all ranks; a :class:`Failure` where an exception ended the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        # a server imports what all need once, and is not the process that tests have run in
        multiprocessing.set_forkserver_preload(["tests.test_distributed"])
        torch.multiprocessing.start_processes(
            _work, (size, folder, programs), nprocs=size, start_method="forkserver"
        )
        parts = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]
    return {name: [part[name] for part in parts] for name in programs}


def _work(rank, size, folder, programs):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    results = {}
    for number, (name, (program, argument)) in enumerate(programs.items()):
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{folder}/store{number}", size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=PATIENCE),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[name] = program(argument, rank, size)
        except Exception as error:
            results[name] = Failure(type(error), str(error), traceback.format_exc())
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}")

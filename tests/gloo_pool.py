"""One pool of gloo workers for the whole suite.

    def work(rank_independent_argument):      # at module level, so that a worker can import it
        ... torch.distributed is initialised here ...
        return tensor

    def test_it(gloo_pool):
        by_rank = gloo_pool.run(work, 2, argument)

Workers are started once and keep torch imported; each call gets a process group of its own.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import pytest


def _serve(connection: Connection) -> None:
    """A worker: runs what comes until the pipe closes; on the CPU, whatever else is there."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args, rank, world_size, store = pickle.loads(message)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
            # Who is done at once would hang up on those that still connect.
            dist.barrier()
            answer = (True, function(*args))
            dist.destroy_process_group()
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


class GlooPool:
    """Worker processes, one per rank, started when first needed."""

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.Process, Connection]] = []

    def _start(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < number:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))

    def run(self, function: Callable, world_size: int, *args: object, timeout: float = 120) -> list:
        """`function(*args)` in `world_size` ranks of one group; the results by rank.

        An exception in a rank is raised here as a RuntimeError with that rank's traceback.
        """
        self._start(world_size)
        connections = [connection for _, connection in self._workers[:world_size]]
        with tempfile.TemporaryDirectory() as folder:
            for rank, connection in enumerate(connections):
                call = (function, args, rank, world_size, os.path.join(folder, "store"))
                connection.send_bytes(pickle.dumps(call))
            return self._collect(connections, time.monotonic() + timeout)

    def _collect(self, connections: list[Connection], deadline: float) -> list:
        results: dict[int, object] = {}
        while len(results) < len(connections):
            waiting = [c for rank, c in enumerate(connections) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                missing = [rank for rank in range(len(connections)) if rank not in results]
                raise RuntimeError(f"ranks {missing} did not answer in time")
            for connection in ready:
                rank = connections.index(connection)
                try:
                    ok, results[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    worker, _ = self._workers[rank]
                    worker.join(5)
                    ok, results[rank] = False, f"the worker died, exit code {worker.exitcode}"
                if not ok:
                    # The other ranks may wait for this one in a collective: start anew.
                    self.close()
                    raise RuntimeError(f"rank {rank} failed:\n{results[rank]}")
        return [results[rank] for rank in range(len(connections))]

    def close(self) -> None:
        """End the workers; the next `run` starts new ones."""
        for worker, connection in self._workers:
            connection.close()
            worker.kill()
            worker.join()
        self._workers = []


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    pool = GlooPool()
    yield pool
    pool.close()

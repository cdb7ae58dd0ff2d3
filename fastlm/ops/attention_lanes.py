"""Cut attention on the CPU into lanes: heads or rows of the batch that one core computes from beginning to end.

Where cores share each operation of a tile, which takes a millisecond, all wait for the last one; with another process
on a core that took ten times as long.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 8  # at most, as each has tiles of its own
LANE_SCORES = 1 << 24  # in fewer, the threads that were busy before still spin on the cores


class Lane(NamedTuple):
    """Rows of the batch and heads of keys for one core; `group` heads of queries share one of keys."""

    number: int
    batch: slice
    heads: slice
    group: int

    def of_keys(self, x: Tensor | None) -> Tensor | None:
        """View the lane's part of `x` `[B or 1, H_kv or 1, …]`."""
        return _cut(_cut(x, 0, self.batch), 1, self.heads)

    def of_queries(self, x: Tensor | None) -> Tensor | None:
        """View the lane's part of `x` `[B or 1, H or 1, …]`."""
        return _cut(_cut(x, 0, self.batch), 1, self.query_heads)

    def part(self, call):
        """Return the lane's part of a `Call` of attention_tiles.py."""
        lengths, query_ids, key_ids = (_cut(x, 0, self.batch) for x in call[6:9])
        seed = None if call.seed is None else call.seed + self.number
        return call._replace(
            query=self.of_queries(call.query), key=self.of_keys(call.key), value=self.of_keys(call.value),
            mask=self.of_queries(call.mask), sinks=_cut(call.sinks, 0, self.query_heads),
            slopes=self.of_queries(call.slopes), key_lengths=lengths, query_ids=query_ids, key_ids=key_ids, seed=seed)

    @property
    def query_heads(self) -> slice:
        """The heads of queries that share those of keys."""
        return slice(self.heads.start * self.group, self.heads.stop * self.group)


def lanes(call, scores: int | None = None) -> list[Lane]:
    """Cut a call into lanes: by heads, of which all take as long, or by rows of the batch if that makes more lanes.

    `scores` is how many there are, where the call is one of several that are cut alike.
    """
    batch, heads, queries, _ = call.query.shape
    _, kv_heads, keys, _ = call.key.shape
    # What dropout draws depends on the lanes: as many in backward, whatever happens to the number of threads.
    most = LANES if call.seed is not None else min(LANES, torch.get_num_threads())
    if (batch * heads * queries * keys if scores is None else scores) < LANE_SCORES:
        most = 1
    by_rows = min(batch, most) > min(kv_heads, most)
    length = batch if by_rows else kv_heads
    step = -(-length // most)
    cuts = [slice(first, min(first + step, length)) for first in range(0, length, step)]
    return [Lane(i, cut if by_rows else slice(0, batch), slice(0, kv_heads) if by_rows else cut, heads // kv_heads)
            for i, cut in enumerate(cuts)]


def _cut(x, dim, at):
    return x if x is None or x.size(dim) == 1 else x.narrow(dim, at.start, at.stop - at.start)


def side_by_side(jobs: list, most: int = LANES) -> None:
    """Run jobs, at most so many at a time, in threads of Python that share out PyTorch's threads."""
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    workers = min(threads, most, len(jobs))
    if workers < 2:
        for job in jobs:
            job()
        return

    def alone(job):
        with torch.inference_mode(inference), torch.no_grad():  # which are each thread's own
            job()

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            for done in [pool.submit(alone, job) for job in jobs]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # what threads to come begin with

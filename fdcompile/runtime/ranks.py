"""Shares the decoding of a group between the processes of a process group."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fdcompile.capture.call import UNetCall
from fdcompile.graph.weights import tensor_bytes
from fdcompile.runtime.clock import Position
from fdcompile.runtime.policy import Decision, Reuse
from fdcompile.runtime.run import Run

_dist: Any = cast(Any, torch.distributed)


class Ranks:
    """The ranks of a process group, all of which make the same calls, or this process alone.

    Attributes:
        count: number of ranks.

    Args:
        process_group: process group of ``torch.distributed``; None for this process alone.
        settings: settings that must be equal on all ranks, besides the arguments of the calls.
    """

    def __init__(self, process_group: Any, settings: object = None) -> None:
        self._settings = settings
        self._group = process_group
        self.count: int = 1 if process_group is None else _dist.get_world_size(process_group)
        self._rank: int = 0 if process_group is None else _dist.get_rank(process_group)

    def agree(self, run: Run | None, call: UNetCall, position: Position | None, decision: Decision) -> None:
        """Checks that all ranks answer this call in the same way.

        The arguments of the call are compared as well, unless it reuses features. Synchronizes with the device.

        Raises:
            RuntimeError: the ranks differ, or one did not respond in time.
        """
        if self.count == 1:
            return
        facts: list[object] = [position and (position.step, position.slot), decision, self._settings]
        tensors: list[Tensor] = []
        if not isinstance(decision, Reuse):
            facts += [(path, value) for path, value in call.leaves if not isinstance(value, Tensor)]
            tensors += call.tensors
            if run is not None:
                facts.append(run.key_steps)
                tensors.append(run.timesteps)
        self._compare(facts, tensors, call.sample.device)

    def _compare(self, facts: Sequence[object], tensors: Sequence[Tensor], device: torch.device) -> None:
        digest = hashlib.blake2b(repr(facts).encode(), digest_size=7)
        for tensor in tensors:
            digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor_bytes(tensor))
        mine = torch.tensor([int.from_bytes(digest.digest())], device=device)
        first, *rest = self._gather(mine).tolist()
        if different := [rank for rank, value in enumerate(rest, start=1) if value != first]:
            raise RuntimeError(
                f"rank {different[0]} of the process group does not run what rank 0 runs: ranks that decode together "
                f"make the same call, with the same prompts, seeds, size, steps and configuration. A sampler that "
                f"draws noise needs a generator, with the same seed on all ranks"
            )

    def share(self, first: int, stop: int, most: int) -> tuple[slice, int]:
        """Divides steps `first` to `stop` - 1 among the ranks, at most `most` for each.

        Returns:
            The steps that this rank decodes, and the end of the steps that all ranks decode. A rank for which no step
            is left repeats the last one.
        """
        each = min(-(-(stop - first) // self.count), most)
        end = min(stop, first + each * self.count)
        begin = min(first + self._rank * each, end - 1)
        return slice(begin, min(begin + each, end)), end

    def gather(self, mine: Tensor, first: int, end: int) -> Tensor:
        """Collects the predictions of steps `first` to `end` - 1, shape ``[steps, batch, ...]``; this rank has `mine`.

        Raises:
            RuntimeError: a rank did not respond in time.
        """
        if self.count == 1 or end == first + 1:
            return mine
        each = -(-(end - first) // self.count)
        missing = mine.new_zeros((each - len(mine), *mine.shape[1:]))
        return self._gather(torch.cat([mine, missing]).contiguous())[: end - first]

    def _gather(self, mine: Tensor) -> Tensor:
        gathered = mine.new_empty((self.count * len(mine), *mine.shape[1:]))
        try:
            _dist.all_gather_into_tensor(gathered, mine, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self._rank} of {self.count} got no answer from the other ranks: one has exited, was "
                f"interrupted, or runs another call ({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error
        return gathered

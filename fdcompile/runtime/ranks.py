"""Processes that share the decoding of a group of steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fdcompile.capture.call import UNetCall
from fdcompile.graph.weights import tensor_bytes
from fdcompile.runtime.clock import Position
from fdcompile.runtime.policy import Decision, Reuse
from fdcompile.runtime.run import Run

_dist: Any = cast(Any, torch.distributed)


class Ranks:
    """Those of a process group, each of which makes the same calls, or this process alone.

    Attributes:
        count: how many they are.

    Args:
        process_group: of ``torch.distributed``; None for this process alone.
        settings: what must be the same on all ranks, apart from what they are called with.
    """

    def __init__(self, process_group: Any, settings: object = None) -> None:
        self._settings = settings
        self._group = process_group
        self.count: int = 1 if process_group is None else _dist.get_world_size(process_group)
        self._rank: int = 0 if process_group is None else _dist.get_rank(process_group)

    def agree(self, run: Run | None, call: UNetCall, position: Position | None, decision: Decision) -> None:
        """Makes sure that all ranks do the same at this call: ranks that have drifted apart may not share a group.

        The contents of the call are compared wherever features of the group do not answer it. Waits for the device.

        Raises:
            RuntimeError: the ranks differ, or one of them did not take part in time.
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
        """The steps out of `first` to `stop` - 1 that this rank decodes, at most `most`, and where all ranks end.

        A rank for which none is left decodes the last one, as another does.
        """
        each = min(-(-(stop - first) // self.count), most)
        end = min(stop, first + each * self.count)
        begin = min(first + self._rank * each, end - 1)
        return slice(begin, min(begin + each, end)), end

    def gather(self, mine: Tensor, first: int, end: int) -> Tensor:
        """Predictions of steps `first` to `end` - 1, of which this rank has `mine`: shape ``[steps, batch, ...]``.

        Raises:
            RuntimeError: a rank did not take part in time.
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
            self._fail(error)
        return gathered

    def _fail(self, error: RuntimeError) -> NoReturn:
        raise RuntimeError(
            f"rank {self._rank} of {self.count} waited for the others in vain: one of them has died, was interrupted, "
            f"or runs another call ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error

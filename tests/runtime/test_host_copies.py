"""Values of small tensors on the host."""

from __future__ import annotations

import pytest
import torch
from device_reads import count_device_reads
from torch import Tensor

from fdcompile.capture.guards import TensorGuard
from fdcompile.runtime.host_copies import HostCopies

TENSORS = [
    torch.tensor([981, 1, 16_777_215]),
    torch.tensor([0.1, 14.6], dtype=torch.float16),
    torch.tensor([[0.1], [0.2]]),
    torch.tensor(7.5),
]


@pytest.mark.parametrize("tensors", [TENSORS[:1], TENSORS, [*TENSORS, torch.tensor([0.1], dtype=torch.float64)]])
def test_tensors_of_any_type_and_shape_are_read_together_and_exactly(
    tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorGuard, "compares_content", staticmethod(Tensor.is_inference))
    copies = HostCopies()
    with count_device_reads() as counted:
        copies.read(*tensors)
        values = [copies.values(tensor) for tensor in tensors]
    assert len(counted.reads) == 1
    assert values == [tensor.flatten().tolist() for tensor in tensors]


def test_what_was_written_to_is_read_again() -> None:
    one, other = torch.ones(2), torch.zeros(2)
    copies = HostCopies()
    copies.read(one, other)
    one.mul_(2)
    other.data.add_(1)
    assert (copies.values(one), copies.values(other)) == ([2.0, 2.0], [1.0, 1.0])
    assert copies.values(torch.ones(2)) == [1.0, 1.0]

"""The checksum of tensors, as on a CPU and as on a device, in one chunk and in several."""

from __future__ import annotations

import pytest
import torch

from fdcompile.capture.guards import checksum, checksum_of


@pytest.fixture(params=[(True, checksum._CHUNK), (False, checksum._CHUNK), (False, 8)], ids=["CPU", "device", "chunks"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host, chunk = request.param
    monkeypatch.setattr(checksum, "_is_on_host", lambda tensor: on_host)
    monkeypatch.setattr(checksum, "_CHUNK", chunk)


@pytest.mark.usefixtures("place")
def test_a_write_to_any_element_is_noticed() -> None:
    weights = [torch.randn(3, 5), torch.randn(7).half(), torch.randn(()), torch.zeros(0), torch.randn(20)]
    weights.append(torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last))
    before = checksum_of(weights)
    for weight in weights:
        for index in range(weight.numel()):
            element = weight[tuple(map(int, torch.unravel_index(torch.tensor(index), weight.shape)))]
            old = element.clone()
            element.neg_()
            assert checksum_of(weights) != before
            element.copy_(old)
    assert checksum_of(weights) == before


@pytest.mark.usefixtures("place")
def test_the_order_counts() -> None:
    one, other = torch.randn(4), torch.randn(4)
    assert checksum_of([one, other]) != checksum_of([other, one])

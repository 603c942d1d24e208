"""When does conditioning count as changed?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device_reads import count_device_reads

from fdcompile.capture.guards import TensorGuard
from fdcompile.runtime.conditioning import Conditioning


def test_same_objects_are_the_same() -> None:
    text, mask = torch.randn(2, 3), torch.ones(2)
    assert Conditioning((text, mask)).same_as((text, mask))


def test_nothing_seen_differs_from_everything() -> None:
    assert not Conditioning().same_as(())
    assert not Conditioning().same_as((torch.ones(1),))


def test_equal_values_in_new_objects_are_the_same_also_next_time() -> None:
    text = torch.randn(2, 3)
    conditioning = Conditioning((text,))
    copy = text.clone()
    assert conditioning.same_as((copy,))
    assert conditioning.same_as((copy,))
    copy += 1
    assert not conditioning.same_as((copy,))


def test_other_values_shapes_and_dtypes_differ() -> None:
    text = torch.ones(2, 3)
    conditioning = Conditioning((text,))
    for other in (torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2, 3, dtype=torch.float64)):
        assert not conditioning.same_as((other,))


def test_a_write_in_place_is_a_change_also_through_a_new_object() -> None:
    text = torch.ones(2, 3)
    conditioning = Conditioning((text,))
    before = text.clone()
    text.mul_(2)
    assert not conditioning.same_as((text,))
    assert not conditioning.same_as((before,))


@pytest.mark.parametrize("view", [lambda text: text[1], lambda text: text.chunk(2)[1], torch.Tensor.detach])
def test_the_same_view_taken_anew_is_the_same_unread(
    view: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorGuard, "compares_content", staticmethod(torch.Tensor.is_inference))
    text = torch.ones(2, 3)
    conditioning = Conditioning((view(text),))
    with count_device_reads() as counted:
        assert conditioning.same_as((view(text),))
        assert conditioning.same_as((view(text),))
    assert not counted.reads
    text[1].mul_(2)
    assert not conditioning.same_as((view(text),))


def test_another_view_of_the_same_memory_differs() -> None:
    text = torch.arange(6.0).view(2, 3)
    conditioning = Conditioning((text[0],))
    for other in (text[1], text[:, 0], text[0].view(torch.int32), text[0].flip(0)):
        assert not conditioning.same_as((other,))


def test_inference_tensors_are_compared_by_value() -> None:
    with torch.inference_mode():
        text = torch.ones(2, 3)
        conditioning = Conditioning((text,))
        assert conditioning.same_as((text,))
        text.mul_(2)
        assert not conditioning.same_as((text,))


def _through_data(text: torch.Tensor) -> None:
    text.data.mul_(2)


def _another_storage(text: torch.Tensor) -> None:
    text.data = text * 2


def _through_numpy(text: torch.Tensor) -> None:
    text.numpy()[0] = 2


def _swapped(text: torch.Tensor) -> None:
    torch.utils.swap_tensors(text, text * 2)


def _through_a_slice_of_data(text: torch.Tensor) -> None:
    text.data[0, 1] = 7


def _storage_set(text: torch.Tensor) -> None:
    with torch.no_grad():
        text.set_(text * 2)


WRITES = [_through_data, _another_storage, _through_numpy, _swapped, _through_a_slice_of_data, _storage_set]


@pytest.mark.parametrize("width", [3, 4], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_no_counter_sees_is_a_change(write: Callable[[torch.Tensor], None], width: int) -> None:
    text, mask = torch.ones(2, width), torch.ones(2)
    conditioning = Conditioning((text, mask))
    assert conditioning.same_as((text, mask))
    write(text)
    assert not conditioning.same_as((text, mask))
    assert Conditioning((text, mask)).same_as((text, mask))


def test_what_is_no_number_does_not_change_by_itself() -> None:
    text = torch.full((2, 4), torch.nan)
    assert Conditioning((text,)).same_as((text,))

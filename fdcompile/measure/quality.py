"""Picture quality: closeness to reference pictures, and metrics of pretrained networks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdcompile.measure.fidelity import CLOSEST
from fdcompile.measure.metrics import Pictures, psnr, ssim

_TRIAL = (3, 32, 32)
"""A picture that shows how many features there are; networks for large ones enlarge it."""

_CHECKER_DISTANCE = "Fréchet distance (checker)"

CLIP_SCALE = 2.5
"""Of a cosine similarity, as in the definition of the CLIP score and in the paper's tables."""


@dataclass(frozen=True)
class Quality:
    """Quality of a variant's pictures; None where it was not measured.

    Attributes:
        frechet: distance of the distribution of their features from that of the references' (FID where those are
            Inception's).
        clip: CLIP score, ``2.5 * max(cos, 0)``, mean.
        psnr, ssim, lpips: to the picture of the stock pipeline with the same noise; median in dB, median, mean.
        read: share of the miniature's pictures in which its checker finds every attribute as asked.
    """

    frechet: float | None = None
    clip: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    read: float | None = None


@dataclass(frozen=True)
class Networks:
    """The networks that pictures are measured with.

    Attributes:
        device: where they run.
        features: of uint8 pictures ``[pictures, 3, height, width]`` makes ``[pictures, features]``.
        distance_name: of the Fréchet distance of these features.
        clip: a CLIP model and its processor.
        lpips: of float pictures in [0, 255] makes features whose squared distance is LPIPS.
        reads: whether the miniature's checker reads the pictures.
        missing: a sentence for each measure that is left out.
    """

    device: torch.device
    features: nn.Module | None = None
    distance_name: str = "FID"
    clip: tuple[Any, Any] | None = None
    lpips: nn.Module | None = None
    reads: bool = False
    missing: tuple[str, ...] = ()


def load_networks(
    inception: Path | None, clip: Path | None, lpips: Path | None, device: torch.device, is_miniature: bool
) -> Networks:
    """Loads networks from local files.

    Args:
        inception: TorchScript of the Inception network of FID, such as ``inception-2015-12-05.pt``, which is called
            with uint8 pictures of any size and ``return_features=True``.
        clip: folder of a CLIP model and its processor, as transformers saves them.
        lpips: TorchScript of a network, such as ``vgg16.pt`` of the same source, which is called with float pictures
            in [0, 255], ``resize_images=False`` and ``return_lpips=True``.
        device: where they run.
        is_miniature: whether the pictures are the miniature's, whose checker reads them and has features.

    Raises:
        ValueError, OSError: a file is not what it should be.
        ModuleNotFoundError: torchmetrics is not installed.
    """
    missing = []
    features: nn.Module | None = None
    name = _CHECKER_DISTANCE if is_miniature and inception is None else "FID"
    has_torchmetrics = find_spec("torchmetrics") is not None
    if not has_torchmetrics and (inception or clip):
        raise ModuleNotFoundError("FID and CLIP score are torchmetrics', which is missing: pip install torchmetrics")
    if inception is not None:
        features = _Features(partial(_scripted(inception, "Inception", device), return_features=True))
    elif is_miniature and has_torchmetrics:
        from fdcompile.miniature.checker import load_checker, normalize

        layers = load_checker().layers[:-1]
        features = _Features(lambda pictures: layers(normalize(pictures.cpu())).to(pictures.device))
    elif is_miniature:
        missing.append(f"{name}: torchmetrics is not installed")
    else:
        missing.append("FID: no Inception weights (--inception)")
    if clip is None:
        missing.append("CLIP score: no CLIP model (--clip)")
    if lpips is None:
        missing.append("LPIPS: no network for it (--lpips)")
    return Networks(
        device=device,
        features=features,
        distance_name=name,
        clip=None if clip is None else _clip(clip, device),
        lpips=None if lpips is None else _scripted(lpips, "LPIPS", device),
        reads=is_miniature,
        missing=tuple(missing),
    )


def _scripted(path: Path, what: str, device: torch.device) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # such weights are in no other format
            module: nn.Module = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"{path}: expected TorchScript of the {what} network: {str(error).splitlines()[0]}") from error
    return module.eval()


class _Features(nn.Module):
    """Features of pictures as a module, which torchmetrics expects."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self._of = of

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self._of(pictures)
        return features


def _clip(folder: Path, device: torch.device) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
    processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    return _Embedding(model.eval().to(device)), partial(processor, truncation=True)


class _Embedding:
    """A CLIP model whose features are tensors, which torchmetrics expects, whatever transformers returns."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = model.config

    def to(self, device: Any) -> _Embedding:
        self._model.to(device)
        return self

    def eval(self) -> _Embedding:
        return self

    def get_image_features(self, *args: Any) -> Tensor:
        return _tensor(self._model.get_image_features(*args))

    def get_text_features(self, *args: Any) -> Tensor:
        return _tensor(self._model.get_text_features(*args))


def _tensor(features: Any) -> Tensor:
    tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return tensor


class Evaluator:
    """Takes pictures batch by batch, and keeps sums and a few numbers for each.

    Args:
        networks: what they are measured with.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._device = networks.device
        self._compared = 0
        self._measured: dict[str, list[float]] = {}
        self._frechet: Any = None
        self._clip: Any = None
        if networks.features is not None:
            from torchmetrics.image.fid import FrechetInceptionDistance

            options: dict[str, Any] = {"reset_real_features": False, "input_img_size": _TRIAL}
            self._frechet = FrechetInceptionDistance(networks.features, **options).to(self._device)
        if networks.clip is not None:
            from torchmetrics.multimodal.clip_score import CLIPScore

            clip: Any = networks.clip
            self._clip = CLIPScore(lambda: clip).to(self._device)

    def show_real(self, pictures: Pictures) -> None:
        """Adds reference pictures of the Fréchet distance, uint8 ``[pictures, height, width, 3]``."""
        if self._frechet is not None:
            self._frechet.update(_tensors(pictures, self._device), real=True)

    @torch.no_grad()
    def show(self, pictures: Pictures, texts: Sequence[str], references: Pictures | None) -> None:
        """Adds pictures, uint8 ``[pictures, height, width, 3]``, with their prompts and reference pictures."""
        self._compared += len(pictures)
        tensors = _tensors(pictures, self._device)
        if self._frechet is not None:
            self._frechet.update(tensors, real=False)
        if self._clip is not None:
            self._clip.update(list(tensors), list(texts))
        if self._networks.reads:
            from fdcompile.miniature.checker import read_scenes

            self._note("read", [seen.caption == text for seen, text in zip(read_scenes(pictures), texts, strict=True)])
        if references is None:
            return
        self._note("psnr", psnr(pictures, references).clip(max=CLOSEST))
        self._note("ssim", ssim(pictures, references))
        if (lpips := self._networks.lpips) is not None:
            others = _tensors(references, self._device)
            one, other = (lpips(both.float(), resize_images=False, return_lpips=True) for both in (tensors, others))
            self._note("lpips", (one - other).square().sum(1).tolist())

    def verdict(self) -> Quality:
        """The quality of all pictures so far, which are then dropped; reference features are kept."""
        figures = {name: float(np.mean(values)) for name, values in self._measured.items()}
        figures |= {name: float(np.median(self._measured[name])) for name in ("psnr", "ssim") if name in figures}
        if self._frechet is not None and self._compared > 1:
            figures["frechet"] = float(self._frechet.compute())
        if self._clip is not None and self._compared:
            figures["clip"] = CLIP_SCALE * float(self._clip.compute()) / 100
        for metric in (self._frechet, self._clip):
            if metric is not None:
                metric.reset()
        self._measured, self._compared = {}, 0
        return Quality(**figures)

    def _note(self, name: str, values: Iterable[float]) -> None:
        self._measured.setdefault(name, []).extend(map(float, values))


def _tensors(pictures: Pictures, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(device)

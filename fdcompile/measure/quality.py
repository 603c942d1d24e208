"""Image quality: closeness to reference images, and metrics with pretrained networks."""

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
from fdcompile.measure.metrics import Images, psnr, ssim

_TRIAL = (3, 32, 32)
"""Shape of the image with which torchmetrics finds the number of features; Inception resizes it."""

CLIP_SCALE = 2.5
"""Factor of the cosine similarity in the definition of the CLIP score and in the paper's tables."""


@dataclass(frozen=True)
class Quality:
    """Quality of a variant's images; None for metrics that were not measured.

    Attributes:
        frechet: Fréchet distance between the features of the images and of the references; FID with features of
            Inception.
        clip: mean CLIP score, ``2.5 * max(cos, 0)``.
        psnr: median PSNR in dB to the stock image with the same noise.
        ssim: median SSIM to the stock image with the same noise.
        lpips: mean LPIPS to the stock image with the same noise.
        read: share of the miniature's images in which its checker finds every attribute of the prompt.
    """

    frechet: float | None = None
    clip: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    read: float | None = None


@dataclass(frozen=True)
class Networks:
    """Networks for the metrics.

    Attributes:
        device: device of the networks.
        features: module from uint8 images ``[images, 3, height, width]`` to features ``[images, features]``.
        distance_name: name of the Fréchet distance of these features.
        clip: CLIP model and its processor.
        lpips: module from float images in [0, 255] to features whose squared distance is LPIPS.
        reads: whether the miniature's checker reads the images.
        missing: one sentence for each metric that is left out.
    """

    device: torch.device
    features: nn.Module | None = None
    distance_name: str = "FID"
    clip: tuple[Any, Any] | None = None
    lpips: nn.Module | None = None
    reads: bool = False
    missing: tuple[str, ...] = ()


def load_networks(
    inception: Path | None, clip: Path | None, lpips: Path | None, device: torch.device, reads: bool
) -> Networks:
    """Loads networks from local files.

    Args:
        inception: TorchScript of FID's Inception network, such as ``inception-2015-12-05.pt``. It is called with uint8
            images of any size and ``return_features=True``.
        clip: folder with a CLIP model and its processor, as saved by transformers.
        lpips: TorchScript of a network such as ``vgg16.pt`` from the same source. It is called with float images in
            [0, 255], ``resize_images=False`` and ``return_lpips=True``.
        device: device of the networks.
        reads: whether the miniature's checker reads the images, and provides features.

    Raises:
        ValueError, OSError: a file cannot be read or has another format.
        ModuleNotFoundError: torchmetrics is not installed.
    """
    missing = []
    features: nn.Module | None = None
    name = "Fréchet distance (checker)" if reads and inception is None else "FID"
    has_torchmetrics = find_spec("torchmetrics") is not None
    if not has_torchmetrics and (inception or clip):
        raise ModuleNotFoundError(
            "FID and CLIP score need torchmetrics, which is not installed: pip install torchmetrics"
        )
    if inception is not None:
        features = _Features(partial(_scripted(inception, "Inception", device), return_features=True))
    elif reads and has_torchmetrics:
        from fdcompile.miniature.checker import load_checker, normalize

        layers = load_checker().layers[:-1]
        features = _Features(lambda images: layers(normalize(images.cpu())).to(images.device))
    elif reads:
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
        reads=reads,
        missing=tuple(missing),
    )


def _scripted(path: Path, what: str, device: torch.device) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # such weights come in no other format
            module: nn.Module = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"{path}: expected TorchScript of the {what} network: {str(error).splitlines()[0]}") from error
    return module.eval()


class _Features(nn.Module):
    """Features of images as a module, which torchmetrics expects."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self._of = of

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self._of(images)
        return features


def _clip(folder: Path, device: torch.device) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder}: expected a CLIP model, as saved by transformers: {error}") from error
    for name in ("get_image_features", "get_text_features"):
        setattr(model, name, _as_tensor(getattr(model, name)))
    return model.eval().to(device), partial(processor, truncation=True)


def _as_tensor(features_of: Any) -> Any:
    """Lets CLIP's features be tensors in all versions of transformers, as torchmetrics expects."""

    def tensor(*args: Any) -> Any:
        features = features_of(*args)
        return features if isinstance(features, Tensor) else features.pooler_output

    return tensor


class Evaluator:
    """Measures images in batches. Memory holds sums of features and a few numbers for each image.

    Args:
        networks: networks for the metrics.
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

    def update_real(self, images: Images) -> None:
        """Adds reference images of the Fréchet distance, uint8 ``[images, height, width, 3]``."""
        if self._frechet is not None:
            self._frechet.update(_tensors(images, self._device), real=True)

    @torch.no_grad()
    def update(self, images: Images, texts: Sequence[str], references: Images | None) -> None:
        """Adds images, uint8 ``[images, height, width, 3]``, with their prompts and reference images."""
        self._compared += len(images)
        tensors = _tensors(images, self._device)
        if self._frechet is not None:
            self._frechet.update(tensors, real=False)
        if self._clip is not None:
            self._clip.update(list(tensors), list(texts))
        if self._networks.reads:
            from fdcompile.miniature.checker import read_scenes

            self._note("read", [seen.caption == text for seen, text in zip(read_scenes(images), texts, strict=True)])
        if references is None:
            return
        self._note("psnr", psnr(images, references).clip(max=CLOSEST))
        self._note("ssim", ssim(images, references))
        if (lpips := self._networks.lpips) is not None:
            others = _tensors(references, self._device)
            one, other = (lpips(both.float(), resize_images=False, return_lpips=True) for both in (tensors, others))
            self._note("lpips", (one - other).square().sum(1).tolist())

    def compute(self) -> Quality:
        """Returns the quality of all images so far and resets the evaluator; the features of references are kept."""
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


def _tensors(images: Images, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)

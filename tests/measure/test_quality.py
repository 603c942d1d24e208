"""What networks make of images, with small random ones beside closed forms."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from cli.conftest import model as model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from fdcompile.measure import quality
from fdcompile.measure.quality import CLIP_SCALE, Evaluator, Quality, load_networks
from fdcompile.miniature.scenes import draw, evaluation_scenes

CPU = torch.device("cpu")
TEXTS = ["a red dot", "b", "cc dd", "e e e", "sun", "moon", "a sea", "an island that has more letters than fit"]


class Inception(nn.Module):
    """Called as the network of FID is: uint8 images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 5)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        small = nn.functional.adaptive_avg_pool2d(images.float() / 255, [4, 4])
        return self.layer(small.flatten(1)).tanh() if return_features else small


class Perceptual(nn.Module):
    """Called as the network of LPIPS is: float images in [0, 255]."""

    def forward(self, images: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        assert return_lpips and not resize_images
        return (images[:, :, ::2] / 255).flatten(1)


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)  # type: ignore[no-untyped-call]
    return path


def random_images(seed: int, size: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (8, size, size, 3), np.uint8)


def test_the_frechet_distance_is_that_of_two_gaussians(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Inception()
    networks = load_networks(scripted(network, tmp_path / "inception.pt"), None, None, CPU, reads=False)
    assert networks.distance_name == "FID"
    evaluator = Evaluator(networks)
    real, made = random_images(0, size=24), random_images(1)
    for batch in (real[:3], real[3:]):
        evaluator.update_real(batch)
    for batch in (made[:5], made[5:]):
        evaluator.update(batch, TEXTS[: len(batch)], None)

    def gaussian(images: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            features = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), True).double().numpy()
        return features.mean(0), np.cov(features, rowvar=False)

    (mean, covariance), (other_mean, other_covariance) = gaussian(real), gaussian(made)
    root = scipy.linalg.sqrtm(covariance @ other_covariance).real
    expected = ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)
    assert evaluator.compute().frechet == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def clip(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = layers | {"image_size": 16, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_the_clip_score_is_a_scaled_cosine(clip: Path) -> None:
    evaluator = Evaluator(load_networks(None, clip, None, CPU, reads=False))
    images = random_images(0)
    for part in (slice(5), slice(5, None)):
        evaluator.update(images[part], TEXTS[part], None)
    network, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    given = processor(text=TEXTS, images=list(images), return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        output = network(**given)
    cosines = (output.text_embeds * output.image_embeds).sum(1)
    assert cosines.std() > 0.01
    assert evaluator.compute().clip == pytest.approx(CLIP_SCALE * max(cosines.mean().item(), 0), abs=1e-5)


def test_lpips_is_a_squared_distance(tmp_path: Path) -> None:
    evaluator = Evaluator(load_networks(None, None, scripted(Perceptual(), tmp_path / "vgg.pt"), CPU, reads=False))
    images, references = random_images(0), random_images(1)
    evaluator.update(images, TEXTS, references)
    expected = ((images[:, ::2] / 255.0 - references[:, ::2] / 255.0) ** 2).sum((1, 2, 3)).mean()
    quality = evaluator.compute()
    assert quality.lpips == pytest.approx(expected, rel=1e-5)
    assert quality.clip is quality.frechet is quality.read is None


def test_what_is_missing_is_said() -> None:
    networks = load_networks(None, None, None, CPU, reads=False)
    assert [why.partition(":")[0] for why in networks.missing] == ["FID", "CLIP score", "LPIPS"]
    evaluator = Evaluator(networks)
    same = random_images(0)
    evaluator.update(same, TEXTS, same)
    assert evaluator.compute() == Quality(psnr=100.0, ssim=1.0)


def test_the_miniature_has_its_checker() -> None:
    networks = load_networks(None, None, None, CPU, reads=True)
    assert networks.distance_name == "Fréchet distance (checker)"
    evaluator, rng = Evaluator(networks), np.random.default_rng(0)
    scenes = evaluation_scenes(8)
    for _ in range(2):
        evaluator.update_real(np.stack([draw(scene, rng) for scene in scenes]))
    images = np.stack([draw(scene, rng) for scene in scenes])
    evaluator.update(images, [scene.caption for scene in (*scenes[:7], scenes[0])], None)
    quality = evaluator.compute()
    assert quality.read == 7 / 8
    assert quality.frechet is not None
    assert quality.frechet > 0
    assert evaluator.compute() == Quality(), "it has forgotten them"
    evaluator.update(images, [scene.caption for scene in scenes], None)
    assert evaluator.compute() == replace(quality, read=1), "but not what they are held against"


def test_without_torchmetrics_its_measures_are_refused_or_left_out(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchmetrics"):
        load_networks(None, clip, None, CPU, reads=False)
    networks = load_networks(None, None, None, CPU, reads=True)
    assert networks.missing[0] == "Fréchet distance (checker): torchmetrics is not installed"
    evaluator = Evaluator(networks)
    evaluator.update(np.zeros((2, 32, 32, 3), np.uint8), ["a", "b"], None)
    assert evaluator.compute() == Quality(read=0)


def test_of_too_few_images_there_is_no_distance(clip: Path) -> None:
    evaluator = Evaluator(load_networks(None, clip, None, CPU, reads=True))
    assert evaluator.compute() == Quality()
    one = np.zeros((1, 32, 32, 3), np.uint8)
    evaluator.update_real(one)
    evaluator.update(one, ["a red circle on a blue background"], None)
    assert evaluator.compute() == Quality(clip=pytest.approx(1.25, abs=1.25), read=0)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights.pt: expected TorchScript of the Inception network"):
        load_networks(path, None, None, CPU, reads=False)
    with pytest.raises(ValueError, match=r"(?s)expected a CLIP model.*found in directory"):
        load_networks(None, tmp_path, None, CPU, reads=False)

"""Networks are used where they are, and never fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from distrifusion.quality import networks
from distrifusion.quality.networks import Clip, Fid, Lpips, Missing, Networks
from runtime.tiny import write_tokenizer


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A CLIP of the true class with random weights."""
    tokenizer = write_tokenizer(tmp_path / "words")
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**layer, **words, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id},
        vision_config={**layer, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_clip_scores_from_a_folder(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder))
    one, two = torch.rand(2, 1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    assert clip.add("a lake", one, one)["clip_loss"] == pytest.approx(0, abs=1e-4)
    loss = clip.add("a lake", one, two)["clip_loss"]
    assert loss == pytest.approx(-clip.add("a lake", two, one)["clip_loss"], abs=1e-4)
    assert 0.01 < abs(loss) < 200


def not_installed(name: str) -> None:
    raise ModuleNotFoundError(name)


def test_a_package_that_does_not_load_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError(f"operator {name}::nms does not exist")

    monkeypatch.setattr(networks, "import_module", broken)
    with pytest.raises(Missing, match=r"torchvision is broken, reinstall it .*: operator torchvision::nms"):
        Lpips()


def test_what_is_missing_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(networks, "import_module", not_installed)
    found = Networks.found(clip=str(tmp_path / "no-clip"))
    assert found.found_here == [] and set(found.skipped) == {"lpips", "fid", "clip_loss"}
    assert "pip install 'distrifusion[metrics]'" in found.skipped["lpips"]
    assert "no-clip' is not in the local cache" in found.skipped["clip_loss"]
    picture = Image.new("RGB", (16, 16))
    assert found.add("a", picture, picture) == {} and found.together() == {}


@pytest.mark.parametrize(("network", "file"), [(Lpips, "alexnet"), (Fid, "weights-inception")])
def test_missing_weights_are_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, network: type, file: str
) -> None:
    monkeypatch.setattr(networks, "import_module", lambda name: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(Missing, match=rf"{file}.* belongs into {tmp_path}/checkpoints"):
        network()

"""Distances between two pictures of one size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from distrifusion.errors import ConfigError

Picture = Image.Image | np.ndarray

# The window of SSIM.
SSIM_PIXELS = 11
# Five scales, each half the one before, and SSIM's window of 11 on the coarsest.
MS_SSIM_PIXELS = 176


def psnr(picture: Picture, reference: Picture) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels; infinite for equal pictures.

    Args:
        picture: an RGB image, or an array [H, W, 3] of uint8 in 0..255 or of float in 0..1.
        reference: likewise, of the same size.

    Raises:
        ConfigError: if sizes differ or an array is of another form.
    """
    first, second = _pair(picture, reference)
    return float(peak_signal_noise_ratio(first, second, data_range=1.0))


def ssim(picture: Picture, reference: Picture) -> float:
    """Structural similarity in -1..1, 1 for equal pictures (Wang et al. 2004: Gaussian window of 11, sigma 1.5).

    Args and errors as for `psnr`; pictures below `SSIM_PIXELS` in height or width are an error too.
    """
    first, second = _pair(picture, reference)
    if min(first.shape[-2:]) < SSIM_PIXELS:
        height, width = first.shape[-2:]
        raise ConfigError(f"a picture of {width}x{height} is smaller than the 11x11 window of SSIM")
    value = structural_similarity_index_measure(first, second, data_range=1.0)
    assert isinstance(value, torch.Tensor)
    return float(value)


def ms_ssim(picture: Picture, reference: Picture) -> float:
    """Structural similarity over five scales in 0..1, 1 for equal pictures (Wang, Simoncelli, Bovik 2003).

    Args and errors as for `psnr`; pictures below `MS_SSIM_PIXELS` in height or width are an error too.
    """
    first, second = _pair(picture, reference)
    height, width = first.shape[-2:]
    if min(height, width) < MS_SSIM_PIXELS:
        raise ConfigError(f"a picture of {width}x{height} is below the {MS_SSIM_PIXELS} pixels that MS-SSIM needs")
    return float(multiscale_structural_similarity_index_measure(first, second, data_range=1.0, normalize="relu"))


def pixels(picture: Picture) -> np.ndarray:
    """The picture as float64 [H, W, 3] in 0..1.

    Raises:
        ConfigError: if an array is of another form.
    """
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if picture.ndim != 3 or picture.shape[-1] != 3:
        raise ConfigError(f"an array of shape {picture.shape} is no picture; it must be [H, W, 3]")
    if picture.dtype == np.uint8:
        return picture / 255.0
    if not np.issubdtype(picture.dtype, np.floating):
        raise ConfigError(f"an array of {picture.dtype} is no picture; it must be uint8 in 0..255 or float in 0..1")
    return picture.astype(np.float64)


def _pair(picture: Picture, reference: Picture) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = pixels(picture), pixels(reference)
    if first.shape != second.shape:
        (h, w, _), (rh, rw, _) = first.shape, second.shape
        raise ConfigError(f"pictures of {w}x{h} and {rw}x{rh} cannot be compared; draw both at one size")
    tensors = [torch.from_numpy(array).permute(2, 0, 1)[None] for array in (first, second)]
    return tensors[0], tensors[1]

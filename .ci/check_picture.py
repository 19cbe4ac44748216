"""Fails unless every file named is a picture of something: neither one colour nor noise."""

import sys

import numpy as np
from PIL import Image

for file in sys.argv[1:]:
    grey = np.asarray(Image.open(file).convert("L"), dtype=np.float64)
    spread = grey.std()
    likeness = np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1] if spread > 0 else 0.0
    print(f"{file}: {grey.shape[1]}x{grey.shape[0]}, spread {spread:.1f}, neighbours correlate {likeness:.3f}")
    if spread < 10:
        raise SystemExit(f"{file}: nearly one colour (spread {spread:.1f}, at least 10 expected)")
    if likeness < 0.7:
        raise SystemExit(f"{file}: noise (neighbours correlate {likeness:.3f}, at least 0.7 expected)")

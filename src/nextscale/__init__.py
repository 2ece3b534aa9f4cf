"""nextscale: visual autoregressive generation as one vocabulary of parts.

Shape letters, used as suffixes of tensor names (`tokens_BL`, `canvas_BCHW`): B pictures, L rows (positions),
C width, V vocabulary, H and W latent height and width, K steps, D condition width, R branches x pictures.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]

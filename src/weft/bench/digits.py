"""scikit-learn's 1,797 digits of 8 x 8 pixels, as they come: the benches scale, shuffle and share them out themselves.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (its test set).
"""

from __future__ import annotations

import numpy as np

__all__ = ["digit_images"]


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Images float64 (1797, 64) of whole numbers 0 to 16, row by row, and labels int64 (1797,).

    Raises:
        ModuleNotFoundError: scikit-learn, which carries the images, is not installed; names the extra.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'weft[bench]'") from error
    images, labels = load_digits(return_X_y=True)
    return images, labels

"""The half table Q of noise version 1: 32,768 positive normal quantiles, shipped as a file.

    Q[k] = Φ⁻¹(0.5 + (k + 0.5) / 65536) / rms,   k = 0 … 32767,   rms = √(mean of the squared quantiles)

The file, and not the formula, is what a published seed relies on; `python -m randopt.noise.quantiles PATH`
makes it again. Every C library should give the same bytes: the closest any quantile comes to a tie between
two float32 values is 5,768 units in the last place of a float64.
"""

import hashlib
import math
import struct
import sys
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from randopt.errors import UserError

if TYPE_CHECKING:
    import numpy as np

SIZE = 32_768
PATH = Path(__file__).with_name("quantiles-v1.f32")
SHA256 = "e230179c3827e615b4f063e99741aa697a3a8925635cf89f6dddf2f8182450ef"


def compute() -> bytes:
    """The content of the shipped file: SIZE little-endian float32.

    Quantiles, their root mean square and the division are float64; each value is rounded to float32 once.
    Dividing by the root mean square gives ±Q the variance 1, which the 65,536 equally likely values would
    otherwise miss by 2e-5 (after rounding to float32, 6e-10 is left).
    """
    values = [NormalDist().inv_cdf(0.5 + (k + 0.5) / 65536) for k in range(SIZE)]
    rms = math.sqrt(math.fsum(v * v for v in values) / SIZE)
    return struct.pack(f"<{SIZE}f", *(v / rms for v in values))


def load(path: Path = PATH) -> "np.ndarray":
    """Read and verify a quantile file.

    Returns Q: (SIZE,) float32, read-only, increasing. Raises UserError if the file is missing or is not,
    byte for byte, the one of noise version 1.
    """
    import numpy as np

    remedy = "Install the package again: another table would give every published seed other weights."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The quantile table {path} cannot be read ({error.strerror}). {remedy}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise UserError(
            f"The quantile table {path} is damaged: {len(content)} bytes with SHA-256 {digest}; "
            f"expected {4 * SIZE} bytes with SHA-256 {SHA256}. {remedy}"
        )
    return np.frombuffer(content, dtype="<f4")


@lru_cache(maxsize=1)
def table() -> "np.ndarray":
    """The shipped Q, read and verified once per process: (SIZE,) float32, read-only."""
    return load()


@lru_cache(maxsize=1)  # a perturbation is applied to one tensor after another
def scaled(coefficients: bytes) -> "np.ndarray":
    """float32(coefficient · Q) per term: (terms, SIZE) uint32, bit patterns of float32, 128 KiB each.

    coefficients: the float64 values as bytes, because 0.0 and -0.0 are equal as numbers but not as tables.
    The product is float64 and rounded to float32 once.
    """
    import numpy as np

    q = table().astype(np.float64)
    factors = np.frombuffer(coefficients, dtype=np.float64)
    tables = np.empty((factors.size, q.size), dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):
        for row, factor in zip(tables, factors, strict=True):
            row[:] = factor * q
    return tables.view(np.uint32)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(compute())

"""Cost of coding an example's tokens: a product with a matrix, compared with the rotation that it replaces.

    python benchmarks/coding_speed.py

45 vectors, 64 bits each, at several widths; the median of rounds in which both take turns, and their ratio with its spread.
"""

import statistics
import time

import numpy as np
from wherefrom.store import bits
from wherefrom.store.bits import rotate

_ROUNDS, _TOKENS, _BITS = 15, 45, 64


def main():
    """Measure and print."""
    generator = np.random.default_rng(0)
    for width in (256, 768, 2048, 4096, 8192):
        vectors = generator.normal(size=(_TOKENS, width)).astype(np.float32)
        ratios = []
        for number in range(_ROUNDS + 1):
            seconds = []
            for most in (256, 0):
                bits._MATRIX_BITS = most  # 0: the whole rotation
                started = time.perf_counter()
                rotate(vectors, _BITS, 0)
                seconds.append(time.perf_counter() - started)
            ratios += [seconds[1] / seconds[0]] if number else []
        print(f"width {width}: the rotation takes {statistics.median(ratios):.0f} times ({min(ratios):.0f} to {max(ratios):.0f}) as long")


if __name__ == "__main__":
    main()

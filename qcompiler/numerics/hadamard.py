"""Hadamard matrices, and the random orthogonal matrices that are made of them.

Sylvester's doubling gives every power of two, Paley's constructions from quadratic residues orders such as 12, 20, 28
and 36 (R. Paley 1933, "On orthogonal matrices"); the Kronecker product of two Hadamard matrices is one.
"""

from __future__ import annotations

import numpy as np


def hadamard(n: int) -> np.ndarray | None:
    """A Hadamard matrix H of order n: entries of +-1, H H^T = n I.

    Returns:
      `float64[n, n]`, or None where n is no power of two times an order that Paley's constructions give for a prime.

    Raises:
      ValueError: n is less than 1.
    """
    if n < 1:
        raise ValueError(f"a matrix has an order of at least 1, got {n}")
    if n == 1:
        return np.ones((1, 1))
    core = _paley(n)
    if core is not None:
        return core
    half = hadamard(n // 2) if n % 2 == 0 else None
    return None if half is None else np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)


def randomized(n: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """A random orthogonal matrix Q = diag(s) H / sqrt(n) with random signs s, whose entries are all of one magnitude.

    A row times Q spreads each of its elements evenly over all (Ashkboos et al. 2024, "QuaRot", arXiv:2404.00456,
    section 3). Where no Hadamard matrix of order n is known here, H / sqrt(n) is the Kronecker product of that of the
    largest power of two in n and a random orthogonal matrix for the rest, and magnitudes differ.

    Returns:
      `float64[n, n]`, the same for the same n and seed; and what it is made of: `hadamard`,
      `hadamard 4 x random 7`, or `random 7`.

    Raises:
      ValueError: n is less than 1.
    """
    rng = np.random.default_rng([seed, n])
    matrix, made = hadamard(n), "hadamard"
    if matrix is None:
        power = n & -n
        rest, upper = np.linalg.qr(rng.standard_normal((n // power, n // power)))
        # With the signs of the diagonal taken out, Q of a QR decomposition is uniform (Mezzadri 2007).
        rest = rest * np.sign(np.diag(upper))
        matrix = np.kron(hadamard(power), rest) * np.sqrt(n // power)
        made = f"hadamard {power} x random {n // power}" if power > 1 else f"random {n}"
    signs = rng.choice([-1.0, 1.0], n)
    return signs[:, None] * matrix / np.sqrt(n), made


def _paley(n: int) -> np.ndarray | None:
    """Order p + 1 for a prime p = 3 mod 4 (Paley's first construction), or 2 (p + 1) for p = 1 mod 4 (his second)."""
    if n % 4 == 0 and _is_prime(n - 1):
        core = _jacobsthal(n - 1)
        bordered = np.block([[np.zeros((1, 1)), np.ones((1, n - 1))], [-np.ones((n - 1, 1)), core]])
        return np.eye(n) + bordered
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        prime = n // 2 - 1
        conference = np.block([[np.zeros((1, 1)), np.ones((1, prime))], [np.ones((prime, 1)), _jacobsthal(prime)]])
        return np.kron(conference, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(prime + 1), [[1.0, -1.0], [-1.0, -1.0]])
    return None


def _jacobsthal(prime: int) -> np.ndarray:
    """Q[i, j] = the Legendre symbol of i - j: 1 for squares modulo the prime, -1 for others, 0 for 0."""
    symbol = np.full(prime, -1.0)
    symbol[np.square(np.arange(prime)) % prime] = 1.0
    symbol[0] = 0.0
    return symbol[(np.arange(prime)[:, None] - np.arange(prime)) % prime]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(np.sqrt(n)) + 1))

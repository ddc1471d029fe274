"""Orthogonal matrices that spread one channel over all: Hadamard matrices of any size that has a construction.

A Hadamard matrix of order n has entries +1 and -1 and orthogonal rows; divided by sqrt(n) it is a rotation that turns a
single large channel into n equally large ones. Sylvester's doubling gives the powers of two, Paley's two constructions
(over the integers modulo a prime) most other orders that models have: 12, 20, 28, 36, 60, 284, ...
"""

from __future__ import annotations

import torch
from torch import Tensor


def randomized_hadamard(size: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix `diag(signs) H / sqrt(size)` with seeded random signs (QuaRot, arXiv 2404.00456, section 3).

    Where no Hadamard matrix of this size can be constructed, H is the Kronecker product of one for the power of two in
    `size` and a seeded random orthogonal matrix for the rest; then entries differ in size within blocks of the rest.

    Returns:
        float64 on the CPU, shape (size, size), the same for every device.

    """
    assert size >= 1
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    matrix = hadamard(size)
    if matrix is not None:
        return signs[:, None] * matrix / size**0.5
    power = size & -size
    doubled = hadamard(power)
    assert doubled is not None
    return signs[:, None] * torch.kron(doubled / power**0.5, _random_orthogonal(size // power, generator))


class HadamardTransform:
    """Multiplies the last dimension, whatever its size, with `randomized_hadamard` of that size and seed 0."""

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, values: Tensor) -> Tensor:
        """`values`: (..., size) -> the same shape and dtype; multiplied in float32, or in float64 if they are."""
        size, device, dtype = values.shape[-1], values.device, torch.promote_types(values.dtype, torch.float32)
        if (size, device, dtype) not in self._matrices:  # made in float64, which not every device has
            self._matrices[size, device, dtype] = randomized_hadamard(size).to(dtype).to(device)
        return (values.to(dtype) @ self._matrices[size, device, dtype]).to(values.dtype)


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix of order `size`, float64, or None where neither Sylvester nor Paley constructs one."""
    doublings, core = 0, _paley(size)
    while core is None:  # the fewest doublings of the largest core
        if size % 2:
            return None
        size //= 2
        doublings += 1
        core = _paley(size)
    for _ in range(doublings):
        core = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), core)
    return core


def _paley(size: int) -> Tensor | None:
    """Paley's Hadamard matrix of an order that is p + 1 (p = 3 mod 4) or 2 (p + 1) (p = 1 mod 4) for a prime p.

    The orders that are powers of two are left to Sylvester's doubling of the matrix of order 1.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size & (size - 1) == 0:
        return None
    if size % 4 == 0 and _is_prime(size - 1):
        order = size - 1  # 3 mod 4: the border is antisymmetric
        bordered = _bordered(order, -1.0)
        return bordered + torch.eye(size, dtype=torch.float64)
    order = size // 2 - 1
    if size % 4 == 0 and order % 4 == 1 and _is_prime(order):
        on, off = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
        return torch.kron(_bordered(order, 1.0), on) + torch.kron(torch.eye(order + 1, dtype=torch.float64), off)
    return None


def _bordered(prime: int, border: float) -> Tensor:
    """Jacobsthal's matrix, chi(i - j) for the quadratic character chi modulo `prime`, with a border of ones."""
    character = -torch.ones(prime, dtype=torch.float64)
    character[torch.arange(prime).square() % prime] = 1
    character[0] = 0
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, border
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * torch.diagonal(r).sign()).contiguous()  # without the signs the draw would not be uniform over rotations

"""Tensors on which formats are compared: ordinary ones, planted outliers, and edges."""

from __future__ import annotations

import torch
from torch import Tensor

from cushion.quantization.formats.floats import E2M1, E2M3, E3M2, E4M3, E5M2, Element

ELEMENTS = {"E4M3": E4M3, "E5M2": E5M2, "E2M3": E2M3, "E3M2": E3M2, "E2M1": E2M1}


def numbers(element: Element) -> Tensor:
    """All numbers of an element that are not negative, ascending, from what their bits mean; float32."""
    bias = 2 ** (element.exponent - 1) - 1
    found = []
    for exponent in range(2**element.exponent):
        for mantissa in range(2**element.mantissa):
            fraction = mantissa / 2**element.mantissa
            normal = (1 + fraction) * 2.0 ** (exponent - bias)
            value = normal if exponent else fraction * 2.0 ** (1 - bias)
            if value <= element.largest:
                found.append(value)
    return torch.tensor(found)


def edges(element: Element) -> Tensor:
    """Every number, what lies halfway between two of them, and their neighbours in float32, of both signs; (n,)."""
    grid = numbers(element)
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([element.largest * 1.01, 1e9, 1e-30, 1e-45])])
    near = [points, torch.nextafter(points, torch.tensor(torch.inf)), torch.nextafter(points, torch.tensor(0.0))]
    return torch.cat([*near, *(-one for one in near)])


def tensors(columns: int = 64) -> dict[str, Tensor]:
    """Float32 tensors, (rows, columns), by what they try."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(64, columns, generator=generator)
    planted = plain.clone()
    planted[3, 5], planted[7, 40] = 900.0, -2500.0
    rows = torch.logspace(-6, 6, 64)[:, None]
    zeros = plain.clone()
    zeros[:, : columns // 2] = 0
    maxima = torch.zeros(64, columns)  # what decides the shared exponent: magnitudes between two powers of two
    maxima[:, ::16] = (1 + torch.arange(64) / 64)[:, None] * 2.0 ** torch.arange(-8, 8).repeat(4)[:, None]
    maxima[:, 1::16] = maxima[:, ::16] * torch.rand(64, len(maxima[0, ::16]), generator=generator)
    return {"plain": plain, "planted": planted, "sizes": plain * rows, "zero blocks": zeros, "maxima": maxima}

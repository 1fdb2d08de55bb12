"""The generator of service/noise.py on a device: the same integers, normals equal to 1e-6, from the same few words per row.

Two forms of one function. `philox` and `box_muller` are plain int64 and float32 operations and run on any device. On CUDA
that would be a hundred small kernels, so there the whole of it is one element-wise kernel (`KERNEL`, compiled by NVRTC at
its first call): one thread makes one block of four normals.

Shapes: R rows, U uses, S samples, D elements, B blocks of four elements.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_LOW = 0xFFFFFFFF
_PI = 3.141592653589793

KERNEL = """
template <typename T> void elbow_normals(T seed, T word, T sample, T frame, T block, T& first, T& second) {
  unsigned int w0 = (unsigned int)block, w1 = (unsigned int)sample, w2 = (unsigned int)word, w3 = (unsigned int)frame;
  unsigned int k0 = (unsigned int)seed, k1 = (unsigned int)((unsigned long long)seed >> 32);
  for (int round = 0; round < 10; ++round) {
    unsigned long long p0 = 0xD2511F53ull * w0, p1 = 0xCD9E8D57ull * w2;
    w0 = (unsigned int)(p1 >> 32) ^ w1 ^ k0; w1 = (unsigned int)p1;
    w2 = (unsigned int)(p0 >> 32) ^ w3 ^ k1; w3 = (unsigned int)p0;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  union { float f[2]; unsigned long long bits; } a, b;
  float r = sqrtf(-2.0f * logf((float)w0 * 2.3283064365386963e-10f + 1.1641532182693481e-10f));
  float t = (float)(int)w1 * 1.4629180792671596e-09f;
  a.f[0] = r * cosf(t); a.f[1] = r * sinf(t);
  r = sqrtf(-2.0f * logf((float)w2 * 2.3283064365386963e-10f + 1.1641532182693481e-10f));
  t = (float)(int)w3 * 1.4629180792671596e-09f;
  b.f[0] = r * cosf(t); b.f[1] = r * sinf(t);
  first = (T)a.bits; second = (T)b.bits;
}
"""
"""Two normals travel in each 64-bit output: the compiler of such kernels wants one type throughout."""


def normals(seeds: Tensor, words: Tensor, first: Tensor, frames: Tensor, samples: int, size: int, antithetic: bool) -> Tensor:
    """`service.noise.Keys.draw` on a device: seeds, first, frames (R,) and words (R, U), all int64 -> (R, U, S, D) float32."""
    device = seeds.device
    drawn = _range(samples, 2 if antithetic else 1, device)
    blocks = _range((size + 3) // 4, 1, device)
    seed, frame = seeds[:, None, None, None], frames[:, None, None, None]
    sample = (first[:, None] + drawn)[:, None, :, None]
    word = words[:, :, None, None]
    if device.type == "cuda":
        pairs = torch.stack(_kernel()(seed, word, sample, frame, blocks), -1)
        noise = pairs.view(torch.float32)
    else:
        noise = box_muller(philox((blocks, sample, word, frame), (seed & _LOW, seed >> 32 & _LOW)))
    noise = noise.reshape(*noise.shape[:3], -1)[..., :size]
    if antithetic:
        noise = torch.stack([noise, -noise], 3).flatten(2, 3)[:, :, :samples]
    return noise


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on 32-bit words held in int64, broadcast against each other.

    A product of two words may pass 2⁶³ and wrap to a negative number; its bits are those of the unsigned product, and the
    masks below take the halves out of them.
    """
    w0, w1, w2, w3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = w0 * MULTIPLIERS[0], w2 * MULTIPLIERS[1]
        w0, w1, w2, w3 = (p1 >> 32 & _LOW) ^ w1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ w3 ^ k1, p0 & _LOW
        k0, k1 = k0 + WEYL[0] & _LOW, k1 + WEYL[1] & _LOW
    return w0, w1, w2, w3


def box_muller(block: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Four words -> four normals, along a new last axis."""
    normals: list[Tensor] = []
    for word, turn in (block[:2], block[2:]):
        radius = torch.sqrt(torch.log(word.to(torch.float32) * 2.0**-32 + 2.0**-33) * -2.0)
        angle = turn.to(torch.int32).to(torch.float32) * (_PI * 2.0**-31)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, -1)


@cache
def _range(end: int, step: int, device: torch.device) -> Tensor:
    """0, step, 2 step, … below `end`, made once: in a graph it would be a kernel of every replay."""
    return torch.arange(0, end, step, device=device)


@cache
def _kernel() -> Any:
    from torch.cuda.jiterator import _create_multi_output_jit_fn

    return _create_multi_output_jit_fn(KERNEL, 2)

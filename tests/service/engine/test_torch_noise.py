"""The generator on a device against the one on the host: the same integers, normals equal to 1e-6."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from service.noise import Keys, Purpose, normals, philox, words

torch = pytest.importorskip("torch")

from service.engine import torch_noise  # noqa: E402 (torch may be missing)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LIMIT = 1e-6


def keys(rows=40, uses=3, samples=4, size=33, antithetic=False, seed=0):
    rng = np.random.default_rng(seed)
    return Keys(
        seeds=rng.integers(0, 1 << 64, rows, np.uint64),
        words=words(rng.integers(0, 1 << 20, (rows, uses)), level=5, purpose=Purpose.DRAW),
        first=np.zeros(rows, np.int64) if antithetic else rng.integers(0, 1 << 20, rows),
        frames=rng.integers(0, 1 << 32, rows),
        samples=samples,
        size=size,
        shape=(uses, samples, size),
        antithetic=antithetic,
    )


def on_device(key, device):
    columns = (key.seeds.view(np.int64), key.words.view(np.int64), key.first, key.frames)
    drawn = torch_noise.normals(*(torch.from_numpy(c).to(device) for c in columns), key.samples, key.size, key.antithetic)
    return drawn.cpu().numpy()


def off(a, b):
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b))))


def test_the_integers_are_those_of_the_host():
    rng = np.random.default_rng(0)
    counters, key = rng.integers(0, 1 << 32, (5000, 4), np.uint32), rng.integers(0, 1 << 32, (5000, 2), np.uint32)
    wide = [torch.from_numpy(column.astype(np.int64)) for column in (*counters.T, *key.T)]
    drawn = torch_noise.philox(tuple(wide[:4]), tuple(wide[4:]))
    assert np.array_equal(torch.stack(drawn, 1).numpy(), philox(counters, key))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("uses", "samples", "size"), [(1, 2, 64), (3, 5, 33), (2, 1, 1)])
def test_normals_are_those_of_the_host(device, antithetic, uses, samples, size):
    key = keys(uses=uses, samples=samples, size=size, antithetic=antithetic)
    drawn = on_device(key, device)
    assert drawn.shape == (40, uses, samples, size)
    assert drawn.dtype == np.float32
    assert off(drawn, key.draw()) <= LIMIT


@pytest.mark.parametrize("antithetic", [False, True])
def test_keys_draw_what_normals_draws(antithetic):
    key = keys(uses=1, antithetic=antithetic)
    steps = (key.words[:, 0] & np.uint64(0xFFFFF)).astype(np.int64)
    first = 0 if antithetic else key.first
    expected = normals(
        key.seeds, steps, purpose=Purpose.DRAW, samples=(first, 4), size=33, level=5, frame=key.frames, antithetic=antithetic
    )
    assert np.array_equal(key.draw()[:, 0], expected)
    assert np.array_equal(key.part(slice(3, 9)).draw(), key.draw()[3:9])


def test_the_kernel_is_one_that_the_compiler_of_kernels_can_read():
    from torch.cuda.jiterator import _CodeParser

    parsed = _CodeParser(torch_noise.KERNEL)
    assert (parsed.function_name, parsed.return_type) == ("elbow_normals", "void")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_kernel_compiled_for_the_cpu_makes_the_numbers_of_the_host(tmp_path):
    """The very source that NVRTC compiles on a GPU, in a loop instead of in threads."""
    loop = """
    #include <cmath>
    extern "C" void draw(const long long* k, long long n, long long* out) {
      for (long long i = 0; i < n; ++i, k += 5) elbow_normals<long long>(k[0], k[1], k[2], k[3], k[4], out[2 * i], out[2 * i + 1]);
    }"""
    source, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    source.write_text("#include <cmath>\n" + torch_noise.KERNEL + loop)
    subprocess.run(["g++", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    draw = ctypes.CDLL(str(library)).draw
    key = keys(rows=500, uses=1, samples=1, size=32)
    blocks = np.arange(8)
    columns = [key.seeds.view(np.int64), key.words[:, 0].view(np.int64), key.first, key.frames]
    flat = np.stack([*(np.repeat(column, 8) for column in columns), np.tile(blocks, 500)], 1)
    out = np.empty((len(flat), 2), np.int64)
    pointer = ctypes.POINTER(ctypes.c_longlong)
    draw(flat.ctypes.data_as(pointer), ctypes.c_longlong(len(flat)), out.ctypes.data_as(pointer))
    assert off(out.view(np.float32).reshape(500, 1, 1, 32), key.draw()) <= LIMIT

"""The counter-based generator: known answers, statistics, and that a number depends on nothing but its key."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.noise import MAX_STEP, Purpose, normals, philox, vectors, words

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert tuple(philox(np.array([counter], np.uint32), np.array([key], np.uint32))[0]) == expected


def test_philox_agrees_with_a_plain_loop_over_python_integers():
    rng = np.random.default_rng(0)
    counters, keys = rng.integers(0, 1 << 32, (50, 4), np.uint32), rng.integers(0, 1 << 32, (50, 2), np.uint32)
    expected = [plain_philox(list(map(int, counter)), list(map(int, key))) for counter, key in zip(counters, keys, strict=True)]
    assert philox(counters, keys).tolist() == expected


def plain_philox(counter, key):
    (w0, w1, w2, w3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * w0, 0xCD9E8D57 * w2
        w0, w1, w2, w3 = (p1 >> 32) ^ w1 ^ k0, p1 & ONES, (p0 >> 32) ^ w3 ^ k1, p0 & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return [w0, w1, w2, w3]


def test_normals_are_box_muller_of_the_documented_words():
    seed, step, level, sample, frame = 0x123456789ABCDEF0, 7, 3, 5, 11
    noise = normals(np.array([seed], np.uint64), step, purpose=Purpose.DRAW, samples=(sample, 1), size=8, level=level, frame=frame)[0, 0]
    word = step | level << 20 | Purpose.DRAW << 28
    for block in range(2):
        w0, w1, w2, w3 = plain_philox([block, sample, word, frame], [seed & ONES, seed >> 32])
        expected = [f(angle(b)) * radius(a) for a, b in ((w0, w1), (w2, w3)) for f in (np.cos, np.sin)]
        np.testing.assert_allclose(noise[4 * block : 4 * block + 4], expected, rtol=0, atol=2e-6)


def radius(word):
    return np.sqrt(-2 * np.log((word + 0.5) / 2**32))


def angle(word):
    return np.pi / 2**31 * (word - (1 << 32) * (word >= 1 << 31))


def test_normals_have_the_moments_of_a_standard_normal():
    noise = normals(np.arange(4000, dtype=np.uint64), 0, purpose=Purpose.MEASURE, samples=4, size=16).astype(np.float64).ravel()
    n = noise.size
    # Standard errors of the first four moments of a standard normal; five of them each.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(noise**power) - expected) < 5 * np.sqrt(variance / n)
    assert np.isfinite(noise).all()
    assert 4.5 < np.abs(noise).max() < 7


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 1}, {"level": 1}, {"purpose": Purpose.MEASURE}, {"first": 1000}, {"frame": 1}])
def test_every_part_of_the_key_gives_an_independent_stream(other):
    def draw(*, seed=1, step=0, level=0, purpose=Purpose.REFINE, first=0, frame=0):
        return normals(np.array([seed], np.uint64), step, purpose=purpose, samples=(first, 200), size=64, level=level, frame=frame).ravel()

    a, b = draw(), draw(**other)
    assert abs(np.mean(a * b)) < 5 / np.sqrt(a.size)
    assert not np.any(a == b)


@given(
    rows=st.integers(1, 12),
    place=st.integers(0, 11),
    samples=st.integers(1, 5),
    size=st.integers(1, 70),
    antithetic=st.booleans(),
    data=st.data(),
)
def test_a_rows_noise_does_not_depend_on_its_place_nor_on_its_neighbours(*, rows, place, samples, size, antithetic, data):
    place %= rows
    seeds = np.array(data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=rows, max_size=rows)), np.uint64)
    steps = np.array(data.draw(st.lists(st.integers(0, MAX_STEP), min_size=rows, max_size=rows)))
    frames = np.array(data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=rows, max_size=rows)))
    kwargs = {"purpose": Purpose.REFINE, "samples": samples, "size": size, "antithetic": antithetic}
    batch = normals(seeds, steps, frame=frames, **kwargs)
    alone = normals(seeds[place : place + 1], int(steps[place]), frame=int(frames[place]), **kwargs)
    assert batch.shape == (rows, samples, size)
    assert np.array_equal(batch[place], alone[0])


def test_a_range_of_samples_and_a_shorter_vector_are_parts_of_the_whole():
    seeds = np.arange(3, dtype=np.uint64)
    for antithetic in (False, True):
        whole = normals(seeds, 4, purpose=Purpose.SCORE, samples=10, size=33, antithetic=antithetic)
        part = normals(seeds, 4, purpose=Purpose.SCORE, samples=(3, 4), size=9, antithetic=antithetic)
        assert np.array_equal(part, whole[:, 3:7, :9])


def test_each_row_may_begin_at_a_sample_of_its_own():
    seeds = np.arange(3, dtype=np.uint64)
    whole = normals(seeds, 0, purpose=Purpose.SCORE, samples=20, size=5)
    part = normals(seeds, 0, purpose=Purpose.SCORE, samples=(np.array([0, 7, 16]), 4), size=5)
    assert all(np.array_equal(part[row], whole[row, first : first + 4]) for row, first in enumerate((0, 7, 16)))


def test_antithetic_samples_cancel_in_pairs_and_the_first_of_each_is_the_plain_draw():
    seeds = np.arange(4, dtype=np.uint64)
    paired = normals(seeds, 0, purpose=Purpose.REFINE, samples=6, size=10, antithetic=True)
    plain = normals(seeds, 0, purpose=Purpose.REFINE, samples=6, size=10)
    assert np.array_equal(paired[:, 0::2], -paired[:, 1::2])
    assert np.array_equal(paired[:, 0::2], plain[:, 0::2])


def test_many_vectors_are_made_in_passes_without_a_seam():
    seeds = np.arange(3000, dtype=np.uint64)
    word = words(0, level=0, purpose=Purpose.DRAW)
    together = vectors(seeds, np.zeros(3000, np.int64), word, 12)
    apart = np.concatenate([vectors(seeds[i : i + 500], np.zeros(500, np.int64), word, 12) for i in range(0, 3000, 500)])
    assert np.array_equal(together, apart)


def test_a_step_beyond_the_last_one_is_refused_rather_than_repeated():
    with pytest.raises(ValueError, match="beyond the last step"):
        normals(np.zeros(1, np.uint64), MAX_STEP + 1, purpose=Purpose.REFINE, samples=1, size=4)


def test_no_rows_give_no_noise():
    assert normals(np.zeros(0, np.uint64), 0, purpose=Purpose.REFINE, samples=2, size=4).shape == (0, 2, 4)

"""One-bit codes and reduced dense rows: what folding and rotating promise, the same bits everywhere, the estimator against its theory."""

import hashlib

import numpy as np
import pytest
from helpers import assert_close, dense_rows, open_zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from wherefrom.indexer.fit import _coordinates
from wherefrom.store.bits import fold, padded_width, rotate, unfold, unrotate
from wherefrom.store.dense import Reduction, row_bytes
from wherefrom.store.manifest import Curvature, DenseComponent, Layer, Projection
from wherefrom.store.shard import rows_path


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 130), st.integers(0, 5))
def test_a_rotation_keeps_lengths_and_is_undone_by_its_transpose(width, bits, seed):
    x = gaussian(3, width)
    rotated_all = rotate(x, padded_width(width, bits), seed)
    np.testing.assert_allclose(np.linalg.norm(rotated_all, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    assert_close(
        rotate(x, bits, seed), rotate(x, padded_width(width, bits), seed)[:, :bits], 1e-5, np.linalg.norm(x, axis=1, keepdims=True)
    )
    short = gaussian(3, bits)
    longer = np.pad(short, ((0, 0), (0, padded_width(width, bits) - bits)))
    assert_close(unrotate(short, width, seed), unrotate(longer, width, seed), 1e-5, np.linalg.norm(short, axis=1, keepdims=True))
    assert_close(unrotate(rotated_all, width, seed), x, 1e-5, np.linalg.norm(x, axis=1, keepdims=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 5))
def test_folding_adds_up_every_coordinate_once_and_is_undone_as_far_as_it_can_be(width, bits, seed):
    folded = fold(np.eye(width, dtype=np.float32), bits, seed)
    if width <= bits:
        assert np.array_equal(folded, np.eye(width))
        return
    assert folded.shape == (width, bits)
    assert np.array_equal(np.abs(folded).sum(1), np.ones(width))  # one place and one sign each
    held = np.abs(folded).sum(0)
    assert held.max() - held.min() <= 1  # places hold alike many
    y = gaussian(4, bits)
    shortest = unfold(y, width, seed)
    assert_close(fold(shortest, bits, seed), y, 1e-5)
    assert_close(shortest, y @ np.linalg.pinv(folded), 1e-5, np.linalg.norm(y, axis=1, keepdims=True))


def test_foldings_and_rotations_are_fixed_bits():
    x = np.arange(-300, 300, dtype=np.float32).reshape(2, 300)
    made = fold(x, 64, 3).tobytes() + np.packbits(rotate(fold(x, 64, 3), 48, 3) > 0).tobytes()
    assert hashlib.sha256(made).hexdigest() == "6092cd471070509782d9cfd4707ef5d4a8edca16dcb9fc5fc041937c068413ea"
    assert not np.array_equal(rotate(x, 64, 1), rotate(x, 64, 2))
    assert not np.array_equal(fold(x, 64, 1), fold(x, 64, 2))


def test_folded_products_are_unbiased():
    v, q = gaussian(2, 90)
    actual = np.array([fold(v[None], 30, seed)[0] @ fold(q[None], 30, seed)[0] for seed in range(4000)])
    together = (90 / 30 - 1) / (90 - 1)  # the probability that two coordinates come to the same place
    expected = np.sqrt(((v @ v) * (q @ q) + (v @ q) ** 2 - 2 * (v**2 @ q**2)) * together)
    assert abs(actual.mean() - v @ q) < 4 * expected / np.sqrt(len(actual))
    assert actual.std() == pytest.approx(expected, rel=0.1)


def estimates(tmp_path, v, queries, coordinates, seed):
    """Scores of one row with queries, through a one-bit shard as search computes them."""
    reduction = Reduction(v.shape[1], None, coordinates, True, seed)
    rows = dense_rows(tmp_path / str(seed), reduction.apply(v), coordinates, "1bit", seed)
    values = np.concatenate([rows.values(codes) for _, codes in rows.blocks()])
    return reduction.apply(queries) @ (values * (rows.norms * rows.factors())[:, None]).T


@pytest.mark.parametrize(("width", "coordinates"), [(64, 64), (64, 256), (64, 16), (300, 64)])
def test_one_bit_rows_estimate_products_without_bias_and_with_the_variance_of_theory(tmp_path, width, coordinates):
    v, q = gaussian(2, width)
    v, q = v / np.linalg.norm(v), q / np.linalg.norm(q)
    actual = np.array([estimates(tmp_path, v[None], q[None], coordinates, seed)[0, 0] for seed in range(400)])
    cosine, padded = float(v @ q), padded_width(min(width, coordinates), coordinates)
    theory = np.sqrt((1 - cosine**2) * (np.pi / 2 * padded / coordinates - 1) / padded)
    if width > coordinates:  # the projection's variance comes on top
        full, rest = divmod(width, coordinates)
        together = (rest * (full + 1) * full + (coordinates - rest) * full * (full - 1)) / (width * (width - 1))
        theory = np.hypot(theory, np.sqrt((1 + cosine**2 - 2 * (v**2 @ q**2)) * together))
    share = coordinates / padded  # the factor belongs to what was kept of the vector
    if share == 1:
        assert abs(actual.mean() - cosine) < 4 * theory / np.sqrt(len(actual))
    assert actual.std() == pytest.approx(theory, rel=0.15)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 90), st.integers(1, 100), st.sampled_from(["float32", "float16", "int8", "1bit"]), st.booleans())
def test_reduced_rows_are_made_again_of_what_is_read_back(rows, width, coordinates, dtype, some):
    selection = np.sort(np.random.default_rng(0).permutation(width)[: (width + 1) // 2]) if some else None
    count = width if selection is None else len(selection)
    if dtype != "1bit":
        coordinates = min(coordinates, count)
    reduction = Reduction(width, selection, coordinates, dtype == "1bit", 4)
    stored = reduction.apply(gaussian(rows, width))
    assert stored.shape == (rows, coordinates)
    undone = reduction.undo(stored)
    assert undone.shape == (rows, width)
    again = reduction.apply(undone)
    if dtype != "1bit" or coordinates == padded_width(min(count, coordinates), coordinates) <= count:
        assert_close(again, stored, 1e-5, np.linalg.norm(stored, axis=1, keepdims=True))
    if not reduction.mixes:
        assert np.array_equal(undone[:, slice(None) if selection is None else selection], stored)


def test_one_bit_shards_are_what_zarr_reads_and_are_hardly_padded(tmp_path):
    rows, dim = 2500, 4100
    written = gaussian(rows, dim)
    written[7] = 0
    read = dense_rows(tmp_path, written, dim, "1bit")
    group = open_zarr(tmp_path)["blocks"]
    assert np.array_equal(group["codes"][:], np.packbits(written > 0, axis=1))
    norms = np.linalg.norm(written, axis=1)
    np.testing.assert_allclose(group["norms"][:], norms, rtol=1e-5)
    np.testing.assert_allclose(
        group["scales"][:] * norms, np.divide(norms**2, np.abs(written).sum(1), out=np.zeros(rows), where=norms > 0), rtol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(read.row(3)), norms[3], rtol=1e-5)
    assert not read.row(7).any()
    size = rows_path(tmp_path, "0").stat().st_size
    assert rows * (row_bytes(dim, "1bit") + 8) <= size < 1.01 * rows * (row_bytes(dim, "1bit") + 8)


def component(size, coordinates, dtype, damping=0.1):
    layer = Layer(name="a", outputs=1, inputs=size, output_rank=1, input_rank=size, input_group="a", offset=0, curvature="diagonal")
    curvature = Curvature(kind="diagonal", labels="data", examples=9, tokens=9, damping=damping)
    return DenseComponent(
        name="blocks",
        kind="dense",
        model=0,
        weight=1.0,
        coordinates=coordinates,
        dtype=dtype,
        layers=(layer,),
        projection=Projection(kind="random", rank=1, seed=0),
        curvature=curvature,
    )


def test_what_is_kept_follows_the_spectrum():
    flat, steep = np.ones(400), np.exp(-np.arange(400.0) / 10)[np.random.default_rng(0).permutation(400)]
    assert _coordinates(component(400, 50, "1bit"), {"a/eigenvalues": flat}) == {}
    few = _coordinates(component(400, 50, "1bit"), {"a/eigenvalues": steep})["kept"]
    assert len(few) < 100
    assert set(few) == set(np.argsort(-steep)[: len(few)])
    assert len(_coordinates(component(400, 50, "float32"), {"a/eigenvalues": steep})["kept"]) >= 50
    # By simulation: independent coordinates of these energies, one-bit rows of them; no other number of kept ones is clearly better.
    energy = steep / (steep + 0.1 * steep.mean())
    order = np.argsort(-energy)
    x, q = gaussian(600, 400, seed=1) * np.sqrt(energy), gaussian(40, 400, seed=2) * np.sqrt(energy)
    exact = (q @ x.T).ravel().astype(np.float32)

    def fidelity(count):
        reduction = Reduction(400, np.sort(order[:count]), 50, True, 0)
        rows = reduction.apply(x)
        factors = (rows**2).sum(1) / np.abs(rows).sum(1)
        return np.corrcoef(exact, (reduction.apply(q) @ (np.sign(rows) * factors[:, None]).T).ravel())[0, 1]

    best = max(fidelity(count) for count in (5, 10, 20, 40, 80, 160, 400))
    assert fidelity(len(few)) > 0.95 * best

"""Products of large matrices on the CPU against NumPy in float64, by either library and in pieces of any size."""

import numpy as np
import pytest
import torch

from m3er_fast.cpu import products

ROWS = [0, 1, 2, 7, 8, 33, 100, 131]


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def small(request, monkeypatch):
    """Small products count as large, and oneDNN as the faster or the slower one, whatever this processor is."""
    if request.param and not products.onednn_is_callable():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "FEWEST_OPERATIONS", 600)
    monkeypatch.setattr(products, "MOST_ROWS", 40)
    monkeypatch.setattr(products, "FEWEST_FEATURES", 2)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)


def layouts(*shape, dtype=torch.float32):
    """Matrices of one shape that lie in memory in different ways."""
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=dtype)

    *outer, rows, columns = shape
    yield draw(*shape)
    yield draw(*outer, columns, rows).mT
    yield draw(*outer, rows, 3, columns)[..., 1, :]
    yield draw(*outer, columns, 2, rows)[..., 1, :].mT
    yield draw(*outer, rows, 2 * columns)[..., ::2]


def close(got, want):
    np.testing.assert_allclose(got.double().numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("small")
def test_every_product_equals_numpy_in_any_layout(rows, dtype):
    for x in layouts(rows, 6, dtype=dtype):
        for y in layouts(6, 5, dtype=dtype):
            wanted = x.double().numpy() @ y.double().numpy()
            for out in layouts(rows, 5, dtype=dtype):
                before, bias = out.double().numpy().copy(), y[0].contiguous()
                close(products.add_product_(out, x, y), before + wanted)
                close(products.matrix_product(x, y, out), wanted)
                close(products.matrix_product(x, y, out, bias), wanted + bias.double().numpy())
        for grad in layouts(rows, 5, dtype=dtype):
            total = torch.ones(5, 6, dtype=dtype)
            close(products.add_gradient_(total, grad, x), 1.0 + grad.double().numpy().T @ x.double().numpy())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("small")
def test_products_of_several_matrices_are_those_of_each(rows):
    x, y, out = torch.randn(rows, 3, 6).transpose(0, 1), torch.randn(3, 6, 5), torch.randn(rows, 3, 5).transpose(0, 1)
    wanted, before = x.double().numpy() @ y.double().numpy(), out.double().numpy().copy()
    close(products.add_products_(out, x, y), before + wanted)
    close(products.matrix_products(x, y, out), wanted)
    gradient = out.mT.double().numpy() @ x.double().numpy()
    close(products.add_gradients_(torch.zeros(3, 5, 6), out, x), gradient)


@pytest.mark.usefixtures("small")
def test_a_row_that_is_not_finite_stays_in_its_row():
    x, y = torch.randn(100, 6), torch.randn(6, 5)
    x[3, 2], x[70, 1], x[90, 4] = float("nan"), float("inf"), 1e30
    with np.errstate(invalid="ignore"):
        wanted = x.numpy() @ y.numpy()
    got = products.matrix_product(x, y, torch.empty(100, 5))
    torch.testing.assert_close(got, torch.from_numpy(wanted), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_pieces_cover_the_rows_and_have_few_sizes():
    sizes = set()
    for rows in range(1, 6000, 7):
        pieces = list(products._pieces(torch.empty(rows, 192), 128))
        assert [piece.start for piece, _ in pieces] == [0, *(piece.stop for piece, _ in pieces[:-1])]
        assert pieces[-1][0].stop == rows
        sizes |= {piece.stop - piece.start for piece, large in pieces if large}
    assert len(sizes) <= 25

"""Products by csrc/product.h against float64."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import fastlm
from fastlm.ops import products

extension = pytest.importorskip("fastlm._native", reason="the C++ extension is not built")

SIZES = (0, 1, 7, 8, 49, 257, 600)
STRIDES = ("rows", "columns", "rows apart", "every third")


def draw(rows, columns, strides, dtype):
    """Return a matrix whose strides are those, beside which lie NaNs."""
    if strides == "columns":
        return draw(columns, rows, "rows", dtype).t()
    extra, step = {"rows": (0, 1), "rows apart": (5, 1), "every third": (2, 3)}[strides]
    whole = torch.full((rows, columns * step + extra), torch.nan, dtype=dtype)
    part = whole[:, : columns * step: step]
    return part.copy_(torch.randn(rows, columns, dtype=dtype))


def check(rows, depth, columns, of_a="rows", of_b="rows", of_out="rows", start="", dtype=torch.float32, sums=None):
    sums = sums or dtype
    a, b, out = draw(rows, depth, of_a, dtype), draw(depth, columns, of_b, dtype), draw(rows, columns, of_out, sums)
    if start != "add":
        out.fill_(torch.nan)
    bias = torch.randn(columns, dtype=sums) if start == "bias" else None
    exact = a.double() @ b.double() + (out.double() if start == "add" else 0 if bias is None else bias.double())
    found = products.multiply(extension, a, b, out, add=start == "add", bias=bias)
    assert found is out
    bound = torch.finfo(sums if dtype is sums else torch.float32).eps * (2 * depth**0.5 + 4) * (
        1 + exact.abs().max() if exact.numel() else 1)
    if sums is torch.bfloat16:  # one rounding of sums in float32
        bound = torch.finfo(sums).eps * exact.abs() + bound / 2**16
    assert (found.double() - exact).abs().le(bound).all(), (rows, depth, columns, of_a, of_b, of_out, start, sums)
    if of_out == "rows apart" and rows and columns:
        beside = out.as_strided((rows, 5), out.stride(), out.storage_offset() + columns)
        assert beside.isnan().all(), "wrote beside a row"


def sweep():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for rows, depth, columns in itertools.product(SIZES, SIZES, SIZES):
            if rows * depth * columns <= 600 * 257 * 70 and (rows + depth + columns) % 3 < 2:
                check(rows, depth, columns, dtype=dtype)
        for of_a, of_b, of_out, start in itertools.product(
                STRIDES, STRIDES, ("rows", "rows apart"), ("", "add", "bias")):
            check(53, 71, 131, of_a, of_b, of_out, start, dtype)
            check(9, 530, 50, of_a, of_b, of_out, start, dtype)
        check(500, 300, 2100, "columns", "columns", "rows", "add", dtype)
        check(3, 600, 4500, "rows", "columns", "rows apart", "bias", dtype)


def check_few(rows, depth, columns, of_w="rows", bias=True, dtype=torch.float32):
    x, w = draw(rows, depth, "rows", dtype), draw(columns, depth, of_w, dtype)
    bias = torch.randn(columns).to(dtype) if bias else None
    exact = x.double() @ w.double().t() + (0 if bias is None else bias.double())
    found = products.few_rows(extension, x, w, bias)
    assert found.shape == (rows, columns)
    assert found.dtype is dtype
    bound = torch.finfo(torch.float32).eps * (2 * depth**0.5 + 4) * (1 + exact.abs().max() if exact.numel() else 1)
    bound = bound + (torch.finfo(dtype).eps * exact.abs() if dtype is torch.bfloat16 else 0)
    assert (found.double() - exact).abs().le(bound).all(), (rows, depth, columns, of_w, bias is None, dtype)


def sweep_few():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, depth, columns in itertools.product(
                (0, 1, 2, 5, 7, 13, 33), (0, 1, 15, 16, 31, 100), (0, 1, 3, 4, 30)):
            check_few(rows, depth, columns, dtype=dtype)
        for of_w in STRIDES:
            check_few(3, 130, 67, of_w, False, dtype)
        check_few(2, 1000, 700, dtype=dtype)


def sweep_pairs():
    """Tiles of 16 and strips of 32, chunks of 512 of the depth, blocks of 128 rows and 512 columns, more of each."""
    torch.manual_seed(0)
    for rows, depth, columns in itertools.product((0, 1, 16, 33, 130), (0, 1, 31, 64, 530), (0, 1, 17, 32, 70)):
        check(rows, depth, columns, dtype=torch.bfloat16)
    # Where sums are long, those of a task's rows wait beside each other, and 128 rows of A are packed at a time: a task
    # has 288 rows by one thread, and 256 of 1100 by two.
    for rows in 288, 1100:
        check(rows, 2100, 40, dtype=torch.bfloat16)
        check(rows, 2080, 40, "columns", "columns", "rows apart", "add", torch.bfloat16, torch.float32)
    for of_a, of_b, of_out, start, sums in itertools.product(
            STRIDES, STRIDES, ("rows", "rows apart"), ("", "add", "bias"), (torch.float32, torch.bfloat16)):
        check(53, 71, 51, of_a, of_b, of_out, start, torch.bfloat16, sums)
        check(64, 576, 40, of_a, of_b, of_out, start, torch.bfloat16, sums)
    for sums in torch.float32, torch.bfloat16:
        check(300, 1100, 1100, "columns", "columns", "rows", "add", torch.bfloat16, sums)
        check(300, 100, 2100, dtype=torch.bfloat16, sums=sums)
        check(64, 2048, 40, dtype=torch.bfloat16, sums=sums)  # rows a page apart
        check(3, 600, 1500, "rows", "columns", "rows apart", "bias", torch.bfloat16, sums)


@pytest.mark.parametrize("threads", [1, 3])
def test_products(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sweep()
        sweep_few()
        if extension.tiles:
            sweep_pairs()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_narrower_instruction_sets(isa):
    if isa not in fastlm.dispatch.build_report()["instruction_sets"]:
        pytest.skip(f"{isa} was not built")
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_products as t; " \
           f"t.sweep(); t.sweep_few(); assert t.extension.isa == {isa!r}"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"FASTLM_MAX_ISA": isa}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_a_result_is_made_and_threads_do_not_change_it():
    a, b = torch.randn(300, 700), torch.randn(700, 500)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(products.multiply(extension, a, b))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.skipif(not extension.tiles, reason="needs AMX")
def test_products_of_bfloat16_by_tiles(monkeypatch):
    """The same numbers by any number of threads, packed or where they lie; great depths in parts."""
    a, b = torch.randn(520, 700).bfloat16(), torch.randn(700, 530).bfloat16()
    a[3, 4], b[5, 6] = torch.inf, torch.nan
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [products.multiply(extension, a, b), products.multiply(extension, a.t().contiguous().t(), b)]
    finally:
        torch.set_num_threads(before)
    assert all(x.equal(found[0]) or x.nan_to_num(7).equal(found[0].nan_to_num(7)) for x in found[1:])
    expected = a.double() @ b.double()
    assert torch.equal(found[0].isnan(), expected.isnan())
    assert torch.equal(found[0].isinf(), expected.isinf())
    monkeypatch.setattr(products, "MOST_DEPTH", 96)
    for start, sums in itertools.product(("", "add", "bias"), (torch.float32, torch.bfloat16)):
        check(70, 300, 80, "columns", "rows apart", "rows apart", start, torch.bfloat16, sums)


def test_special_numbers_pass():
    a, b = torch.randn(30, 20), torch.randn(20, 60)
    a[3, 4], a[5, 6] = torch.nan, torch.inf
    found, expected = products.multiply(extension, a, b), a @ b
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize(("make", "message"), [
    (lambda a, b: (a, b.t()), r"shapes do not fit each other: \[3, 4\], \[5, 4\]"),
    (lambda a, b: (a, b, torch.empty(3, 6)), "shapes do not fit each other"),
    (lambda a, b: (a, b.double()), "expected tensors of torch.float32"),
    (lambda a, b: (a.half(), b.half()), "no kernel for torch.float16"),
    (lambda a, b: (a, b, torch.empty(3, 5).bfloat16()), "expected tensors of torch.float32"),
    (lambda a, b: (a, b, torch.empty(5, 3).t()), "rows of out and the bias must be contiguous"),
])
def test_wrong_input(make, message):
    with pytest.raises(RuntimeError, match=message):
        products.multiply(extension, *make(torch.randn(3, 4), torch.randn(4, 5)))


def test_a_wrong_bias_and_another_device():
    with pytest.raises(RuntimeError, match="rows of out and the bias must be contiguous"):
        products.multiply(extension, torch.randn(3, 4), torch.randn(4, 5), bias=torch.randn(10)[::2])
    with pytest.raises(RuntimeError, match=r"expected tensors of torch\.float32 on the CPU"):
        products.multiply(extension, torch.randn(0, 4), torch.empty(4, 5, device="meta"))


@pytest.mark.parametrize("native", [None, extension])
@pytest.mark.parametrize("start", ["", "add", "bias"])
def test_mm_is_the_same_by_torch(native, start):
    a, b, out, bias = torch.randn(200, 150), torch.randn(150, 100), torch.randn(200, 100), torch.randn(100)
    expected = a @ b + (out if start == "add" else bias if start == "bias" else 0)
    found = products.mm(native, a, b, out, add=start == "add", bias=bias if start == "bias" else None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [40, 600])
@pytest.mark.parametrize("start", ["", "add", "bias"])
def test_mm_sums_bfloat16_in_float32(rows, start):
    """By tiles where there are such and rows enough, else by torch."""
    a, b = torch.randn(rows, 640).bfloat16(), torch.randn(640, 100).bfloat16()
    out, bias = torch.randn(rows, 100), torch.randn(100)
    expected = a.double() @ b.double() + (out if start == "add" else bias if start == "bias" else 0)
    found = products.mm(extension, a, b, out, add=start == "add", bias=bias if start == "bias" else None)
    assert found is out
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0.5)


def test_who_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr(extension, "tiles", True)

    def ours(rows, depth, columns, of_a="rows", of_b="rows"):
        return products.is_ours(extension, draw(rows, depth, of_a, torch.bfloat16),
                                draw(depth, columns, of_b, torch.bfloat16))
    assert ours(512, 512, 64) and ours(600, 64, 300, "columns") and ours(128, 128, 128)
    assert not ours(512, 256, 512) and not ours(256, 1024, 1024) and not ours(512, 512, 63)
    assert not ours(512, 512, 64, "every third") and not ours(512, 512, 64, of_b="every third")
    monkeypatch.setattr(extension, "tiles", False)
    assert not ours(512, 512, 64)


def test_few_rows_refuse_what_does_not_fit():
    x, w = torch.randn(2, 3), torch.randn(5, 3)
    for args in ((x, w[:, :2]), (x, w, torch.randn(4))):
        with pytest.raises(RuntimeError, match="few_rows: shapes do not fit each other"):
            products.few_rows(extension, *args)
    for args in ((x.double(), w.double()), (x, w.bfloat16())):
        with pytest.raises(RuntimeError, match="few_rows: expected float32 or bfloat16"):
            products.few_rows(extension, *args)


@pytest.mark.parametrize("depth", [31, 33, 65, 132])
def test_what_lies_between_rows_is_not_read(depth):
    """Torch's own bfloat16 product does read it, by AMX."""
    native = pytest.importorskip("fastlm._native")
    rows = torch.full((40, depth + 7), torch.nan, dtype=torch.bfloat16)
    rows[:, :depth] = torch.randn(40, depth)
    assert products.mm(native, rows[:, :depth], torch.randn(depth, 48).bfloat16()).isfinite().all()

"""What the heads share: which products are made, rows with room behind them, gradients that are scaled late."""

from types import SimpleNamespace

import pytest
import torch

from fastlm.ops.head import Head, block_rows, scaled
from fastlm.ops.loss_kernels import Logits, Targets, new_sums
from tests.parity import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize(("classes", "dtype", "sizes"), [
    (50257, torch.bfloat16, [50256, 1]), (128256, torch.bfloat16, [128256]), (7, torch.float16, [7]),
    (50257, torch.float32, [50257])])
def test_on_a_gpu_products_of_16_bits_have_sizes_that_tensor_cores_like(classes, dtype, sizes):
    head = object.__new__(Head)
    head.x, head.dtype, head.classes = SimpleNamespace(is_cuda=True), dtype, classes
    assert [part.stop - part.start for part in head.parts()] == sizes


@pytest.mark.parametrize(("shape", "classes", "dtype", "copies", "rows"), [
    ((8192, 4096), 128256, torch.bfloat16, 1, 8192),  # the logits are no larger than the sum that they spare
    ((8193, 4096), 128256, torch.bfloat16, 1, 2731), ((8192, 1024), 50257, torch.bfloat16, 1, 4096),
    ((6000, 1024), 50257, torch.bfloat16, 1, 3000), ((4096, 1024), 50257, torch.float16, 1, 2048),
    ((1024, 512), 50257, torch.bfloat16, 2, 1024), ((8192, 512), 50257, torch.bfloat16, 2, 2048)])
def test_rows_of_a_block_on_a_gpu(shape, classes, dtype, copies, rows):
    x = SimpleNamespace(shape=shape, is_cuda=True)
    weight = torch.empty(classes, shape[1], dtype=dtype, device="meta")
    assert block_rows(x, weight, dtype, copies, grows=True) == rows


@pytest.mark.parametrize(("few", "rows"), [(0, 1000), (256, 334), (512, 500)])
def test_rows_of_a_block_on_a_cpu(few, rows):
    """16 MB of logits, or as many rows as products want."""
    x, weight = SimpleNamespace(shape=(1000, 64), is_cuda=False), torch.empty(10000, 64, device="meta")
    assert block_rows(x, weight, torch.float32, 1, few=few) == rows


@interpreted
@pytest.mark.parametrize("classes", [65, 80, 129])
def test_what_lies_behind_a_row_changes_nothing(classes):
    from fastlm.ops import distillation_triton, linear_cross_entropy_triton

    rows, logits = 5, torch.randn(2, 5, classes)
    room = torch.full((2, rows, 192), torch.nan)[..., :classes]
    target, scale = torch.randint(classes, (rows,)), torch.rand(rows)
    found = []
    for student, teacher in (logits.clone(), room.copy_(logits)):
        kernels, result = linear_cross_entropy_triton.Kernels(), student.clone()
        sums = new_sums(rows, torch.float32, "cpu")
        state = kernels.read(Logits(student, None, 3.0), Targets(target, even=0.1), sums)
        kernels.gradient(state, torch.rand(rows, 5, generator=torch.Generator().manual_seed(1)), result)
        loss = distillation_triton.Kernels().distil(Logits(student), Logits(teacher), target, "jsd", 0.3, 0.7, 0.3,
                                                    scale, teacher)
        found.append((sums, result, loss, teacher.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("factor", [1.0, 2.5, torch.nan])
@pytest.mark.parametrize("spent", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_as_in_pytorch(dtype, spent, factor):
    from fastlm.ops import head_kernels_triton

    gradient, factor = torch.randn(37, 260), torch.tensor(factor)
    expected = scaled(gradient.clone(), factor, dtype, True)
    kept = gradient.clone()
    found = head_kernels_triton.scaled(gradient, factor, dtype, spent)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert (found is gradient) == (spent and dtype is torch.float32)
    assert spent or torch.equal(gradient, kept)

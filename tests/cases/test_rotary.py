"""Rotary embedding beyond the matrix of tests/test_ops.py: the forms of its tables, positions, and errors."""

import pytest
import torch

import fastlm
from fastlm.ops import rotary_embedding


def tables(positions, dim, dtype=torch.float64):
    """Return cos and sin `[..., R/2]` of the usual frequencies."""
    frequencies = 10000 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions.double()[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def test_is_the_formula_of_transformers(device):
    x = randn(2, 3, 5, 8).to(device)
    cos, sin = (t.repeat(1, 2) for t in tables(torch.arange(5, device=device), 8))
    torch.testing.assert_close(rotary_embedding(x, cos, sin), x * cos + rotate_half(x) * sin)
    batched = cos.expand(2, 5, 8), sin.expand(2, 5, 8)
    torch.testing.assert_close(rotary_embedding(x, *batched), rotary_embedding(x, cos, sin))
    torch.testing.assert_close(rotary_embedding(x, *(t.unsqueeze(1) for t in batched)), rotary_embedding(x, cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_a_complex_product(interleaved, device):
    x = randn(2, 3, 5, 8).to(device)
    cos, sin = tables(torch.arange(5, device=device), 8)
    paired = x.unflatten(-1, (4, 2) if interleaved else (2, 4))
    paired = paired if interleaved else paired.transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(paired.contiguous()) * torch.complex(cos, sin))
    expected = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotary_embedding(x, cos, sin, interleaved=interleaved), expected)
    full = (t.repeat_interleave(2, -1) if interleaved else t.repeat(1, 2) for t in (cos, sin))
    torch.testing.assert_close(rotary_embedding(x, *full, interleaved=interleaved), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_columns_beyond_the_tables_pass(interleaved, device):
    x = randn(1, 2, 5, 20).to(device)
    cos, sin = tables(torch.arange(5, device=device), 8)
    y = rotary_embedding(x, cos, sin, interleaved=interleaved)
    assert torch.equal(y[..., 8:], x[..., 8:])
    torch.testing.assert_close(y[..., :8], rotary_embedding(x[..., :8], cos, sin, interleaved=interleaved))
    full = [t.repeat_interleave(2, -1) if interleaved else t.repeat(1, 2) for t in (cos, sin)]
    torch.testing.assert_close(rotary_embedding(x, *full, interleaved=interleaved, rotary_dim=8), y)


def test_positions_choose_rows_of_the_tables(device):
    x = randn(2, 3, 4, 8).to(device)
    cos, sin = tables(torch.arange(50, device=device), 8)
    positions = torch.tensor([[0, 1, 2, 3], [46, 47, 48, 49]], device=device)
    y = rotary_embedding(x, cos, sin, positions=positions)
    torch.testing.assert_close(y, rotary_embedding(x, cos[positions], sin[positions]))
    torch.testing.assert_close(rotary_embedding(x, cos, sin, positions=positions[1].int())[1], y[1])


def test_scores_depend_on_the_distance_alone(device):
    q, k = randn(1, 1, 1, 16).to(device), randn(1, 1, 1, 16).to(device)
    cos, sin = tables(torch.arange(200, device=device), 16)

    def score(i, j):
        q_i, k_j = (rotary_embedding(t, cos, sin, positions=torch.tensor([p], device=device))
                    for t, p in ((q, i), (k, j)))
        return (q_i * k_j).sum()

    torch.testing.assert_close(score(7, 3), score(187, 183))


def test_tables_may_lie_differently(device):
    """Cosines that are one number everywhere, beside sines that differ from column to column."""
    x, sin = randn(1, 2, 5, 8, dtype=torch.float32).to(device), torch.randn(5, 8, device=device)
    cos = torch.tensor(0.5, device=device).expand(5, 8)
    with fastlm.backend("native", "triton", "torch"):
        torch.testing.assert_close(rotary_embedding(x, cos, sin), rotary_embedding(x, cos.clone(), sin))


def test_dtype_is_that_of_x(device):
    x = randn(1, 2, 5, 8, dtype=torch.bfloat16).to(device)
    cos, sin = tables(torch.arange(5, device=device), 8, torch.float32)
    y = rotary_embedding(x, cos, sin)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, rotary_embedding(x.double(), cos.double(), sin.double()).bfloat16(), rtol=0.01,
                               atol=0.01)


X, T = torch.zeros(2, 3, 5, 8), torch.zeros(5, 4)
BAD = [
    (TypeError, "cos must be a Tensor, got list", lambda: rotary_embedding(X, [1.0], T)),
    (TypeError, "x must be floating point, got torch.int64", lambda: rotary_embedding(X.long(), T, T)),
    (ValueError, r"x has shape \[3, 5, 8\], expected \[B, H, S, D\]", lambda: rotary_embedding(X[0], T, T)),
    (ValueError, r"sin has shape \[5, 2\], cos has \[5, 4\]", lambda: rotary_embedding(X, T, T[:, :2])),
    (ValueError, r"cos and sin have shape \[4, 4\].*S 5, R 8", lambda: rotary_embedding(X, T[1:], T[1:])),
    (ValueError, r"cos and sin have shape \[3, 5, 4\].*B 2", lambda: rotary_embedding(X, *[T.expand(3, 5, 4)] * 2)),
    (ValueError, "rotary_dim is 7, expected an even number", lambda: rotary_embedding(X, *[torch.zeros(5, 7)] * 2)),
    (ValueError, "rotary_dim is 10, expected .* up to x's head_dim 8",
     lambda: rotary_embedding(X, *[torch.zeros(5, 10)] * 2)),
    (ValueError, r"cos and sin have shape \[5, 4\].*R 6", lambda: rotary_embedding(X, T, T, rotary_dim=6)),
    (TypeError, "positions must be a Tensor of integers, got torch.float32",
     lambda: rotary_embedding(X, T, T, positions=torch.zeros(5))),
    (IndexError, "positions holds 5, expected 0 to 4", lambda: rotary_embedding(X, T, T, positions=torch.arange(1, 6))),
    (ValueError, r"positions has shape \[\]", lambda: rotary_embedding(X, T, T, positions=torch.tensor(1))),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input_gets_an_error_that_names_it(kind, message, call):
    with pytest.raises(kind, match=f"rotary_embedding: .*{message}"):
        call()

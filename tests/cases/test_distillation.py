"""linear_distillation beyond the matrix: faults that other libraries had, forms of the teacher, errors."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.ops import linear_distillation
from fastlm.ops.distillation import op
from tests.parity import absent

KINDS = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(autouse=True)
def blocks():
    """Small problems run stock by default; what is tested here are the kernels, where they can take the call."""
    with fastlm.backend("triton", "native", "torch"):
        yield


def problem(n=12, h=6, v=31, width=9, dtype=torch.float32, device="cpu"):
    x, weight, bias, teacher, teacher_weight = (
        torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        for shape in ((n, h), (v, h), (v,), (n, width), (v, width)))
    return x, weight, dict(student_bias=bias, teacher_input=teacher, teacher_weight=teacher_weight)


def expected(student, teacher, kind, beta=0.5, temperature=1.0):
    """Return each row's soft loss from whole logits, as the definition has it."""
    p, q = (torch.softmax(z.double() / temperature, -1) for z in (student, teacher))

    def kl(a, b):
        return torch.where(a > 0, a * (a / b).log(), 0).sum(-1)
    m = beta * q + (1 - beta) * p
    return temperature**2 * {"forward_kl": lambda: kl(q, p), "reverse_kl": lambda: kl(p, q),
                             "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m)}[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_definition(kind, temperature, device):
    x, weight, rest = problem(device=device)
    loss = linear_distillation(x, weight, divergence=kind, beta=0.3, temperature=temperature, reduction="none", **rest)
    student = F.linear(x, weight, rest["student_bias"])
    wanted = expected(student, F.linear(rest["teacher_input"], rest["teacher_weight"]), kind, 0.3, temperature)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher", [[2, 1, 3, 4], [1, 2, 3, 4], [-torch.inf, 1, 3, 4]], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_classes_as_probable_for_both(kind, teacher):
    """There the mixture's logarithm is on the kink of whatever picks the larger of the two."""
    x, teacher = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64), torch.tensor([teacher], dtype=torch.float64)

    def loss(x):
        return linear_distillation(x, torch.eye(4, dtype=x.dtype), teacher_logits=teacher, divergence=kind, beta=0.3)
    for name in ("reference", "torch", "native"):
        if not absent(op, name, "cpu"):
            with fastlm.backend(name):
                torch.autograd.gradcheck(loss, (x.requires_grad_(),))
                torch.autograd.gradgradcheck(loss, (x,))


def test_one_graph_serves_all_temperatures():
    x, weight, rest = problem()
    call = torch.compile(lambda *args, **options: linear_distillation(*args, **rest, **options), fullgraph=True,
                         backend="aot_eager")
    torch._dynamo.reset()
    for temperature in (1.0, 2.0, 3.0):
        torch.testing.assert_close(call(x, weight, temperature=temperature),
                                   linear_distillation(x, weight, temperature=temperature, **rest))


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["reference", "torch", "native", "triton"])
def test_not_a_number_is_no_loss_of_zero(name, kind, who, device):
    if reason := absent(op, name, device):
        pytest.skip(reason)
    x, weight, teacher = (torch.randn(shape, device=device) for shape in ((4, 8), (70, 8), (4, 70)))
    (x if who == "student" else teacher)[1, 3] = torch.nan
    with fastlm.backend(name):
        for reduction in ("mean", "none"):
            loss = linear_distillation(x, weight, teacher_logits=teacher, divergence=kind, reduction=reduction)
            assert loss.isnan().sum() == 1


@pytest.mark.parametrize("sample", ["forward_kl, temperature", "jsd, hard", "reverse_kl, logits, none", "top-k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["native", "triton"])
def test_several_blocks_of_rows_and_tiles_of_classes(name, dtype, sample, small_blocks, device):
    small_blocks(op, name, dtype, sample, device)


def test_hard_targets_are_mixed_in_and_ignored_rows_count_nothing(device):
    x, weight, rest = problem(device=device)
    target = torch.randint(31, (12,), device=device)
    target[:5] = -100
    loss = linear_distillation(x, weight, target=target, hard_weight=0.25, **rest)
    logits = F.linear(x, weight, rest["student_bias"])
    soft = expected(logits, F.linear(rest["teacher_input"], rest["teacher_weight"]), "forward_kl")[5:].mean()
    torch.testing.assert_close(loss.double(), 0.75 * soft + 0.25 * F.cross_entropy(logits, target).double())
    loss.backward()
    assert (x.grad[:5] == 0).all()
    assert (x.grad[5:] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient(kind, device):
    x, weight, rest = problem(device=device)
    linear_distillation(x, weight, divergence=kind, **rest).backward()
    assert rest["teacher_input"].grad is None
    assert rest["teacher_weight"].grad is None
    assert all(t.grad is not None for t in (x, weight, rest["student_bias"]))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_topk_of_all_classes_is_the_teacher(kind, device):
    x, weight, rest = problem(device=device)
    logits = torch.randn(12, 31, device=device)
    values, indices = logits.log_softmax(-1).topk(31)
    bias = rest["student_bias"]
    pairs = [torch.autograd.grad(linear_distillation(x, weight, student_bias=bias, divergence=kind, temperature=2.0,
                                                     **teacher), (x, weight, bias))
             for teacher in (dict(teacher_logits=logits), dict(teacher_topk=(values, indices)))]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def test_biases_of_any_stride(device):
    x, weight, rest = problem(device=device)
    apart = [torch.randn(62, device=device)[::2] for _ in range(2)]
    found, expected = (linear_distillation(x, weight, **rest | dict(student_bias=a, teacher_bias=b)) for a, b in (
        apart, [t.contiguous() for t in apart]))
    torch.testing.assert_close(found, expected)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(device):
    x, weight, _ = problem(device=device)
    for kind in KINDS:
        loss = linear_distillation(x, weight, teacher_input=x, teacher_weight=weight, divergence=kind)
        grads = torch.autograd.grad(loss, (x, weight))
        assert loss.abs() < 1e-6
        assert all(g.abs().max() < 1e-6 for g in grads)


def test_upstream_gradients_are_applied_again_and_again(device):
    x, weight, rest = problem(device=device)
    loss = linear_distillation(x, weight, **rest)
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0, device=device), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, weight), retain_graph=True)
    third = torch.autograd.grad(loss, (x, weight))
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, 3 * c)
    losses = linear_distillation(x, weight, reduction="none", **rest)
    upstream = torch.randn(12, device=device)
    found = torch.autograd.grad(losses, weight, upstream)[0]
    torch.testing.assert_close(found, torch.autograd.grad(
        (linear_distillation(x, weight, reduction="none", **rest) * upstream).sum(), weight)[0])


def test_leading_dimensions_and_no_grad(device):
    x, weight, rest = problem(device=device)
    flat = linear_distillation(x, weight, reduction="none", **rest)
    rest["teacher_input"] = rest["teacher_input"].view(3, 4, 9)
    with torch.no_grad():
        found = linear_distillation(x.view(3, 4, 6), weight, reduction="none", **rest)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found.flatten(), flat)


def test_double_backward_and_compile(device):
    x, weight, rest = problem(4, 3, 7, 5, torch.float64, device)
    target = torch.tensor([1, -100, 3, 6], device=device)

    def loss(x, weight):
        return linear_distillation(x, weight, divergence="jsd", target=target, hard_weight=0.3, **rest)
    assert torch.autograd.gradcheck(loss, (x, weight))
    assert torch.autograd.gradgradcheck(loss, (x, weight))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(x, weight), (x, weight)) for f in (loss, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_module(device):
    x, weight, rest = problem(device=device)
    module = fastlm.nn.LinearDistillationLoss("jsd", beta=0.2, temperature=2.0)
    torch.testing.assert_close(module(x, weight, **rest), linear_distillation(
        x, weight, divergence="jsd", beta=0.2, temperature=2.0, **rest))
    assert "divergence='jsd', beta=0.2" in repr(module)


@pytest.mark.parametrize("option", [
    {"divergence": "jsd"}, {"divergence": "jsd", "beta": 0.2}, {"temperature": 2.0}, {"hard_weight": 0.3},
    {"ignore_index": 5}, {"reduction": "sum"}], ids=str)
def test_module_passes_on(option, device):
    x, weight, rest = problem(device=device)
    rest["target"] = torch.arange(12, device=device)
    found = fastlm.nn.LinearDistillationLoss(**option)(x, weight, **rest)
    torch.testing.assert_close(found, linear_distillation(x, weight, **option, **rest))
    assert not torch.equal(found, linear_distillation(x, weight, **rest))


def test_all_ignored_gives_nan_and_zero_gradients(device):
    x, weight, rest = problem(device=device)
    loss = linear_distillation(x, weight, target=torch.full((12,), -100, device=device), hard_weight=0.5, **rest)
    assert loss.isnan()
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, weight)))


X, W, T = torch.randn(4, 3), torch.randn(7, 3), torch.randn(4, 7)
TOPK = (torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64))
BAD = {
    "no teacher": (dict(teacher_logits=None), ValueError, "exactly one, got 0"),
    "two teachers": (dict(teacher_topk=TOPK), ValueError, "exactly one, got 2"),
    "divergence": (dict(divergence="kl"), ValueError, "divergence must be one of"),
    "reduction": (dict(reduction="batchmean"), ValueError, "reduction must be one of"),
    "beta": (dict(beta=1.5), ValueError, r"beta must be in \[0, 1\]"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be positive"),
    "hard weight": (dict(hard_weight=0.5), ValueError, "there is no target"),
    "logits": (dict(teacher_logits=T[:, :6]), ValueError, r"teacher_logits has shape \[4, 6\], expected \[4, 7\]"),
    "width": (dict(student_weight=torch.randn(7, 5)), ValueError, "expected student_input"),
    "bias": (dict(student_bias=torch.randn(6)), ValueError, "student_bias has shape"),
    "dtype": (dict(student_weight=W.double()), RuntimeError, "student_weight is torch.float64"),
    "no tensor": (dict(teacher_logits=[1.0]), TypeError, "teacher_logits must be a Tensor"),
    "target": (dict(target=torch.tensor([0, 1, 2, 7])), IndexError, r"target.*\[3\] is 7"),
    "target dtype": (dict(target=torch.zeros(4)), RuntimeError, "target must be int64"),
    "weight alone": (dict(teacher_weight=W), ValueError, "teacher_weight without teacher_input"),
    "reverse of top-k": (dict(teacher_logits=None, teacher_topk=TOPK, divergence="reverse_kl"), ValueError, "infinite"),
    "index": (dict(teacher_logits=None, teacher_topk=(TOPK[0], TOPK[1] + 7)), IndexError,
              r"teacher_topk's indices\[0, 0\] is 7, expected 0 to 6$"),
    "pair": (dict(teacher_logits=None, teacher_topk=TOPK[0]), TypeError, "must be a pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_distillation(**dict(student_input=X, student_weight=W, teacher_logits=T) | change)

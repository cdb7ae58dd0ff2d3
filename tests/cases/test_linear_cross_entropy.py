"""linear_cross_entropy beyond the matrix: faults that other libraries had, errors, autocast, second order."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.ops import linear_cross_entropy, shift_targets
from fastlm.ops.linear_cross_entropy import few, op
from tests.parity import absent, skip_misinterpreted


@pytest.fixture(autouse=True)
def blocks():
    """Small problems run stock by default; what is tested here are the kernels, where they can take the call."""
    with fastlm.backend("triton", "native", "blocked", "torch"):
        yield


def problem(n=33, h=12, v=70, dtype=torch.float32, device="cpu"):
    x = torch.randn(n, h, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(v, h, dtype=dtype, device=device, requires_grad=True)
    return x, weight, torch.randint(v, (n,), device=device)


def grads(loss, *inputs, **kwargs):
    return torch.autograd.grad(loss, inputs, **kwargs)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"return_aux": True}])
@pytest.mark.parametrize("name", ["torch", "native", "blocked"])
def test_class_156_in_8_bits_is_not_ignored(name, options):
    """Where -100 becomes 156."""
    if reason := absent(op, name, "cpu"):
        pytest.skip(reason)
    x, weight, target = torch.randn(3, 4), torch.randn(200, 4), torch.tensor([156, 3, 5])
    with fastlm.backend(name):
        found, expected = (linear_cross_entropy(x, weight, t, **options) for t in (target.to(torch.uint8), target))
    torch.testing.assert_close(found, expected)


def test_a_float32_class_weight_of_halves():
    x, weight, factors = torch.randn(5, 8).bfloat16(), torch.randn(7, 8).bfloat16(), torch.rand(7)
    target = torch.randint(7, (5,))
    found = linear_cross_entropy(x, weight, target, weight=factors)
    torch.testing.assert_close(found, linear_cross_entropy(x, weight, target, weight=factors.bfloat16()))


def test_runs_a_block_at_a_time_by_default(monkeypatch):
    monkeypatch.setattr(fastlm.dispatch, "_order", ())
    assert fastlm.explain(linear_cross_entropy, *problem(40, 128, 4000))[0].ran in ("native", "blocked")
    assert fastlm.explain(linear_cross_entropy, *problem())[0].ran == "torch"


def test_one_row_without_batch_dimension(device):
    x, weight, target = problem(1, device=device)
    for reduction in ("mean", "none"):
        ours = linear_cross_entropy(x[0], weight, target[0], reduction=reduction)
        stock = F.cross_entropy(F.linear(x[0], weight), target[0], reduction=reduction)
        assert ours.shape == stock.shape == ()
        torch.testing.assert_close(ours, stock)


def test_upstream_gradient_is_applied_and_left_alone(device):
    x, weight, target = problem(device=device)
    loss = linear_cross_entropy(x, weight, target)
    upstream = torch.tensor(3.0, device=device)
    found = grads(loss, x, weight, grad_outputs=upstream, retain_graph=True)
    assert upstream.item() == 3.0
    again = grads(loss, x, weight, grad_outputs=upstream)
    expected = grads(3 * F.cross_entropy(F.linear(x, weight), target), x, weight)
    for a, b, c in zip(found, again, expected, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("sample", ["none", "bias", "everything, mean", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["native", "blocked", "triton"])
def test_several_blocks_of_rows_and_tiles_of_classes(name, dtype, sample, small_blocks, device):
    small_blocks(op, name, dtype, sample, device)


@pytest.mark.parametrize("name", ["native", "blocked", "triton"])
def test_entropy_of_more_classes_than_a_kernel_reads_at_once(name, device):
    x, weight, target = problem(5, 16, 9001, device=device)
    if reason := op.implementations[name].cannot(x, weight, target, None, None, "mean", -100, 0.0, None, 0.0, 0.0, True,
                                                 ""):
        pytest.skip(reason)
    with fastlm.backend(name):
        _, found = linear_cross_entropy(x, weight, target, return_aux=True)
    log_p = F.linear(x.double(), weight.double()).log_softmax(1)
    torch.testing.assert_close(found.entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=1e-5)


def test_loss_without_gradients(device):
    x, weight, target = problem(device=device)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight), target).detach())
    assert not loss.requires_grad


def test_accumulating_gradients_adds_up(device):
    x, weight, target = problem(64, device=device)
    for part in (slice(0, 30), slice(30, 64)):
        linear_cross_entropy(x[part], weight, target[part], reduction="sum").backward()
    expected = grads(F.cross_entropy(F.linear(x, weight), target, reduction="sum"), x, weight)
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


@pytest.mark.parametrize("ignore_index", [None, -100, 3, 255])
def test_ignore_index(ignore_index, device):
    x, weight, target = problem(device=device)
    target[:5] = -100 if ignore_index is None else ignore_index
    expected = F.cross_entropy(F.linear(x, weight), target, ignore_index=-100 if ignore_index is None else ignore_index)
    found = linear_cross_entropy(x, weight, target, ignore_index=ignore_index)
    torch.testing.assert_close(found, expected)
    for a, b in zip(grads(found, x, weight), grads(expected, x, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"z_loss": 0.1, "softcap": 2.0, "label_smoothing": 0.1}],
                         ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("names", [("triton", "native"), ("blocked",), ("torch",), ("reference",)], ids=lambda n: n[-1])
def test_all_ignored_gives_nan_and_zero_gradients(names, options, device):
    x, weight, target = problem(device=device)
    with fastlm.backend(*names):
        loss = linear_cross_entropy(x, weight, torch.full_like(target, -100), **options)
    assert loss.isnan()
    assert all((g == 0).all() for g in grads(loss, x, weight))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_whole_with_ignored_targets(reduction, device):
    x, weight, target = problem(device=device)
    target[::4] = -100

    def loss(x, weight, target):
        return linear_cross_entropy(x, weight, target, reduction=reduction, label_smoothing=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    eager, compiled = (grads(f(x, weight, target).sum(), x, weight) for f in (loss, compiled))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_gives_a_float32_loss(device):
    x, weight, target = problem(256, 64, 1000, device=device)
    with torch.autocast(device, torch.bfloat16), fastlm.backend("blocked"):
        found = linear_cross_entropy(x, weight, target)
        expected = F.cross_entropy(F.linear(x, weight), target)
    assert found.dtype is expected.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # stock rounds the logits
    for a, b in zip(grads(found, x, weight), grads(expected, x, weight), strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(reduction, device):
    x, weight, target = problem(5, 3, 7, torch.float64, device)
    bias = torch.randn(7, dtype=torch.float64, device=device, requires_grad=True)

    def loss(x, weight, bias):
        return linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=0.2)
    assert torch.autograd.gradcheck(loss, (x, weight, bias))
    assert torch.autograd.gradgradcheck(loss, (x, weight, bias))


def test_functional_transforms(device):
    x, weight, target = problem(6, 4, 9, device=device)
    found = torch.func.grad(linear_cross_entropy)(x.detach(), weight.detach(), target)
    torch.testing.assert_close(found, grads(F.cross_entropy(F.linear(x, weight), target), x)[0])
    per_sample = torch.func.vmap(torch.func.grad(linear_cross_entropy), (0, None, 0))(
        x.detach()[:, None], weight.detach(), target[:, None])
    for i in range(6):
        expected = grads(F.cross_entropy(F.linear(x[i:i + 1], weight), target[i:i + 1]), x)[0][i]
        torch.testing.assert_close(per_sample[i, 0], expected)


def test_accumulation_in_bf16_does_not_drift():
    """A weight gradient summed over many blocks is as near to float64 as stock's, which sums in one product."""
    x, weight, target = problem(2048, 8, 40000, torch.bfloat16)
    exact = grads(F.cross_entropy(F.linear(x.double(), weight.double()), target), weight)[0].double()
    stock = grads(F.cross_entropy(F.linear(x, weight), target), weight)[0].double()
    with fastlm.backend("blocked"):
        ours = grads(linear_cross_entropy(x, weight, target), weight)[0].double()
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()


def test_stock_options_are_honoured():
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    x, weight, target = problem()
    if options is None:
        with pytest.raises(TypeError, match=r"2\.13"):
            linear_cross_entropy(x, weight, target, options=object())
        return
    calls = fastlm.explain(linear_cross_entropy, x, weight, target, options=options())
    assert calls[0].ran == "torch"
    assert "options" in calls[0].declined["blocked"]


def logits_loss(x, weight, target, bias=None, softcap=None, z_loss=0.0, **options):
    """Return the loss by the definition, from whole logits, and those."""
    logits = F.linear(x, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    kept = (target != -100).to(logits.dtype)
    lse = logits.logsumexp(1)
    loss = F.cross_entropy(logits, target, reduction="none", **options) + z_loss * lse.square() * kept
    return loss, logits


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_softcap_and_z_loss(reduction, device):
    """A softcap has been left out without a word (ml-cross-entropy 48)."""
    x, weight, target = problem(device=device)
    target[:4] = -100
    found = linear_cross_entropy(x, weight, target, softcap=3.0, z_loss=0.05, reduction=reduction)
    losses, _ = logits_loss(x, weight, target, softcap=3.0, z_loss=0.05)
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 29}[reduction]
    torch.testing.assert_close(found, expected)
    for a, b in zip(grads(found.sum(), x, weight), grads(expected.sum(), x, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_auxiliary_numbers(device):
    x, weight, target = problem(device=device)
    target[:4] = -100
    target[4:9] = F.linear(x, weight)[4:9].argmax(1)
    loss, aux = linear_cross_entropy(x, weight, target, return_aux=True)
    _, logits = logits_loss(x, weight, target)
    log_probs = logits.log_softmax(1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    torch.testing.assert_close(aux.log_prob[4:], log_probs[4:].gather(1, target[4:, None]).squeeze(1))
    torch.testing.assert_close(aux.entropy, -(log_probs.exp() * log_probs).sum(1))
    assert torch.equal(aux.correct, logits.argmax(1) == target)
    assert aux.correct.dtype is torch.bool
    assert (aux.log_prob[:4] == 0).all()
    assert not any(a.requires_grad for a in aux)
    _, aux = linear_cross_entropy(x.view(3, 11, 12), weight, target.view(3, 11), return_aux=True)
    assert aux.entropy.shape == (3, 11)


def test_any_leading_dimensions(device):
    x, weight, target = problem(24, device=device)
    flat = linear_cross_entropy(x, weight, target, reduction="none")
    found = linear_cross_entropy(x.view(2, 3, 4, 12), weight, target.view(2, 3, 4), reduction="none")
    assert torch.equal(found, flat.view(2, 3, 4))
    soft = torch.rand(24, 70, device=device).softmax(1)
    torch.testing.assert_close(linear_cross_entropy(x.view(4, 6, 12), weight, soft.view(4, 6, 70)),
                               F.cross_entropy(F.linear(x, weight), soft))


def test_a_loss_as_large_as_float32_allows(device):
    """The z-loss of 0 is 0, though the square of the log-sum-exp is infinite."""
    x, weight, target = problem(device=device)
    found = linear_cross_entropy(x * 1e25, weight, target)
    torch.testing.assert_close(found, F.cross_entropy(F.linear(x * 1e25, weight), target))


def test_dtype_is_the_wider_one_of_logits_and_probabilities(device):
    x, weight, _ = problem(6, dtype=torch.bfloat16, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        soft = torch.rand(6, 70, device=device).softmax(1).to(dtype)
        found, expected = linear_cross_entropy(x, weight, soft), F.cross_entropy(F.linear(x, weight), soft)
        assert found.dtype is expected.dtype


def test_probabilities_that_need_a_gradient_run_stock(device):
    x, weight, _ = problem(6, device=device)
    soft = torch.rand(6, 70, device=device).softmax(1).requires_grad_()
    calls = fastlm.explain(linear_cross_entropy, x, weight, soft)
    assert calls[0].ran == "torch"
    found, expected = linear_cross_entropy(x, weight, soft), F.cross_entropy(F.linear(x, weight), soft)
    torch.testing.assert_close(grads(found, soft)[0], grads(expected, soft)[0])


def test_shift_targets_is_a_shift_of_the_hidden_states(device):
    x, weight, labels = problem(24, device=device)
    hidden, labels = x.view(2, 12, 12), labels.view(2, 12)
    found = linear_cross_entropy(hidden, weight, shift_targets(labels))
    expected = F.cross_entropy(F.linear(hidden[:, :-1], weight).flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found, expected)
    assert shift_targets(labels[:, :0]).shape == (2, 0)
    assert shift_targets(labels[0, :1], ignore_index=7).tolist() == [7]
    with pytest.raises(TypeError, match="labels must be a Tensor"):
        shift_targets([1, 2])


def test_tied_weights(device):
    """The same parameter as embedding and head gets both gradients."""
    weight = torch.randn(70, 12, device=device, requires_grad=True)
    tokens, target = torch.randint(70, (2, 33), device=device)
    found, expected = (grads(fn(F.embedding(tokens, weight).tanh()), weight)[0] for fn in (
        lambda x: linear_cross_entropy(x, weight, target),
        lambda x: F.cross_entropy(F.linear(x, weight), target)))
    torch.testing.assert_close(found, expected)


def test_gradients_that_forward_made_serve_more_than_one_backward(device):
    """They are scaled in place only where nothing reads them again."""
    x, weight, target = problem(device=device)
    loss = linear_cross_entropy(x, weight, target)
    first = grads(2 * loss, x, weight, retain_graph=True)
    for g in first:
        g.mul_(0)
    second = grads(loss, x, weight, retain_graph=True)
    kept = [g.clone() for g in second]
    third = grads(loss, x, weight, grad_outputs=torch.tensor(0.5, device=device))
    for a, b, c in zip(second, kept, third, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, 0.5 * b)


def test_accumulation_over_1000_steps_does_not_drift(device):
    """bf16 sums of a weight gradient lose what is small beside them (Liger-Kernel issue 1391): each call sums in
    float32 and rounds once, so that 1000 accumulated calls stay as near to float64 as stock's do."""
    skip_misinterpreted(torch.bfloat16)
    x, weight, target = problem(1000, 4, 17, torch.bfloat16, device)
    found, stock = (torch.zeros(17, 4, device=device) for _ in range(2))
    for i in range(1000):
        row = slice(i, i + 1)
        found += grads(linear_cross_entropy(x[row], weight, target[row]), weight)[0]
        stock += grads(F.cross_entropy(F.linear(x[row], weight), target[row]), weight)[0]
    w = weight.detach().double().requires_grad_()
    (exact,) = grads(F.cross_entropy(F.linear(x.double(), w), target, reduction="sum"), w)
    whole = grads(linear_cross_entropy(x, weight, target, reduction="sum"), weight)[0]
    assert (found - exact).abs().max() <= 2 * (stock - exact).abs().max()
    assert (whole - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("option", [
    {"reduction": "sum"}, {"weight": torch.arange(7) / 7}, {"ignore_index": 3}, {"label_smoothing": 0.2},
    {"z_loss": 0.3}, {"softcap": 0.5}, {"return_aux": True}], ids=str)
def test_module_passes_on(option):
    module, x, target = fastlm.nn.LinearCrossEntropyLoss(4, 7, **option), torch.randn(9, 4), torch.arange(9) % 7
    found = module(x, target)
    torch.testing.assert_close(found, linear_cross_entropy(x, module.linear.weight, target, **option))
    plain = linear_cross_entropy(x, module.linear.weight, target)
    assert "return_aux" in option or not torch.equal(found, plain)


def ranks_of_two(rank, path, problem, classes, options, results):
    """Run one rank of a process group of two, which share the classes, and put its numbers into `results`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    part = slice(0, classes) if rank == 0 else slice(classes, None)
    x, weight, bias, class_weight, target = problem
    leaves = [t.clone().requires_grad_() for t in (x, weight[part], bias[part])]
    found = linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2],
                                 weight=None if class_weight is None else class_weight[part],
                                 process_group=torch.distributed.group.WORLD, return_aux=True, **options)
    gradients = grads(found[0], *leaves, grad_outputs=torch.linspace(0.5, 1, found[0].numel()).view(found[0].shape))
    results.put((rank, [t.detach().numpy() for t in (found[0], *found[1], *gradients)]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("weighted", [False, True])
def test_classes_shared_by_two_processes(weighted, tmp_path):
    """Loss, auxiliary numbers and gradients are those of one process, on uneven shards."""
    x, weight, target = problem()
    ignored = 7 if weighted else -100  # a class of the first shard, which has a weight
    target[:4] = ignored
    bias, class_weight = torch.randn(70), torch.rand(70) if weighted else None
    options = dict(reduction="mean" if weighted else "none", ignore_index=ignored, label_smoothing=0.1, z_loss=0.01,
                   softcap=4.0)
    inputs = [x.detach(), weight.detach(), bias, class_weight, target]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=ranks_of_two, args=(rank, tmp_path / "store", inputs, 30, options, results))
                 for rank in range(2)]
    for p in processes:
        p.start()
    found = dict(results.get(timeout=100) for _ in processes)
    for p in processes:
        p.join(60)
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    loss, aux = linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], weight=class_weight,
                                     return_aux=True, **options)
    d_x, d_weight, d_bias = grads(loss, *leaves, grad_outputs=torch.linspace(0.5, 1, loss.numel()).view(loss.shape))
    for rank, part in ((0, slice(0, 30)), (1, slice(30, None))):
        whole = [loss.detach(), *aux, d_x, d_weight[part], d_bias[part]]
        for a, b in zip(found[rank], whole, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b)


BAD = {
    "softcap": (dict(softcap=-1.0), ValueError, "softcap must be positive"),
    "no softcap": (dict(softcap=torch.inf), ValueError, "softcap must be positive"),
    "aux of probabilities": (dict(target=torch.rand(6, 7), return_aux=True), ValueError, "needs class indices"),
    "ignored probabilities": (dict(target=torch.rand(6, 7), ignore_index=1), RuntimeError, "ignore_index does not go"),
    "process group": (dict(process_group="world"), TypeError, "process_group must be"),
    "input": (dict(input=torch.tensor(1.0)), RuntimeError, "input must be"),
    "width": (dict(linear_weight=torch.randn(7, 5)), RuntimeError, "linear_weight must be"),
    "target shape": (dict(target=torch.zeros(9, dtype=torch.int64)), ValueError, "target has shape"),
    "target dtype": (dict(target=torch.zeros(6, dtype=torch.int32)), RuntimeError, "int64"),
    "bias": (dict(linear_bias=torch.randn(8)), RuntimeError, "linear_bias has shape"),
    "class weights": (dict(weight=torch.randn(8)), RuntimeError, "weight is"),
    "class weights' dtype": (dict(weight=torch.randn(7).double()), RuntimeError, "weight is"),
    "reduction": (dict(reduction="average"), ValueError, "reduction must be one of"),
    "smoothing": (dict(label_smoothing=1.5), RuntimeError, "label_smoothing"),
    "no tensor": (dict(input=[1.0]), TypeError, "input must be a Tensor"),
    "integers": (dict(input=torch.ones(6, 4, dtype=torch.int64)), RuntimeError, "floating point"),
    "range": (dict(target=torch.tensor([0, 1, 2, 3, 4, 7])), IndexError, "target 7 is out of bounds"),
    "negative": (dict(target=torch.tensor([0, 1, 2, 3, 4, -1])), IndexError, "target -1 is out of bounds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    good = dict(input=torch.randn(6, 4), linear_weight=torch.randn(7, 4), target=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(error, match=message):
        linear_cross_entropy(**good | change)


def test_meta_tensors():
    target = torch.zeros(3, dtype=torch.int64, device="meta")
    module = fastlm.nn.LinearCrossEntropyLoss(4, 3, device="meta")
    assert module(torch.randn(3, 4, device="meta"), target).is_meta


def test_forward_mode_runs_stock():
    """Kernels have no forward-mode derivative: by default stock runs, asked for by name they refuse."""
    x, weight, target = problem(6, 4, 9)
    found = torch.func.hessian(lambda x: linear_cross_entropy(x, weight, target))(x.detach())
    expected = torch.func.hessian(lambda x: F.cross_entropy(F.linear(x, weight), target))(x.detach())
    torch.testing.assert_close(found, expected)
    with fastlm.backend("blocked"), pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: linear_cross_entropy(x, weight, target), (x.detach(),), (x.detach(),))


@pytest.mark.parametrize(("rows", "inputs", "classes", "trains", "plain", "fast"), [
    (4, 256, 8000, True, False, False), (4, 256, 9000, True, True, True), (17, 256, 2000, True, False, False),
    (4, 256, 9000, False, True, False), (64, 256, 16000, False, True, False), (66, 256, 16000, False, True, True),
    (100, 64, 16000, True, True, False), (140, 64, 16000, True, True, True)])
def test_where_there_is_enough_to_compute(rows, inputs, classes, trains, plain, fast):
    x, weight = (torch.empty(*size, inputs, device="meta", requires_grad=trains) for size in ((rows,), (classes,)))
    assert [few(x, weight, fast_products) is None for fast_products in (False, True)] == [plain, fast]

"""Run the Gluon kernels of attention in plain Python: a thread for each of their partitions, PyTorch for products.

Copies land late and at random, memory that they are to fill holds NaN until then, and who waits in vain fails. So it
checks numbers, indices, and the protocol of the barriers; of layouts and registers it knows nothing.
"""

import inspect
import random
import threading
from types import SimpleNamespace

import torch

from fastlm.ops import attention_hopper_backward_kernels_triton as backward_source
from fastlm.ops import attention_hopper_kernels_triton as forward_source
from fastlm.ops import attention_hopper_launch_triton as hopper

PATIENCE = 30  # seconds
ADDING = threading.Lock()


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes that are expected have come."""

    def init(self, count):
        self.changed = threading.Condition()
        self.count = self.pending = count
        self.phase = self.bytes = 0

    def change(self, arrivals=0, size=0):
        with self.changed:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrivals than a phase has"
            if self.pending == 0 and self.bytes == 0:
                self.pending, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: (self.phase - 1) % 2 == parity, PATIENCE), "deadlock"


class Memory:
    """Shared memory: a tensor, or a list of barriers."""

    def __init__(self, x):
        self.x, self.dtype = x, getattr(x, "dtype", None)

    def index(self, i):
        return Memory(self.x[i]) if torch.is_tensor(self.x) else self.x[i]

    def reshape(self, shape):
        return Memory(self.x.view(shape))

    def permute(self, order):
        return Memory(self.x.permute(*order))

    def store(self, value):
        self.x.copy_(value)

    def load(self, layout):
        return self.x.clone()

    def _reinterpret(self, dtype, shape, layout):
        return Tiles(self)


class Tiles:
    """Memory `[n, …, R, 64·c]` as n·c tiles of `[R, 64]`, which is how it is swizzled."""

    def __init__(self, memory):
        self.x = memory.x.flatten(1, -3) if memory.x.dim() > 3 else memory.x[:, None]

    def index(self, i):
        many = self.x.size(3) // 64
        return Memory(self.x[i // many, 0, :, i % many * 64:i % many * 64 + 64])


class Descriptor:
    layout = None

    def __init__(self, x, rows, columns=None):
        self.x, self.rows, self.columns, self.dtype = x, rows, columns or x.size(3), x.dtype
        self.block_type = SimpleNamespace(nbytes=rows * self.columns * 2)


class Numbers:
    """The descriptor of contiguous numbers."""

    layout = None

    def __init__(self, x, count):
        self.x, self.count, self.dtype = x.reshape(-1), count, x.dtype
        self.block_type = SimpleNamespace(nbytes=count * x.element_size())


class Pointer:
    def __init__(self, x, at=0):
        self.x, self.at = x, at

    def to(self, dtype):
        return self

    def __add__(self, n):
        return Pointer(self.x, self.at + n)


def copy_in(descriptor, at, barrier, memory):
    def land():
        memory.x.zero_()
        if isinstance(descriptor, Numbers):
            piece = descriptor.x[at[0]:at[0] + descriptor.count]
            memory.x[:len(piece)] = piece
        else:
            batch, head, row, column = at
            piece = descriptor.x[batch, head, row:row + descriptor.rows, column:column + descriptor.columns]
            memory.x[0, 0, :piece.size(0), :piece.size(1)] = piece
        barrier.change(size=-descriptor.block_type.nbytes)

    memory.x.fill_(float("nan") if memory.x.is_floating_point() else 7)
    threading.Timer(random.random() * 1e-3, land).start()


def copy_out(descriptor, at, memory):
    batch, head, row, _ = at
    rows = max(0, min(descriptor.rows, descriptor.x.size(2) - row))
    descriptor.x[batch, head, row:row + rows] = memory.x[0, 0, :rows]


def product(a, b, acc, use_acc=True, is_async=False):
    a = a.x if isinstance(a, Memory) else a
    return a.float() @ b.x.float() + (acc if use_acc else 0)


def assembly(code, constraints, args, dtype, is_pure, pack):
    if "xor" in code:
        mixed = args[0].long() & 0xFFFFFFFF
        return (mixed ^ mixed >> 15).int()
    if "selp" in code:
        return torch.where(args[0] > args[1], args[2], args[3] if len(args) > 3 else 0.0)
    if "red.global" in code:
        return add(*args)
    if "relu" in code:
        return args[0].clamp(min=0).to(dtype)
    if code.startswith("cvt"):
        return torch.stack(args, -1).to(torch.bfloat16 if ".bf16x2" in code else torch.float16)
    return args[0].unbind(-1)


def add(pointer, tile):
    """Add a tile of an accumulator: 4 lanes of a warp to 16 adjacent numbers, each its 2 columns of 2 rows."""
    r, c = torch.arange(tile.size(0))[:, None], torch.arange(tile.size(1))
    at = pointer.at + r % 16 // 8 * 2 + c % 2
    assert (pointer.at % 4 == 0).all() and at.unique().numel() == tile.numel() and not tile.isnan().any()
    with ADDING:
        pointer.x.view(-1).index_add_(0, at.flatten(), tile.flatten())


def choose(condition, a, b):
    return torch.where(condition, a, b) if torch.is_tensor(condition) else a if condition else b


def either(tensors, numbers):
    def call(a, b):
        many = torch.is_tensor(a) or torch.is_tensor(b)
        return tensors(torch.as_tensor(a), torch.as_tensor(b)) if many else numbers(a, b)
    return call


def load(pointer, mask=None, other=0):
    if mask is None:
        return pointer.x.view(-1)[pointer.at]
    return torch.where(mask, pointer.x.view(-1)[torch.where(mask, pointer.at, 0)], other)


def store(pointer, value, mask):
    pointer.x.view(-1)[pointer.at[mask]] = value[mask]


def allocate(dtype, shape, layout):
    return Memory([Barrier() for _ in range(shape[0])] if dtype == "barriers" else torch.zeros(shape, dtype=dtype))


def ignore(*args, **kwargs):
    return None


def kernel(name, modules, here, programs, failures):
    """Return a kernel of the last of these modules as a function for program `here` of so many."""
    def specialize(partitions, warps, registers):
        def run(part, args):
            try:
                part(*args)
            except BaseException as error:
                failures.append(error)
        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    gl = SimpleNamespace(
        tensor=None, constexpr=None, static_range=range, minimum=either(torch.minimum, min), load=load,
        maximum=either(torch.maximum, max), program_id=lambda axis: here, num_programs=lambda axis: programs,
        where=choose, arange=lambda start, end, layout: torch.arange(start, end), SliceLayout=ignore, store=store,
        zeros=lambda shape, dtype, layout: torch.zeros(shape), reshape=lambda x, shape: x.reshape(shape),
        max=lambda x, dim: x.amax(dim), sum=lambda x, dim: x.sum(dim), exp2=torch.exp2, sqrt=torch.sqrt, log=torch.log,
        split=lambda x: x.unbind(-1), join=lambda a, b: torch.stack((a, b), -1), inline_asm_elementwise=assembly,
        convert_layout=lambda x, layout, assert_trivial=False: x, NVMMADistributedLayout=ignore,
        DotOperandLayout=ignore, NVMMASharedLayout=ignore, abs=torch.abs, int32=torch.int32,
        float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16,
        int64="barriers", thread_barrier=ignore, warp_specialize=specialize, allocate_shared_memory=allocate)
    names = {
        "gl": gl, "gluon": SimpleNamespace(jit=lambda fn=None, **options: fn or (lambda fn: fn)),
        "mbarrier": SimpleNamespace(init=lambda b, count: b.init(count),
                                    wait=lambda b, parity, pred=True: b.wait(parity) if pred else None,
                                    arrive=lambda b, count: b.change(count), MBarrierLayout=ignore,
                                    expect=lambda b, size: b.change(1, size)),
        "tma": SimpleNamespace(async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out,
                               store_wait=ignore),
        "warpgroup_mma": product, "warpgroup_mma_wait": lambda count, deps: deps if len(deps) > 1 else deps[0],
        "allocate": lambda shape, layout: Memory(torch.zeros(shape, dtype=torch.int64)), "fence_async_shared": ignore,
        "LN_2": 0.6931471805599453, "LOG2_E": 1.4426950408889634, "MINUS_INFINITY": float("-inf"),
        "MIX": 0x9E3779B9 - (1 << 32)}
    for module in modules:
        text = inspect.getsource(module)
        text = text[text.index("\nclass "):].replace(".type.layout", ".device").replace(".to(gl.int64)", "")
        text = text.replace(".to(gl.float32, bitcast=True)", ".int().view(gl.float32)")
        text = text.replace("gl.allocate_shared_memory(gl.int64, [STAGES, M]", "allocate([STAGES, M]")
        exec(compile("from typing import NamedTuple\n" + text, module.__file__, "exec"), names)
    return names[name]


def run(name, modules, programs, arguments):
    """Run a kernel's programs one after the other."""
    arguments.pop("num_warps")
    pointers = {name: Pointer(x) for name, x in arguments.items() if torch.is_tensor(x)}
    failures = []
    for here in range(programs):
        kernel(name, modules, here, programs, failures)(**arguments | pointers)
        assert not failures, failures


def forward(call, programs, longest, monkeypatch):
    """Return (output, log-sum-exp) of a call of attention from the emulated kernel, launched with so many programs."""
    monkeypatch.setattr(hopper, "describe", Descriptor)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: programs)
    out = torch.full(call.query.shape, float("nan"), dtype=call.query.dtype)
    lse = torch.full(call.query.shape[:3], float("nan"))
    _, (programs,), arguments = hopper.plan(call, out, lse, longest)
    run("hopper_kernel", [forward_source], programs, arguments)
    return out, lse


def backward(call, sums, delta, dout, total, longest, monkeypatch):
    """Return the gradients of keys and values, and add that of queries to `total`, as `hopper.plan_backward` plans."""
    monkeypatch.setattr(hopper, "describe", Descriptor)
    monkeypatch.setattr(hopper, "describe_numbers", Numbers)
    dk, dv = (torch.full_like(x, float("nan")) for x in (call.key, call.value))
    _, (programs,), arguments = hopper.plan_backward(call, sums, delta, dout, total, dk, dv, longest)
    run("hopper_backward_kernel", [forward_source, backward_source], programs, arguments)
    return dk, dv

"""Masked and scaled softmax by the kernel of csrc/rows.h; torch's plain ones read and write once already."""

import torch

import fastlm._native as _native
from fastlm.autograd import Differentiable, blank
from fastlm.ops.cpu import cannot_here, loses_below, on_amx
from fastlm.ops.softmax import LEAST, collapse, gradient
from fastlm.ops.tensors import addresses, adjacent

ACCEPTS = {"row of 1", "row of 127", "row of 129", "row of 1000", "no mask", "by key", "by head", "by query and key",
           "by query", "few kept", "nothing kept", "negative scale", "row in pieces", "no rows", "empty rows"}
DTYPES = (torch.float32, torch.bfloat16)


def cannot(x, dim, mask, scale, log):
    if dim % max(x.dim(), 1) != x.dim() - 1:
        return "dim is not the last"
    return cannot_here(x, DTYPES)


def loses(x, dim, mask, scale, log):
    half = x.dtype is torch.bfloat16 and on_amx(_native)
    least = LEAST if _native.cpu == "intel" and not half else 1 << 17
    return loses_below(_native, (least, least), x)


def run(x, dim, mask, scale, log):
    return _softmax((x, mask), scale)[0]


def forward(tensors, needs, scale):
    x, mask = tensors
    y = x.new_empty(x.shape)
    if not y.numel():
        return [y]
    cols, threads = x.size(-1), torch.get_num_threads()
    sizes, strides, by_column = [1, 1], [0, 0, 0], 0
    rows = adjacent(x.reshape(-1, cols))
    if mask is not None:
        by_column = mask.stride(-1)
        if by_column not in (0, 1) or len(shape := collapse(x.shape[:-1], mask.stride()[:-1])) > 3:
            mask, by_column = mask.contiguous(), 1
            shape = collapse(x.shape[:-1], mask.stride()[:-1])
        shape = [(1, (0,))] * (3 - len(shape)) + shape
        sizes, strides = [n for n, _ in shape[1:]], [s for _, (s,) in shape]
    workspace = x.new_empty(threads, cols, dtype=torch.float32)
    _native.softmax((*rows.shape, rows.stride(0), *sizes, *strides, by_column), addresses(rows, mask, y, workspace),
                    scale, x.dtype is torch.bfloat16, threads)
    return [y]


def backward(grads, saved, tensors, needs, scale):
    y, (dy,) = tensors[0], grads
    return [torch._softmax_backward_data(dy, y, -1, y.dtype).mul_(scale), None]


def _fake(tensors, needs, scale):
    return [tensors[0].new_empty(tensors[0].shape)]


def _keep(tensors, outputs, needs, scale):
    return [outputs[0], None if tensors[1] is None else blank(tensors[1])]


_softmax = Differentiable("softmax_native", statics="float scale", outputs=1, forward=forward, fake=_fake,
                          backward=backward, keep=_keep,
                          gradient=lambda grads, tensors, needs, scale: [gradient(*grads, tensors[0], -1, scale)])

"""What `attention` and `varlen_attn` share of the kernels of csrc/attention.h: what crosses into C++.

A query that sees nothing has a log-sum-exp of +∞ here: exp(s - lse) is 0.
"""

from types import ModuleType

import torch
from torch import Tensor

from fastlm.ops.attention_common import Options
from fastlm.ops.tensors import accumulator, addresses, adjacent

MOST = 256  # numbers in a head


class Kernels:
    """A call of attention over `[B, H, S, D]`, or over packed sequences, as the kernels take it.

    Args:
        native: the compiled extension.
        query, key, value: `[B, H, Sq, D]`, `[B, H_kv, Sk, D]`, `[B, H_kv, Sk, Dv]`, of one dtype.
        mask: boolean or added to the scores, with four dimensions of 1 or the scores' size, or None.
        sinks, slopes: `[H]` and `[B or 1, H]`, or None.
        spans: `[B, 4]`, int64: first query, queries, first key, keys of each row of the batch; None: all of them.
        ids: documents of queries `[B, Sq]` and keys `[B, Sk]`, or a pair of None.
        options: of `attention_common`, without dropout.
    """

    def __init__(self, native: ModuleType, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                 sinks: Tensor | None, slopes: Tensor | None, spans: Tensor | None,
                 ids: tuple[Tensor | None, Tensor | None], options: Options):
        self.native, self.options, self.dtype = native, options, accumulator(query.dtype)
        self.stored = torch.float32 if query.dtype is torch.float16 else query.dtype  # what the kernels read
        self.query, self.key, self.value = (adjacent(t.to(self.stored)) for t in (query, key, value))
        self.mask = mask
        if mask is not None:
            mask = mask if mask.dtype is torch.bool else mask.to(self.dtype)
            self.mask = mask if mask.size(3) == 1 or mask.stride(3) in (0, 1) else mask.contiguous()
        self.sinks, self.slopes = (None if t is None else t.to(self.dtype).contiguous() for t in (sinks, slopes))
        self.spans, self.ids = spans, [None if t is None else t.long().contiguous() for t in ids]
        self._check()

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Fill `out` `[B, H, Sq, Dv]` and `lse` `[B, H, Sq]`, which may be views with rows side by side."""
        if not self.query.numel() or not self.key.numel() or not self.value.numel():
            out.zero_()
            lse.fill_(torch.inf) if self.sinks is None else lse.copy_(self.sinks[:, None])
            return
        found = out.to(self.stored)  # with what it holds where no sequence is: the kernel leaves that as it is
        self._call(False, found, lse)
        if found is not out:
            out.copy_(found)

    def backward(self, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, dquery: Tensor | None,
                 dkey: Tensor | None, dvalue: Tensor | None, dmask: Tensor | None) -> None:
        """Fill the gradients that are wanted, of dtype `stored`, the mask's of `dtype`.

        Those of tokens of no span, and of what the mask adds where nobody sees it, are left as they are.
        """
        if not self.query.numel() or not self.key.numel() or not self.value.numel():
            for grad in (dquery, dkey, dvalue, dmask):
                None if grad is None else grad.zero_()
            return
        out, dout = (adjacent(t.to(self.stored)) for t in (out, dout))
        if dmask is not None and dmask.size(3) == 1:
            dmask.copy_(self._dmask_of_rows(out, lse, dout, dlse))
            dmask = None
        self._call(True, out, lse, dout, dlse if dlse.count_nonzero() else None, dquery, dkey, dvalue, dmask)

    def new_dmask(self) -> Tensor:
        """Return a tensor for the gradient of the mask: zeros where not each element is written, and once."""
        options, whole = self.options, (*self.query.shape[:3], self.key.size(2))
        skips = (options.is_causal or options.left >= 0 or options.right >= 0 or self.spans is not None
                 or self.ids[0] is not None)
        make = self.mask.new_zeros if skips or self.mask.shape != whole else self.mask.new_empty
        return make(self.mask.shape, dtype=self.dtype)

    def _dmask_of_rows(self, out, lse, dout, dlse):
        """Return the gradient of a mask that adds the same to all scores of a query, `[B or 1, H or 1, Sq or 1, 1]`.

        Σ_j p_j (dp_j - δ) = δ - (δ - dlse)·Σ_j p_j, where all but the sink's share is seen: without a sink and dlse it
        is 0, which the sum over the keys would be but for rounding.
        """
        delta, sink = (out.to(lse.dtype) * dout).sum(3), 0
        if self.sinks is not None:
            sink = (self.sinks[:, None] - lse).exp()
        rows = ((delta * sink + dlse * (1 - sink)) * (lse != torch.inf))[..., None]
        shared = [d for d in range(3) if self.mask.size(d) < rows.size(d)]
        return rows.sum(shared, keepdim=True) if shared else rows

    def dsinks(self, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
        """Return the gradient of the sinks `[H]`."""
        delta = (out.to(lse.dtype) * dout).sum(3) - dlse
        return -((self.sinks[:, None] - lse).exp() * delta).sum((0, 2))

    def _call(self, backward, out, lse, dout=None, dlse=None, dquery=None, dkey=None, dvalue=None, dmask=None):
        options = self.options
        batch, heads, queries, dim = self.query.shape
        kv_heads, keys, value_dim = self.value.shape[1:]
        if self.spans is not None and self.ids[0] is None:  # ids are as far apart as the lengths say
            batch = self.spans.size(0)
            queries, keys = (max(1, self.spans[:, i].max().item()) for i in (1, 3))
        shared = [False] * 4 if dmask is None else [
            size < whole for size, whole in zip(dmask.shape, (batch, heads, queries, keys), strict=True)]
        added = self.mask is not None and self.mask.dtype is not torch.bool
        bias, mask = (self.mask, None) if added else (None, self.mask)
        by_row = self.slopes is not None and self.slopes.size(0) > 1
        sizes = (batch, heads, kv_heads, queries, keys, dim, value_dim, options.is_causal, options.left, options.right,
                 _stride(self.mask, 3), heads if by_row else 0, any(shared), *shared[:2], torch.get_num_threads())
        strided = (*map(_place, (self.query, self.key, self.value)), _shared_place(bias), _shared_place(mask),
                   *map(_place, (out, lse, dout, dlse, dquery, dkey, dvalue)), _shared_place(dmask))
        places = addresses(self.spans, self.sinks, self.slopes, *self.ids)
        call = (backward, self.stored.itemsize, sizes, (options.scale, options.softcap), strided)
        workspace = out.new_empty(self.native.attention(*call, (*places, 0)), dtype=torch.uint8)
        self.native.attention(*call, (*places, workspace.data_ptr()))

    def _check(self):
        """Raise where the kernel would read beyond a tensor: an operator may be called with anything."""
        query, key, value, mask = self.query, self.key, self.value, self.mask
        batch, heads, queries, dim = query.shape
        kv_heads, keys = key.shape[1:3]
        fits = key.shape == (batch, kv_heads, keys, dim) and value.shape[:3] == (batch, kv_heads, keys)
        fits &= kv_heads > 0 and heads % kv_heads == 0
        fits &= self.spans is None or batch == 1 or len(self.spans) == batch  # packed sequences share one row
        whole, rows = (batch, heads, queries, keys), batch if self.spans is None else self.spans.size(0)
        fits &= mask is None or all(size in (1, n) for size, n in zip(mask.shape, whole, strict=True))
        fits &= self.sinks is None or self.sinks.shape == (heads,)
        fits &= self.slopes is None or self.slopes.shape in ((1, heads), (rows, heads))
        fits &= all(t is None or t.shape == (batch, n) for t, n in zip(self.ids, (queries, keys), strict=True))
        if self.spans is not None and self.spans.numel():
            ends = self.spans[:, ::2] + self.spans[:, 1::2]
            fits &= bool((self.spans >= 0).all() and (ends <= ends.new_tensor([queries, keys])).all())
        tensors = (query, key, value, mask, self.sinks, self.slopes, self.spans, *self.ids)
        if not fits or any(t is not None and t.device.type != "cpu" for t in tensors):
            shapes = ", ".join("None" if t is None else f"{list(t.shape)} on {t.device}" for t in tensors)
            raise RuntimeError(f"attention: no call that the kernel can take: {shapes}")


def _place(t: Tensor | None) -> tuple | None:
    """Return where `t` `[B, H, S, …]` lies: its address and strides; packed sequences share one row of the batch."""
    return None if t is None else (t.data_ptr(), _stride(t, 0), *t.stride()[1:3])


def _shared_place(t: Tensor | None) -> tuple | None:
    """Return the same of a tensor that is broadcast where its size is 1."""
    return None if t is None else (t.data_ptr(), *(_stride(t, dim) for dim in range(3)))


def _stride(t: Tensor | None, dim: int) -> int:
    return 0 if t is None or t.size(dim) == 1 else t.stride(dim)

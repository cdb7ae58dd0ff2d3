"""The kernels of csrc/loss.h for tensors: what a loss reads of rows of logits, and the gradient that it sends back.

It is handed the extension by the `*_native.py` files, so that it imports without it.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.head import scaled
from fastlm.ops.tensors import addresses

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")  # in the order of csrc/loss.h


class Logits(NamedTuple):
    """A tile of logits u = scale · softcap(z + bias), softcap(a) = c·tanh(a / c).

    `z` is `[R, C]` with neighbouring columns side by side; `bias` `[C]` has the dtype of the sums, like all else here
    that is not as large as `z`. A softcap of 0 is none.
    """

    z: Tensor
    bias: Tensor | None = None
    softcap: float = 0.0
    scale: float = 1.0


class Targets(NamedTuple):
    """What a row's softmax is compared with: weight · (share · soft + even), and a hit on one class.

    `index` `[R]` has the class, the tile's first one being `first`; `weight` `[C]` is a factor for each class, and
    `soft` `[R, C]` probabilities of the logits' dtype.
    """

    index: Tensor | None = None
    first: int = 0
    weight: Tensor | None = None
    soft: Tensor | None = None
    share: float = 0.0
    even: float = 0.0


def new_sums(rows: int, dtype: torch.dtype, device) -> Tensor:
    """Return what `read` brings up to date, `[R, 6]`, with t the targets without the hit: the highest u,
    Σ exp(u - highest), Σ exp(u - highest)·(u - highest), u of the target, Σ t·u, and Σ t."""
    sums = torch.zeros(rows, 6, dtype=dtype, device=device)
    sums[:, 0] = -torch.inf
    return sums


class LossKernels:
    """csrc/loss.h; `native` is the extension."""

    scaled = staticmethod(scaled)

    def __init__(self, native: ModuleType):
        self.native = native

    def read(self, logits: Logits, targets: Targets, sums: Tensor, entropy: bool = False) -> tuple:
        """Bring `sums` up to date; the third, of the entropy, only where asked. Return what `gradient` wants."""
        tile = _tile(logits.z, targets.first)
        self.native.loss_read(logits.z.element_size(), tile, _logits(logits), _targets(targets), sums.data_ptr(),
                              entropy)
        return logits, targets

    def gradient(self, state: tuple, rows: Tensor, out: Tensor, add: bool = False) -> None:
        """Write or add (up · exp(u - highest) / total - down · t - hit at the target) · softcap' to `out` `[R, C]`.

        `rows` `[R, 5]` has highest, total, up, down and hit; a row is zero where the last three are.
        """
        logits, targets = state
        tile = _tile(logits.z, targets.first)
        self.native.loss_gradient(logits.z.element_size(), tile, _logits(logits), _targets(targets), rows.data_ptr(),
                                  out.data_ptr(), out.stride(0), add)

    def distil(self, student: Logits, teacher: Logits, target: Tensor | None, kind: str, beta: float, soft: float,
               hard: float, scale: Tensor, out: Tensor | None) -> Tensor:
        """Return losses `[R]`: soft·divergence + hard·cross-entropy of `target`, and write their gradients to `out`.

        Both logits' scale is the inverse temperature, which the cross-entropy is without. The divergence is
        beta·Σ q·log(q/·) + (1 - beta)·Σ p·log(p/·), as in csrc/loss.h; `out` `[R, C]`, which may be either's logits,
        gets `scale` `[R]` times the gradient for `student.z`, where it is given.
        """
        found = []
        for logits in (student, teacher):
            sums = new_sums(len(logits.z), scale.dtype, logits.z.device)
            self.read(logits, Targets(), sums)
            found += [sums[:, 0], sums[:, 1].log()]
        rows, value = torch.stack(found, 1), scale.new_zeros(len(scale), 2)
        self.divergence_read(student, teacher, kind, beta, rows, value)
        loss = soft * (beta * value[:, 0] + (1 - beta) * value[:, 1])
        if hard:
            sums = new_sums(len(student.z), scale.dtype, scale.device)
            state = self.read(student._replace(scale=1.0), Targets(target), sums)
            loss = loss + hard * (sums[:, 1].log() - (sums[:, 3] - sums[:, 0]))
        if out is not None:
            self.divergence_gradient(student, teacher, kind, beta, rows, value, scale * (soft * student.scale), out)
        if out is not None and hard:
            up = hard * scale
            self.gradient(state, torch.stack((sums[:, 0], sums[:, 1], up, torch.zeros_like(up), up), 1), out, add=True)
        return loss

    def divergence_read(self, student: Logits, teacher: Logits, kind: str, beta: float, rows: Tensor,
                        divergence: Tensor) -> None:
        """Add Σ q·log(q/·) and Σ p·log(p/·) to `divergence` `[R, 2]`, where the kind has them.

        `rows` `[R, 4]` has highest and log Σ exp(u - highest) of the student's p, then of the teacher's q.
        """
        self.native.divergence_read(student.z.element_size(), _tile(student.z), _logits(student), _logits(teacher),
                                    DIVERGENCES.index(kind), beta, rows.data_ptr(), divergence.data_ptr())

    def divergence_gradient(self, student: Logits, teacher: Logits, kind: str, beta: float, rows: Tensor,
                            divergence: Tensor, factor: Tensor, out: Tensor) -> None:
        """Write `factor` `[R]` times the divergence's gradient for the student's u into `out`."""
        self.native.divergence_gradient(
            student.z.element_size(), _tile(student.z), _logits(student), _logits(teacher), DIVERGENCES.index(kind),
            beta, rows.data_ptr(), divergence.data_ptr(), factor.data_ptr(), out.data_ptr(), out.stride(0))


def _tile(z, first=0):
    return *z.shape, first, torch.get_num_threads()


def _logits(logits):
    z, bias, softcap, scale = logits
    return z.data_ptr(), z.stride(0), *addresses(bias), softcap, scale


def _targets(targets):
    index, _, weight, soft, share, even = targets
    return *addresses(index, weight, soft), 0 if soft is None else soft.stride(0), share, even


class PlainKernels:
    """`read` and `gradient` in plain PyTorch.

    `read` leaves the softmax in the place of the logits, which `gradient` then overwrites. The largest probability is
    at least 1/V, so log Σ exp(u - highest) = -log of it is exact, and softmax with two maxima is three times faster on
    a CPU than log_softmax with exp (benchmarks/LOG.md 2026-11-23).
    """

    native = None  # torch makes the products
    scaled = staticmethod(scaled)

    def read(self, logits: Logits, targets: Targets, sums: Tensor, entropy: bool = False) -> tuple:
        u, slope = logits.z.to(sums.dtype), None
        if logits.bias is not None:
            u.add_(logits.bias)
        if logits.softcap:
            u.div_(logits.softcap).tanh_()
            slope = 1 - u.square()
            u.mul_(logits.softcap)
        if logits.scale != 1:
            u.mul_(logits.scale)
        sums[:, 0] = u.amax(1)
        if targets.index is not None:
            index, inside = _inside(targets, u)
            sums[:, 3] = u.gather(1, index).squeeze(1).where(inside, 0)
        spread = _spread(targets, u)
        if spread is not None:
            spread = spread.expand_as(u)
            sums[:, 4], sums[:, 5] = torch.where(spread == 0, 0, spread * u).sum(1), spread.sum(1)
        p = torch.softmax(u, 1, out=u)
        sums[:, 1] = 1 / p.amax(1)
        if entropy:  # Σ p·(u - highest) = Σ p·log p + log Σ exp(u - highest)
            sums[:, 2] = (sums[:, 1].log() - torch.special.entr(p).sum(1)) * sums[:, 1]
        return p, slope, targets, sums[:, :2].clone()

    def gradient(self, state: tuple, rows: Tensor, out: Tensor) -> None:
        p, slope, targets, own = state
        highest, total, up, down, hit = rows.unbind(1)
        # Over all ranks' classes the softmax is smaller than over those of this rank.
        g = p.mul_((up * (own[:, 0] - highest).exp() * (own[:, 1] / total))[:, None])
        spread = _spread(targets, p)
        if spread is not None:
            g.sub_(spread * down[:, None])
        if targets.index is not None:
            index, inside = _inside(targets, g)
            g.scatter_add_(1, index, -hit.where(inside, 0)[:, None])
        if slope is not None:
            g.mul_(slope)
        if g is not out:
            out.copy_(g)


def _inside(targets, u):
    """Return each row's target as a column of the tile `[R, 1]`, 0 where it is in none, and whether it is in one."""
    index = targets.index - targets.first
    inside = (index >= 0) & (index < u.shape[1])
    return index.where(inside, 0)[:, None], inside


def _spread(targets, u):
    """Return weight · (share · soft + even), `[R or 1, C or 1]`, or None."""
    _, _, weight, soft, share, even = targets
    if soft is None and not even:
        return None
    spread = u.new_full((1, 1), even) if soft is None else share * soft + even
    return spread if weight is None else spread * weight

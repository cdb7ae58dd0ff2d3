"""What the kernels in Triton compute with: functions that cost less than Triton's own."""

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def anew(v):
    """Return v; where it has 16 bits, as other numbers to the compiler: it widens them again, and holds none in 32."""
    if INTERPRETING:
        found = v
    elif v.dtype.primitive_bitwidth == 16 and v.numel > 1:
        found = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], v.dtype, False, 2)
    else:
        found = v
    return found


@triton.jit
def exp(x):
    """Return exp(x), 0 where it is below the smallest normal number: without those, two instructions and not five."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1 / (1 + exp(-x))


@triton.jit
def normal_tail(x, e):
    """Return Φ(-|x|) to 1e-7 where e = exp(-x²/2): half of erfc(|x|/√2) as in Abramowitz and Stegun, 7.1.26."""
    root = tl.rsqrt(1 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    t = root * root  # costs a third of a quotient
    p = 0.5 * 1.061405429 * t - 0.5 * 1.453152027
    p = p * t + 0.5 * 1.421413741
    p = p * t - 0.5 * 0.284496736
    p = p * t + 0.5 * 0.254829592
    return p * t * e

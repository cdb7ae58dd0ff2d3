"""Hold the products and quantized layers of an extension that multiplies by tiles, emulated or not, to their bounds.

Usage: python products.py EXTENSION, in a process of its own: the extension takes the place of `fastlm._native`.
Prints `products` and each kind of quantized layer with `ok` or what is wrong.
"""

import importlib.util
import sys
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("fastlm._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
sys.modules["fastlm._native"] = native
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from cases import test_products, test_quantized_linear  # noqa: E402

import fastlm  # noqa: E402

assert native.tiles


def verdict(check, *args):
    try:
        check(*args)
    except AssertionError as error:
        return f"wrong: {error!s:.80}".replace("\n", " ")
    return "ok"


print("products:", verdict(test_products.sweep_pairs))
for mode, group_size in test_quantized_linear.FORMATS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        with fastlm.backend("native"):
            found = verdict(test_quantized_linear.test_error_stays_within_the_documented_bound, mode, group_size, dtype,
                            1, "native", "cpu")
        print(f"{mode} {group_size} {dtype}: {found}")

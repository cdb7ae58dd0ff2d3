"""Threads of one layer share its panels by their speed: csrc/cpu/pace.h, with a clock that counts what they make."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("pace") / "pace"
    subprocess.run(["g++", "-O1", "-std=c++17", "-fopenmp", "-Wall", "-Werror", "-Wno-unused-function",
                    f"-I{HERE.parent / 'csrc/cpu'}", HERE / "pace.cpp", "-o", program], check=True)

    def call(panels, *costs):
        lines = subprocess.check_output([program, str(panels), *map(str, costs)], text=True).splitlines()
        return [[int(word) for word in line.split()] for line in lines]
    return call


@pytest.mark.parametrize(("panels", "costs", "expected"), [
    (16, (10, 10), [8, 8]),
    (15, (10, 10), [7, 8]),
    (16, (10, 30), [12, 4]),
    (16, (30, 10), [4, 12]),
    (40, (10, 20, 10, 20), [13, 7, 13, 7]),
    (16, (10, 10000), [15, 1]),  # a panel is left to measure by
    (16, (10, 11), [8, 8]),  # not worth a change
    (1, (10, 10), [0, 1]),
    (2, (10, 90), [1, 1]),
    (20, (10,), [20]),
    (40, (10, *[20] * 19), [2] * 20),  # a large team keeps equal shares
])
def test_shares_follow_the_speed(shares, panels, costs, expected):
    first, last = shares(panels, *costs)
    count = len(costs)
    assert first == [panels * (i + 1) // count - panels * i // count for i in range(count)]
    assert last == expected

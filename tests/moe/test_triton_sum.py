"""The Triton kernel without a GPU: in Triton's interpreter, and compiled for the cards that there are.

Each in a process of its own: Triton reads at its import whether it interprets.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="no triton (torch's CUDA build brings it; pip install triton)"
)

INTERPRETED = """
import itertools
import torch
from xmoe_fairseq.moe.dispatch.gather_sum import BySource, sum_rows, torch_sums
from xmoe_fairseq.moe.dispatch.triton_sum import triton_sums

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
for source, width in itertools.product(([3, 0, 3, 3, 1, 3], [2] * 40, [4, 2, 0, 1, 3]), (1, 48, 1100)):
    source_R = torch.tensor(source)
    _, _, row_R, first_S1 = BySource.sorted(source_R, 5)
    for dtype, weighted in itertools.product(DTYPES, (False, True)):
        y_RD = (torch.randn(width, len(source)) + 0.5).to(dtype).t()  # not contiguous
        precise = torch.promote_types(dtype, torch.float32)
        weight_R = torch.rand(len(source), dtype=precise) if weighted else None
        for out in {dtype, precise}:
            got = triton_sums(y_RD, row_R, first_S1, weight_R, out)
            exact = torch_sums(y_RD.double(), row_R, first_S1, weight_R, torch.float64)
            assert got.dtype == out and got.shape == (5, width)
            # The interpreter cuts bf16 off, which a card rounds.
            torch.testing.assert_close(got.double(), exact, rtol=4 * torch.finfo(out).eps, atol=1e-5)
            if not weighted and out == torch.float32:  # as a CPU adds, bit for bit
                assert torch.equal(got, sum_rows(y_RD.float(), BySource.of(source_R, 5)))
print("same")
"""

COMPILED = """
import re
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xmoe_fairseq.moe.dispatch.triton_sum import sum_kernel

for capability in (80, 90, 100):
    for y, weight, out in (("bf16", None, "bf16"), ("bf16", "fp32", "fp32"), ("fp16", "fp32", "fp32"),
                           ("fp32", "fp32", "fp32"), ("fp64", "fp64", "fp64")):
        signature = {"y": f"*{y}", "row": "*i64", "first": "*i64", "out": f"*{out}", "width": "i32"}
        constants = {"ACC": tl.float64 if y == "fp64" else tl.float32, "COLUMNS": 1024}
        if weight:
            signature["weight"] = f"*{weight}"
        else:
            constants["weight"] = None
        signature = {name: signature.get(name, "constexpr") for name in sum_kernel.arg_names}
        # What a launch finds of torch's tensors, and of widths of a multiple of 16.
        given = (i for i, kind in enumerate(signature.values()) if kind != "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in given}
        source = ASTSource(sum_kernel, signature, constants, aligned)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4})
        assert compiled.asm["cubin"].startswith(b"\x7fELF")
        assert re.search(r"ld.global.v(4.b32|2.b64)", compiled.asm["ptx"]), "16 bytes at once"
        assert "atom" not in compiled.asm["ptx"] and "red.global" not in compiled.asm["ptx"]
print("compiled")
"""


def said_by(code: str, tmp_path: Path, **env: str) -> str:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_interpreted_it_sums_as_torch_does(tmp_path: Path) -> None:
    assert said_by(INTERPRETED, tmp_path, TRITON_INTERPRET="1") == "same"


def test_it_compiles_for_cards_of_three_generations(tmp_path: Path) -> None:
    assert said_by(COMPILED, tmp_path, TRITON_INTERPRET="0") == "compiled"

"""The Triton kernels, compiled for an H100 (sm_90) without a GPU: none spills registers.

The launches of ``triton_path`` run on meta tensors. Triton's launcher compiles the variant of each
launch and starts nothing.
"""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
nvidia = pytest.importorskip("triton.backends.nvidia")
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megatron_espo.numerics import triton_path

BIN = Path(nvidia.__file__).parent / "bin"
lacking = [tool for tool in ("ptxas", "cuobjdump") if not (BIN / tool).exists()]
pytestmark = [
    pytest.mark.skipif(bool(lacking), reason=f"this build of Triton has no {' or '.join(lacking)}"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
FP32 = torch.float32
# One for each tile size; 16 divides the first of each pair. Real vocabularies take the largest.
WIDTHS = [(152064, 151937), *((n, n - 1) for n in (128, 256, 512, 1024))]
CASES = [(widths, half) for widths in WIDTHS for half in (torch.bfloat16, torch.float16)]


@pytest.fixture
def compiled(monkeypatch) -> dict:
    """Compiled variants by hash, each with its name."""
    device = "sm_90"  # the caches of real devices stay as they are
    target = GPUTarget("cuda", 90, 32)
    fake = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    found, run = {}, JITFunction.run

    def compile_only(self, *args, warmup, **options):
        kernel = run(self, *args, warmup=True, **options)
        tensors = [f"{a.dtype} {list(a.shape)}" for a in args if isinstance(a, torch.Tensor)]
        found[kernel.hash] = f"{self.__name__} {tensors} {options}", kernel
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", fake)
    return found


def launch(width: int, tokens: int, columns: int, half: torch.dtype) -> int:
    """Every launch for a shard ``[tokens, width]`` with ``columns`` true columns, of float32 and of
    ``half``; returns their number.
    """

    def new(dtype, *shape):
        return torch.empty(tokens, *shape, dtype=dtype, device="meta")

    # Logits, and the copy that the head keeps of float32 logits.
    statistics = [(half, None), (FP32, None), (FP32, half)]
    for dtype, kept in statistics:
        store = new(kept, width) if kept else None
        triton_path.statistics(new(dtype, width), columns, 0.7, new(torch.int64), store)
    # Source, gradient, whether the source is such a copy.
    gradients = [(half, half, False), (FP32, FP32, False), (FP32, half, False), (half, half, True)]
    for source, out, shifted in gradients:
        for entropy in (False, True):
            x = new(source, width)
            tile_max = new(FP32, triton_path._layout(x)[2]) if shifted else None
            grads = new(FP32), new(FP32) if entropy else None
            fixed = new(torch.int64), new(FP32, 4), *grads, 0.7, tile_max
            triton_path.gradient(x, new(out, width), columns, *fixed)
    return len(statistics) + 2 * len(gradients)


def memory(kernel, folder: Path) -> tuple[int, int]:
    """Bytes of stack and local memory of a thread; spilled registers lie on the stack."""
    (folder / "cubin").write_bytes(kernel.asm["cubin"])
    command = [BIN / "cuobjdump", "--dump-resource-usage", folder / "cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(stack), int(local)


@pytest.mark.parametrize(
    "widths, half", [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])]
)
def test_no_variant_spills(compiled, tmp_path, widths, half):
    for number, width in enumerate(widths, 1):
        variants = launch(width, 8192, width, half)
        launch(width, 3, width - 5, half)  # other numbers of tokens and columns compile no more
        assert len(compiled) == number * variants
    used = [(name, memory(kernel, tmp_path)) for name, kernel in compiled.values()]
    assert not [entry for entry in used if entry[1] != (0, 0)]
    narrow = [
        name
        for name, kernel in list(compiled.values())[:variants]
        if not re.search(r"cp\.async\S* .* 0x10,|ld\.global\S*\.v4", kernel.asm["ptx"])
    ]
    assert widths[0] < 1024 or not narrow, "16 divides the width, and loads have less than 128 bits"

"""Log-prob and entropy on vocabulary shards against dense float64, on each path.

Triton kernels run on a GPU, or in Triton's interpreter if pytest starts with TRITON_INTERPRET=1;
`test_triton_in_the_interpreter` starts such a run of this file and test_numerics_head.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import peak_bytes
from megatron_espo.numerics import vocab_parallel_logprob_entropy
from megatron_espo.numerics.statistics import merge
from tests.support.distributed import run_ranks
from tests.support.ranks.numerics import assert_close, dense, hard_rows

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
no_triton = pytest.mark.skipif(
    not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1"
)
TRITON = pytest.param("triton", marks=[no_triton, pytest.mark.gpu])
every_path = pytest.mark.parametrize("path", ["torch", "compiled", TRITON])
# A compilation takes seconds, and the formulas are those of plain torch: compile once per dtype.
quick_path = pytest.mark.parametrize("path", ["torch", TRITON])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference_gradient(x, targets, weights, temperature, vocab_size):
    leaf = x.double().requires_grad_()
    logprob, entropy = dense(leaf, targets, temperature, vocab_size)
    ((logprob * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    return logprob, entropy, leaf.grad


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "width, vocab_size, temperature",
    [(600, 600, 1.0), (600, 590, 0.7), (19008, 19001, 1.3), (32768, 32768, 1.0)],
)
def test_values_and_gradient(path, dtype, width, vocab_size, temperature):
    if path == "compiled" and (width, vocab_size) not in ((19008, 19001),):
        pytest.skip("compiled once per dtype, with a tail and padding")
    x, targets = (t.to(DEVICE) for t in hard_rows(width, vocab_size, dtype))
    untouched = x.clone()
    targets = torch.stack((targets, targets), 1)[:, 0]  # not contiguous
    weights = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    x.requires_grad_()
    logprob, entropy = vocab_parallel_logprob_entropy(
        x,
        targets,
        None,
        temperature=temperature,
        vocab_size=vocab_size,
        entropy_grad=True,
        path=path,
    )
    ((logprob * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    reference = reference_gradient(x.detach(), targets, weights, temperature, vocab_size)
    expected_logprob, expected_entropy, expected = reference
    assert logprob.dtype == entropy.dtype == torch.float32
    assert_close(logprob, expected_logprob, 5e-6)
    assert_close(entropy, expected_entropy, 5e-6)
    if dtype == torch.float32:
        assert_close(x.grad, expected, 1.3e-6)
    else:  # rounding of the output to 8 bits (the interpreter truncates)
        ulp = 2**-7 if INTERPRET else 2**-8
        assert ((x.grad.double() - expected).abs() <= expected.abs() * ulp + 2e-6).all()
    assert (x.grad[:, vocab_size:] == 0).all()
    assert torch.equal(x.detach(), untouched)


@quick_path
def test_logprob_gradient_alone(path):
    """Without an entropy gradient another, shorter formula runs."""
    x, targets = (t.to(DEVICE) for t in hard_rows(600, 590, torch.float32))
    weights = torch.stack((torch.randn(len(targets)), torch.zeros(len(targets)))).to(DEVICE)
    x.requires_grad_()
    logprob, entropy = vocab_parallel_logprob_entropy(
        x, targets, None, temperature=0.8, vocab_size=590, path=path
    )
    assert not entropy.requires_grad
    (logprob * weights[0]).sum().backward()
    assert_close(x.grad, reference_gradient(x.detach(), targets, weights, 0.8, 590)[2], 1.3e-6)


@quick_path
def test_second_backward_and_donated_logits(path):
    x, targets = (t.to(DEVICE) for t in hard_rows(600, 590, torch.float32))
    x.requires_grad_()
    logprob, _ = vocab_parallel_logprob_entropy(x, targets, None, vocab_size=590, path=path)
    (first,) = torch.autograd.grad(logprob.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(logprob.sum(), x)
    assert torch.equal(first, second)

    given = x.detach().clone().requires_grad_()
    logprob, _ = vocab_parallel_logprob_entropy(
        given, targets, None, vocab_size=590, path=path, donate_logits=True
    )
    assert torch.equal(given, x)  # forward leaves even donated logits alone
    (gradient,) = torch.autograd.grad(logprob.sum(), given, retain_graph=True)
    assert gradient.data_ptr() == given.data_ptr()
    assert torch.equal(gradient, first)
    with pytest.raises(RuntimeError, match="donate_logits=False"):
        torch.autograd.grad(logprob.sum(), given)


@quick_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(path, dtype):
    """Forward adds at most 5 % of the shard; backward the gradient and 5 %."""
    if INTERPRET:
        pytest.skip("the interpreter allocates on its own")
    x = torch.randn(512, 16384, device=DEVICE).to(dtype).requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    shard = x.numel() * x.element_size()

    def forward():
        return vocab_parallel_logprob_entropy(x, targets, None, entropy_grad=True, path=path)

    assert peak_bytes(forward) <= 0.05 * shard
    assert peak_bytes(lambda: torch.autograd.grad(sum(forward()).sum(), x)) <= 1.05 * shard


@pytest.mark.parametrize("name", ["logprob", "entropy"])
def test_finite_differences(name):
    x, targets = torch.randn(3, 9, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 6])

    def value(logits):
        out = vocab_parallel_logprob_entropy(
            logits, targets, None, temperature=0.6, vocab_size=7, entropy_grad=True
        )
        return out[name == "entropy"]

    assert torch.autograd.gradcheck(value, x)


@quick_path
def test_strided_logits_and_no_tokens(path):
    x, targets = (t.to(DEVICE) for t in hard_rows(600, 600, torch.float32))
    wide = torch.cat((x, x), dim=1)[:, :600]  # rows are not adjacent
    for strided in (x.t().contiguous().t(), wide):
        strided.requires_grad_()
        vocab_parallel_logprob_entropy(strided, targets, None, path=path)[0].sum().backward()
        plain = x.clone().requires_grad_()
        vocab_parallel_logprob_entropy(plain, targets, None, path=path)[0].sum().backward()
        assert_close(strided.grad, plain.grad.double(), 1e-6)
    none = torch.empty(0, 600, device=DEVICE, requires_grad=True)
    no_targets = torch.empty(0, dtype=torch.int64, device=DEVICE)
    logprob, _ = vocab_parallel_logprob_entropy(none, no_targets, None, path=path)
    logprob.sum().backward()
    assert none.grad.shape == (0, 600)


def test_nan_stays_and_targets_outside_the_vocabulary_have_no_probability():
    x = torch.randn(3, 50)
    x[0, 3] = torch.nan
    logprob, entropy = vocab_parallel_logprob_entropy(
        x, torch.tensor([1, 48, -100]), None, vocab_size=48
    )
    assert logprob[0].isnan() and entropy[0].isnan()
    assert (logprob[1:] == -torch.inf).all() and entropy[1:].isfinite().all()
    x.requires_grad_()
    outside = torch.tensor([48, -100])
    vocab_parallel_logprob_entropy(x[1:], outside, None, vocab_size=48)[0].sum().backward()
    assert_close(x.grad[1:, :48], -x.detach()[1:, :48].double().softmax(1), 1e-6)
    assert not x.grad[1:, 48:].any()


def test_parts_merge_to_the_whole():
    x, scale = 9 * torch.randn(5, 3, 4, dtype=torch.float64), 1 / 0.7

    def sums(x):
        m = x.amax(-1)
        s = (x - m[..., None]) * scale
        return torch.stack((m, s.exp().sum(-1), (s * s.exp()).sum(-1), x[..., 0]), dim=-1)

    found, wanted = merge(sums(x), scale, dim=1), sums(x.flatten(1))
    wanted[:, 3] = x[..., 0].amax(1)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(2, 3, 4)}, "tokens, vocab/tp"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets must be int64"),
        ({"targets": torch.zeros(2)}, "targets must be int64"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"vocab_size": 9}, r"vocab_size must lie in 1\.\.8"),
        ({"path": "cuda"}, "path must be"),
        ({"logits": torch.zeros(2, 8, dtype=torch.int32)}, "floating point"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "logits": torch.zeros(2, 8),
        "targets": torch.zeros(2, dtype=torch.int64),
        "group": None,
    } | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprob_entropy(**arguments)


def test_a_failing_compiler_warns_once(monkeypatch):
    from megatron_espo.numerics import torch_path

    monkeypatch.setattr(torch_path, "_broken", [])

    def no_compiler(body):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch_path, "_compiled", no_compiler)
    x, targets = hard_rows(3000, 3000, torch.float32)
    with pytest.warns(UserWarning, match="no g") as seen:
        results = [
            vocab_parallel_logprob_entropy(x, targets, None, path="compiled")[0] for _ in range(2)
        ]
    assert len(seen) == 1
    assert_close(results[1], dense(x, targets, 1.0, 3000)[0], 5e-6)


def test_many_shapes_do_not_turn_compilation_off(monkeypatch):
    """Every number of dimensions needs a compilation of its own; torch's default limit is 8."""
    from megatron_espo.numerics import torch_path

    broken: list = []
    monkeypatch.setattr(torch_path, "_broken", broken)
    monkeypatch.setattr(
        torch_path,
        "_compiled",
        lambda body: torch.compile(body, dynamic=True, backend="eager", fullgraph=True),
    )

    def body(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x)

    for dimensions in range(12):
        x = torch.zeros(2, 2 * torch_path.BLOCK, *[1] * dimensions)
        assert torch_path._run_compiled(body, x, x.clone()), dimensions
    # torch.compile specializes on one row and one block of columns.
    for shape in ((1, 4 * torch_path.BLOCK), (4, 2 * torch_path.BLOCK - 1)):
        assert not torch_path._run_compiled(body, torch.zeros(shape), torch.zeros(shape))
    assert not broken


def test_measuring_memory_prints_nothing(capfd):
    assert peak_bytes(lambda: torch.zeros(1000, device=DEVICE)) >= 4000
    assert capfd.readouterr() == ("", "")


CASES = [
    {"width": 300, "vocab_size": 600, "temperature": 1.0},
    # The second rank has only padding.
    {"width": 300, "vocab_size": 290, "temperature": 0.7},
    {"width": 19008, "vocab_size": 37990, "temperature": 1.3},
]


def test_two_shards():
    run_ranks(2, "tests.support.ranks.numerics:check_shards", cases=CASES, path="torch")


def test_triton_in_the_interpreter():
    if INTERPRET or DEVICE == "cuda":
        pytest.skip("this run has them already")
    here = Path(__file__).parent
    files = [str(here / "test_numerics.py"), str(here / "test_numerics_head.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *files],
        cwd=here.parent, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:]

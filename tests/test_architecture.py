"""The rules of dependencies and of size that keep the package readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_espo"
FILES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
STAGES = ("algo", "data", "mcore", "reporter", "weights")


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that a file imports anywhere: ``a.b`` and, of ``from a import b``, both ``a`` and ``a.b``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def users_of(module: str) -> set[str]:
    """Files of the package that import ``module`` or something inside it."""
    return {
        file for file, tree in FILES.items() if any(n == module or n.startswith(f"{module}.") for n in imports(tree))
    }


def in_subprocess(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_rollout_and_the_weight_source_import_vllm():
    users = users_of("vllm")
    assert {file for file in users if not file.startswith("rollout/")} == {"weights/vllm_source.py"}


def test_only_mcore_imports_megatron():
    users = users_of("megatron")
    assert users and all(file.startswith("mcore/") for file in users), users


def test_mathematics_know_no_process_groups():
    allowed = {"torch", "math", "dataclasses", "fractions", "collections", "megatron_espo"}
    for file, tree in FILES.items():
        if file.startswith("algo/"):
            names = imports(tree)
            assert {name.split(".")[0] for name in names} <= allowed, file
            assert not any(name.startswith("torch.distributed") for name in names), file
            assert all(n.startswith("megatron_espo.algo") for n in names if n.startswith("megatron_espo")), file


def test_importing_the_mathematics_loads_nothing_else():
    code = """
import sys, megatron_espo.algo
heavy = {"megatron", "vllm", "transformers", "pydantic"} & {name.split(".")[0] for name in sys.modules}
ours = {n for n in sys.modules if n.startswith("megatron_espo.") and not n.startswith("megatron_espo.algo")}
print(sorted(heavy | ours))
"""
    assert in_subprocess(code).strip() == "[]"


def test_importing_the_package_is_fast_and_loads_no_torch():
    code = """
import sys, time
start = time.perf_counter()
import megatron_espo
print(time.perf_counter() - start, "torch" in sys.modules)
"""
    runs = [in_subprocess(code).split() for _ in range(3)]
    assert {loaded for _, loaded in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.5


def test_every_public_name_names_something():
    """Without loading any: the module that is said to have it defines or imports it at its top."""
    import megatron_espo

    for name, module in megatron_espo._PUBLIC.items():
        relative = module.removeprefix("megatron_espo.").replace(".", "/")
        tree = FILES.get(f"{relative}.py") or FILES[f"{relative}/__init__.py"]
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.alias)}
        assert name in defined or "__getattr__" in defined, (module, name)


def test_only_the_trainer_knows_every_stage():
    knowing = set.intersection(*(users_of(f"megatron_espo.{stage}") for stage in STAGES))
    assert knowing == {"trainer.py"}


def test_nothing_reaches_back_to_the_trainer():
    assert users_of("megatron_espo.trainer") <= {"cli.py"}


def functions(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_training_loop_fits_one_screen():
    (train,) = [node for node in functions(FILES["trainer.py"]) if node.name == "train"]
    assert train.end_lineno - train.lineno + 1 <= 60


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_small(file):
    assert len((PACKAGE / file).read_text().splitlines()) <= 400
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(FILES[file]) if f.end_lineno - f.lineno >= 60}
    assert not long, f"{file}: functions over 60 lines: {long}"

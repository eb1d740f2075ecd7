"""Runs the matrix: a one-rank reference in its own process, then every layout, as a table."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_espo.config import Config, Data, Megatron, Model, Rollout, Run, load_config
from megatron_espo.config.checks import check_model
from megatron_espo.errors import InputError
from megatron_espo.models.experts import read_experts
from megatron_espo.tools.parity.cases import (
    LAYOUTS,
    MICRO_BATCHES,
    OBJECTIVES,
    SHORT,
    ParallelLayout,
    Selection,
)

if TYPE_CHECKING:
    from megatron_espo.tools.parity.measure import Difference

# Variables of torchrun; without them a child process is a world of one rank.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HEADER = (
    f"{'model':<6} {'layout':<11} {'ranks':>5} {'micro-batch':>11} {'objective':>9} "
    f"{'loss':>12} {'grad norm':>12} {'worst':>9}  tensor"
)


@dataclass(frozen=True)
class Request:
    """One call of ``megatron-espo parity``."""

    config: str | None
    overrides: tuple[str, ...]
    selection: Selection
    ranks: int
    tolerance: float
    num_layers: int | None
    folder: str | None
    record: bool

    def arguments(self) -> list[str]:
        """The command line of this request, without ``--ranks``."""
        options = {name: ",".join(value) for name, value in vars(self.selection).items()}
        for name in ("tolerance", "num_layers", "folder"):
            options |= {name: getattr(self, name)} if getattr(self, name) is not None else {}
        arguments = [*([self.config] if self.config else []), *self.overrides]
        arguments += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return arguments + ["--record"] * self.record


def make_request(args: Any) -> Request:
    """Check the arguments. InputError names the wrong one."""
    known = {
        "layouts": tuple(layout.name for layout in LAYOUTS),
        "micro_batches": tuple(MICRO_BATCHES),
        "objectives": OBJECTIVES,
    }
    chosen: dict[str, Any] = {}
    for name, names in known.items():
        given = getattr(args, name)
        chosen[name] = tuple(given.split(",")) if given else SHORT[name] if args.short else names
        if unknown := [value for value in chosen[name] if value not in names]:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{option}: expected some of {', '.join(names)}; got {', '.join(unknown)}"
            )
    if args.config and "=" in args.config:
        raise InputError(f"parity: expected a CONFIG.yaml before overrides, got {args.config!r}")
    rest = {name: getattr(args, name) for name in ("config", "ranks", "tolerance", "num_layers")}
    overrides, selection = tuple(args.overrides), Selection(**chosen)
    return Request(
        overrides=overrides, selection=selection, folder=args.folder, record=args.record, **rest
    )


def main(request: Request) -> int:
    """Run; 0 if every gradient agrees, 1 if one does not."""
    if request.record:
        record(request)
        return 0
    if "RANK" in os.environ:
        return run_ranks(request)
    with tempfile.TemporaryDirectory() as temporary:
        request = replace(request, folder=request.folder or temporary)
        _child(replace(request, record=True))
        names = request.selection.layouts
        smallest = {layout.name: layout.ranks for layout in LAYOUTS if layout.name in names}
        codes = []
        for ranks in sorted({count for count in smallest.values() if count <= request.ranks}):
            names = tuple(name for name, count in smallest.items() if count == ranks)
            part = replace(request, selection=replace(request.selection, layouts=names))
            torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
            torchrun += ["--local-addr", "127.0.0.1"]  # the host name may not resolve
            codes.append(_child(part, torchrun, check=False))
    return int(any(codes))


def run_ranks(request: Request) -> int:
    """Run every layout that the ranks of torchrun allow. Collective over all ranks."""
    import torch.distributed as dist

    from megatron_espo.distributed import runtime as distributed_runtime
    from megatron_espo.distributed.collectives import on_rank_0

    runtime = distributed_runtime.initialize()

    def prepare() -> Path:
        folder = request.folder or tempfile.mkdtemp(prefix="parity-")
        if not list(Path(folder).glob("*/reference.json")):
            _child(replace(request, folder=folder, record=True))
        print(HEADER, flush=True)
        return Path(folder)

    folder = on_rank_0(prepare)
    found: list[Difference] = []
    for name, config, hf_config in models(request, folder):
        has_experts = read_experts(hf_config) is not None
        for layout in request.selection.of_world(runtime.world_size, has_experts=has_experts):
            found += run_layout(request, name, config, hf_config, layout, folder / name)
    breaches = sum(not difference.within(request.tolerance) for difference in found)
    # Zero comparisons do not count as agreement.
    verdict = [breaches > 0 or not found]
    dist.broadcast_object_list(verdict, src=0)
    if runtime.is_main:
        outcome = f"{breaches} DIFFER" if breaches else "all agree"
        worst = max((difference.worst for difference in found), default=0.0)
        print(
            f"{len(found)} gradients on {runtime.world_size} ranks: "
            f"{outcome if found else 'NOTHING was compared'}; worst relative difference "
            f"{worst:.1e}, tolerance {request.tolerance:.0e}",
            flush=True,
        )
    distributed_runtime.shutdown()
    return int(verdict[0])


def run_layout(
    request: Request,
    name: str,
    config: Config,
    hf_config: dict[str, Any],
    layout: ParallelLayout,
    folder: Path,
) -> Iterator["Difference"]:
    """Print and yield the differences of one layout on rank 0; yield nothing on other ranks."""
    from megatron_espo.tools.parity import measure
    from megatron_espo.tools.parity.recorded import load_sequences

    base = config.megatron.model_dump() | layout.sizes
    config = config.model_copy(update={"megatron": Megatron(**base)})
    label = f"{name:<6} {layout.name:<11}"
    try:
        check_model(config, hf_config)
    except InputError as error:
        if os.environ["RANK"] == "0":
            print(f"{label} skipped: {error}", flush=True)
        return
    model = measure.Model(config, hf_config)
    sequences = load_sequences(folder / "batch.json")
    for micro_batch in request.selection.micro_batches:
        megatron = Megatron(**base | MICRO_BATCHES[micro_batch])
        for objective in request.selection.objectives:
            loss, norm = model.backward(sequences, megatron, objective)
            found = measure.compare(model, loss, norm, objective, folder)
            if found:
                mark = "" if found.within(request.tolerance) else "  DIFFERS"
                print(
                    f"{label} {model.runtime.world_size:>5} {micro_batch:>11} {objective:>9} "
                    f"{found.loss:>12.6g} {found.grad_norm:>12.6g} {found.worst:>9.1e}  "
                    f"{found.tensor}{mark}",
                    flush=True,
                )
                yield found


def record(request: Request) -> None:
    """Write the tiny models, and the batch and one-rank reference of each model."""
    from megatron_espo.tools.parity import measure, recorded

    assert request.folder is not None
    folder = Path(request.folder)
    if request.config is None:
        wanted = {layout.moe for layout in LAYOUTS if layout.name in request.selection.layouts}
        for name, hf_config in recorded.MODELS.items():
            if (read_experts(hf_config) is not None) in wanted:
                recorded.write_model(folder / name / "model", hf_config)
    for name, config, hf_config in models(request, folder):
        (folder / name).mkdir(parents=True, exist_ok=True)
        model, vocab_size = measure.Model(config, hf_config), hf_config["vocab_size"]
        sequences = recorded.make_sequences(vocab_size, hf_config["max_position_embeddings"])
        sequences = recorded.drift(sequences, *model.score(sequences), vocab_size)
        recorded.save_sequences(folder / name / "batch.json", sequences)
        measure.write_reference(model, sequences, request.selection.objectives, folder / name)


def models(request: Request, folder: Path) -> Sequence[tuple[str, Config, dict[str, Any]]]:
    """Name, configuration (one rank, float32) and ``config.json`` of each model under test."""
    if request.config is None:
        return [
            (path.parent.parent.name, _tiny_config(str(path.parent)), json.loads(path.read_text()))
            for path in sorted(folder.glob("*/model/config.json"))
        ]
    config = load_config(request.config, request.overrides)
    hf_config = check_model(config)
    if request.num_layers:
        hf_config = hf_config | {"num_hidden_layers": request.num_layers}
    megatron = Megatron(transformer_impl=config.megatron.transformer_impl)
    model = config.model.model_copy(update={"dtype": "float32"})
    return [("yours", config.model_copy(update={"megatron": megatron, "model": model}), hf_config)]


def _tiny_config(path: str) -> Config:
    model, megatron = Model(path=path, dtype="float32"), Megatron(transformer_impl="local")
    rollout, data = Rollout(max_response_tokens=64), Data(prompts="reasoning_gym:none")
    return Config(run=Run(), model=model, megatron=megatron, rollout=rollout, data=data)


def _child(request: Request, interpreter_options: Sequence[str] = (), check: bool = True) -> int:
    """Run ``request`` in another process, outside of any torchrun."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _TORCHRUN and not key.startswith("TORCHELASTIC_")
    }
    command = [sys.executable, *interpreter_options, "-m", "megatron_espo", "parity"]
    return subprocess.run([*command, *request.arguments()], env=environment, check=check).returncode

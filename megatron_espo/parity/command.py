"""Runs the matrix: a one-rank reference in a process of its own, then every layout that the ranks allow, as a table."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_espo.config import Config, Data, Megatron, Model, Rollout, Run, load_config
from megatron_espo.config.experts import read_experts
from megatron_espo.errors import InputError
from megatron_espo.parity.cases import LAYOUTS, MICRO_BATCHES, OBJECTIVES, SHORT, Layout, Selection

# What torchrun tells its workers; without it a child is a world of one rank.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HEADER = f"{'model':<6} {'layout':<11} {'ranks':>5} {'micro-batch':>11} {'objective':>9} {'loss':>12} {'grad norm':>12} {'worst':>9}  tensor"


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

    def arguments(self, **changes: Any) -> list[str]:
        """The command line that says the same."""
        now = vars(self) | changes
        arguments = [now["config"]] * bool(now["config"]) + list(now["overrides"])
        arguments += [f"--{name.replace('_', '-')}={','.join(value)}" for name, value in vars(now["selection"]).items()]
        for name in ("tolerance", "num_layers", "folder"):
            arguments += [f"--{name.replace('_', '-')}={now[name]}"] * (now[name] is not None)
        return arguments + ["--record"] * now["record"]


def make_request(args) -> Request:
    """Check the arguments. InputError names the wrong one."""
    known = {
        "layouts": tuple(layout.name for layout in LAYOUTS),
        "micro_batches": tuple(MICRO_BATCHES),
        "objectives": OBJECTIVES,
    }
    chosen = {}
    for name, names in known.items():
        given = getattr(args, name)
        chosen[name] = tuple(given.split(",")) if given else SHORT[name] if args.short else names
        if unknown := [value for value in chosen[name] if value not in names]:
            raise InputError(f"--{name.replace('_', '-')}: expected some of {', '.join(names)}; got {', '.join(unknown)}")
    if args.config and "=" in args.config:
        raise InputError(f"parity: expected a CONFIG.yaml before overrides, got {args.config!r}")
    return Request(
        args.config, tuple(args.overrides), Selection(**chosen), args.ranks, args.tolerance, args.num_layers, args.folder, args.record
    )


def main(request: Request) -> int:
    """Run; 0 if every gradient agrees, 1 if one does not."""
    if request.record:
        record(request)
        return 0
    if "RANK" in os.environ:
        return run_ranks(request)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(request.folder or temporary)
        _child(request.arguments(folder=str(folder), record=True))
        smallest = {layout.name: layout.ranks for layout in LAYOUTS if layout.name in request.selection.layouts}
        codes = []
        for ranks in sorted({count for count in smallest.values() if count <= request.ranks}):
            names = tuple(name for name, count in smallest.items() if count == ranks)
            part = Selection(names, request.selection.micro_batches, request.selection.objectives)
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            codes.append(_child(request.arguments(folder=str(folder), selection=part), torchrun, check=False))
    return int(any(codes))


def run_ranks(request: Request) -> int:
    """Under torchrun: every layout that fits this world. Collective over all ranks."""
    import torch.distributed as dist

    from megatron_espo.mcore import runtime as mcore_runtime

    runtime = mcore_runtime.initialize()
    box = [request.folder]
    if runtime.is_main:
        if request.folder is None:
            box[0] = tempfile.mkdtemp(prefix="parity-")
        if not list(Path(box[0]).glob("*/reference.json")):
            _child(request.arguments(folder=box[0], record=True))
        print(HEADER, flush=True)
    dist.broadcast_object_list(box, src=0)
    breaches, compared, worst = 0, 0, 0.0
    for name, config, hf_config in models(request, Path(box[0])):
        for layout in request.selection.of_world(runtime.world_size, has_experts=read_experts(hf_config) is not None):
            for difference in run_layout(request, name, config, hf_config, layout, Path(box[0], name)):
                compared += 1
                breaches += not difference.within(request.tolerance)
                worst = max(worst, difference.worst)
    # Nothing compared is not agreement.
    verdict = [breaches > 0 or compared == 0]
    dist.broadcast_object_list(verdict, src=0)
    if runtime.is_main:
        outcome = f"{breaches} DIFFER" if breaches else "all agree" if compared else "NOTHING was compared"
        print(
            f"{compared} gradients on {runtime.world_size} ranks: {outcome}; worst relative difference {worst:.1e}, "
            f"tolerance {request.tolerance:.0e}",
            flush=True,
        )
    mcore_runtime.shutdown()
    return int(verdict[0])


def run_layout(request: Request, name: str, config: Config, hf_config: dict[str, Any], layout: Layout, folder: Path):
    """Yield the differences of one layout on rank 0, printing each; nothing elsewhere."""
    from megatron_espo.parity import measure
    from megatron_espo.parity.recorded import load_sequences

    base = config.megatron.model_dump() | layout.sizes
    config = config.model_copy(update={"megatron": Megatron(**base)})
    try:
        config.validate_model(hf_config)
    except InputError as error:
        if os.environ["RANK"] == "0":
            print(f"{name:<6} {layout.name:<11} skipped: {error}", flush=True)
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
                    f"{name:<6} {layout.name:<11} {model.runtime.world_size:>5} {micro_batch:>11} {objective:>9} "
                    f"{found.loss:>12.6g} {found.grad_norm:>12.6g} {found.worst:>9.1e}  {found.tensor}{mark}",
                    flush=True,
                )
                yield found


def record(request: Request) -> None:
    """Write models (the tiny ones), batch and one-rank reference of each."""
    from megatron_espo.parity import measure
    from megatron_espo.parity.recorded import MODELS, drift, make_sequences, save_sequences, write_model

    folder = Path(request.folder)
    if request.config is None:
        wanted = {layout.moe for layout in LAYOUTS if layout.name in request.selection.layouts}
        for name, hf_config in MODELS.items():
            if (read_experts(hf_config) is not None) in wanted:
                write_model(folder / name / "model", hf_config)
    for name, config, hf_config in models(request, folder):
        (folder / name).mkdir(parents=True, exist_ok=True)
        model = measure.Model(config, hf_config)
        sequences = make_sequences(hf_config["vocab_size"], hf_config["max_position_embeddings"])
        sequences = drift(sequences, *model.score(sequences), hf_config["vocab_size"])
        save_sequences(folder / name / "batch.json", sequences)
        measure.write_reference(model, sequences, request.selection.objectives, folder / name)


def models(request: Request, folder: Path) -> Sequence[tuple[str, Config, dict[str, Any]]]:
    """Name, configuration (one rank, float32) and ``config.json`` of each model under test."""
    if request.config is None:
        return [
            (path.parent.parent.name, _tiny_config(str(path.parent)), json.loads(path.read_text()))
            for path in sorted(folder.glob("*/model/config.json"))
        ]
    config = load_config(request.config, request.overrides)
    hf_config = config.validate_model()
    if request.num_layers:
        hf_config = hf_config | {"num_hidden_layers": request.num_layers}
    kept = {"transformer_impl": config.megatron.transformer_impl}
    exact = {"megatron": Megatron(**kept), "model": config.model.model_copy(update={"dtype": "float32"})}
    return [("yours", config.model_copy(update=exact), hf_config)]


def _tiny_config(path: str) -> Config:
    return Config(
        run=Run(),
        model=Model(path=path, dtype="float32"),
        megatron=Megatron(transformer_impl="local"),
        rollout=Rollout(max_response_tokens=64),
        data=Data(prompts="reasoning_gym:none"),
    )


def _child(arguments: list[str], interpreter_options: Sequence[str] = (), check: bool = True) -> int:
    """This command again, outside of any torchrun."""
    environment = {key: value for key, value in os.environ.items() if key not in _TORCHRUN and not key.startswith("TORCHELASTIC_")}
    command = [sys.executable, *interpreter_options, "-m", "megatron_espo", "parity", *arguments]
    return subprocess.run(command, env=environment, check=check).returncode

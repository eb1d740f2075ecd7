"""Runs the matrix: a one-rank reference in its own process, then every layout, as a table."""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_espo.config import Config, Megatron, load_config
from megatron_espo.config.checks import check_model
from megatron_espo.distributed import runtime as distributed_runtime
from megatron_espo.distributed.collectives import on_rank_0
from megatron_espo.errors import InputError
from megatron_espo.models.registry import read_spec
from megatron_espo.models.spec import ModelSpec
from megatron_espo.tools.parity import cases, measure, recorded

ROW = "{:<6} {:<11} {:>5} {:>11} {:>9} {:>12} {:>12} {:>9}  {}"
COLUMNS = "model layout ranks micro-batch objective loss norm worst tensor".split()


def main(args: argparse.Namespace) -> int:
    """Run ``megatron-espo parity``; 0 if every gradient agrees, 1 if one does not.

    Under torchrun it runs the layouts that the ranks allow. Else it starts the fewest ranks of each
    layout on this machine.
    """
    names = args.layout or (cases.SHORT_LAYOUTS if args.short else cases.LAYOUTS)
    layouts = [cases.LAYOUTS[name] for name in names]
    if args.config:
        check_model(load_config(args.config, args.overrides))
    if "RANK" in os.environ:
        return run_ranks(args, layouts)
    sizes = sorted({layout.ranks for layout in layouts if layout.ranks <= args.ranks})
    if not sizes:
        raise InputError(f"--layout: expected a layout of at most {args.ranks} ranks")
    os.environ["PYTHONWARNINGS"] = "ignore"  # of the processes below
    codes: list[int] = []
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or temporary
        for ranks in sizes:
            # The host name may not resolve.
            launch = LaunchConfig(
                1, 1, ranks, run_id="parity", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1", max_restarts=0,
            )  # fmt: skip
            some = [layout for layout in layouts if layout.ranks == ranks]
            codes += elastic_launch(launch, run_ranks)(args, some).values()
    return int(any(codes))


def run_ranks(args: argparse.Namespace, layouts: Sequence[cases.ParallelLayout]) -> int:
    """Run every layout that the ranks allow. Collective over all ranks."""
    runtime = distributed_runtime.initialize()

    def prepare() -> Path:
        folder = Path(args.folder or tempfile.mkdtemp())
        if not list(folder.glob("*/batch.json")):
            # One rank needs a process that belongs to no other world.
            multiprocessing.spawn(record, (args, folder))
        print(ROW.format(*COLUMNS), flush=True)
        return folder

    folder = on_rank_0(prepare)
    found: list[float] = []
    for name, config, spec in models(args, folder):
        for layout in layouts:
            is_possible = runtime.world_size % layout.ranks == 0
            if is_possible and layout.has_experts == (spec.experts is not None):
                found += run_layout(args, name, config, spec, layout, folder / name)
    breaches = sum(not worst <= args.tolerance for worst in found)  # NaN is one
    # Zero comparisons do not count as agreement.
    verdict = on_rank_0(lambda: breaches > 0 or not found)
    if runtime.is_main:
        outcome = f"{breaches} DIFFER" if breaches else "all agree"
        print(
            f"{len(found)} gradients on {runtime.world_size} ranks: "
            f"{outcome if found else 'NOTHING was compared'}; worst relative difference "
            f"{max(found, default=0.0):.1e}, tolerance {args.tolerance:.0e}",
            flush=True,
        )
    distributed_runtime.shutdown()
    return int(verdict)


def run_layout(
    args: argparse.Namespace, name: str, config: Config, spec: ModelSpec,
    layout: cases.ParallelLayout, folder: Path,
) -> Iterator[float]:  # fmt: skip
    """Print the differences of one layout and yield the worst ones, on rank 0."""
    base = config.megatron.model_dump() | layout.sizes
    config = config.model_copy(update={"megatron": Megatron(**base)})
    try:
        check_model(config, spec)
    except InputError as error:
        if dist.get_rank() == 0:
            print(f"{name:<6} {layout.name:<11} skipped: {error}", flush=True)
        return
    model = measure.Model(config, spec)
    sequences = recorded.load_sequences(folder / "batch.json")
    for micro_batch in cases.SHORT_MICRO_BATCHES if args.short else cases.MICRO_BATCHES:
        megatron = Megatron(**base | cases.MICRO_BATCHES[micro_batch])
        for objective in objectives(args):
            loss, norm = model.backward(sequences, megatron, objective)
            found = measure.compare(model, loss, norm, folder / f"{objective}.pt")
            if found:
                worst, tensor = found
                mark = "" if worst <= args.tolerance else "  DIFFERS"
                ranks, numbers = model.runtime.world_size, (f"{loss:.6g}", f"{norm:.6g}")
                cells = (name, layout.name, ranks, micro_batch, objective, *numbers)
                print(ROW.format(*cells, f"{worst:.1e}", tensor + mark), flush=True)
                yield worst


def objectives(args: argparse.Namespace) -> tuple[str, ...]:
    """The compared objectives."""
    return cases.SHORT_OBJECTIVES if args.short else cases.OBJECTIVES


def record(_: int, args: argparse.Namespace, folder: Path) -> None:
    """Write the batch and the one-rank reference of each model."""
    os.environ.pop("RANK", None)
    for name, config, spec in models(args, folder):
        if not args.config:
            recorded.write_model(Path(config.model.path), spec)
        (folder / name).mkdir(parents=True, exist_ok=True)
        model = measure.Model(config, spec)
        sequences = recorded.make_sequences(spec.vocab_size, spec.max_position_embeddings)
        sequences = recorded.drift(sequences, model.score(sequences), spec.vocab_size)
        for objective in objectives(args):
            measure.write_reference(model, sequences, objective, folder / name / f"{objective}.pt")
        recorded.save_sequences(folder / name / "batch.json", sequences)


def models(args: argparse.Namespace, folder: Path) -> list[tuple[str, Config, ModelSpec]]:
    """Name, configuration (one rank, float32) and specification of each model under test."""
    if not args.config:
        return [
            (name, _tiny_config(folder / name / "model"), spec)
            for name, spec in recorded.MODELS.items()
        ]
    config = load_config(args.config, args.overrides)
    spec = check_model(config)
    if args.num_layers:
        hf_config = spec.hf_config | {"num_hidden_layers": args.num_layers}
        spec = read_spec(hf_config, config.model.family)
    megatron = Megatron(transformer_impl=config.megatron.transformer_impl)
    model = config.model.model_copy(update={"dtype": "float32"})
    return [("yours", config.model_copy(update={"megatron": megatron, "model": model}), spec)]


def _tiny_config(path: Path) -> Config:
    sections = {
        "model": {"path": str(path), "dtype": "float32"},
        "megatron": {"transformer_impl": "local"},
        "rollout": {"max_response_tokens": 64},
        "data": {"prompts": "reasoning_gym:none"},
    }
    return Config.model_validate(sections)

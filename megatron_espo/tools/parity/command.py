"""Runs the matrix: a one-rank reference in its own process, then every layout, as a table."""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
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
    layouts = list(args.layout or (cases.SHORT_LAYOUTS if args.short else cases.LAYOUTS))
    models(args, Path())  # checks the configuration
    if "RANK" in os.environ:
        return run_ranks(args, layouts)
    too_large = [layout for layout in layouts if cases.ranks(layout) > args.ranks]
    if too_large and (args.layout or too_large == layouts):
        got = ", ".join(too_large)
        raise InputError(f"--layout: expected layouts of at most {args.ranks} ranks, got {got}")
    if too_large:
        print(f"skipped, more than {args.ranks} ranks: {', '.join(too_large)}", flush=True)
    sizes = sorted({cases.ranks(layout) for layout in layouts if layout not in too_large})
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
            some = [layout for layout in layouts if cases.ranks(layout) == ranks]
            is_first = ranks == sizes[0]
            codes += elastic_launch(launch, run_ranks)(args, some, is_first).values()
    return int(any(codes))


def run_ranks(args: argparse.Namespace, layouts: Sequence[str], records: bool = True) -> int:
    """Run every layout that the ranks allow. Collective over all ranks.

    Args:
        records: whether to write batch and reference first; else the folder has them.
    """
    runtime = distributed_runtime.initialize()

    def prepare() -> Path:
        folder = Path(args.folder or tempfile.mkdtemp())
        if records:
            # One rank needs a process that belongs to no other world.
            multiprocessing.spawn(record, (args, folder))
        print(ROW.format(*COLUMNS), flush=True)
        return folder

    folder = on_rank_0(prepare)
    compared: dict[str, list[float]] = {layout: [] for layout in layouts}
    for name, config, spec in models(args, folder):
        for layout in layouts:
            is_possible = runtime.world_size % cases.ranks(layout) == 0
            if is_possible and (cases.EP in cases.LAYOUTS[layout]) == (spec.experts is not None):
                compared[layout] += run_layout(args, name, config, spec, layout, folder / name)
    found = [worst for errors in compared.values() for worst in errors]
    breaches = sum(not worst <= args.tolerance for worst in found)  # NaN is one
    skipped = [layout for layout, errors in compared.items() if not errors]
    # Zero comparisons do not count as agreement.
    verdict = on_rank_0(lambda: bool(breaches or not found or (args.layout and skipped)))
    if runtime.is_main:
        if skipped:
            print(f"not compared (ranks, experts or sizes forbid it): {', '.join(skipped)}")
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
    layout: str, folder: Path,
) -> Iterator[float]:  # fmt: skip
    """Print the differences of one layout and yield the worst ones, on rank 0."""
    base = config.megatron.model_dump() | cases.LAYOUTS[layout]
    config = config.model_copy(update={"megatron": Megatron(**base)})
    try:
        check_model(config, spec)
    except InputError as error:
        if dist.get_rank() == 0:
            print(f"{name:<6} {layout:<11} skipped: {error}", flush=True)
        return
    model = measure.Model(config, spec)
    sequences = torch.load(folder / "batch.pt", weights_only=False)
    for micro_batch in cases.SHORT_MICRO_BATCHES if args.short else cases.MICRO_BATCHES:
        megatron = Megatron(**base | cases.MICRO_BATCHES[micro_batch])
        for objective in objectives(args):
            loss, norm = model.backward(sequences, megatron, objective)
            found = measure.compare(model, loss, norm, folder / f"{objective}.pt")
            if found:
                worst, tensor = found
                mark = "" if worst <= args.tolerance else "  DIFFERS"
                ranks, numbers = model.runtime.world_size, (f"{loss:.6g}", f"{norm:.6g}")
                cells = (name, layout, ranks, micro_batch, objective, *numbers)
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
        torch.save(sequences, folder / name / "batch.pt")


def models(args: argparse.Namespace, folder: Path) -> list[tuple[str, Config, ModelSpec]]:
    """Name, configuration (one rank, float32) and specification of each model under test."""
    if not args.config:
        return [
            (name, _tiny_config(folder / name / "model"), spec)
            for name, spec in recorded.MODELS.items()
        ]
    config = load_config(args.config, args.overrides)
    spec = check_model(config)
    if args.num_layers is not None:
        kept, layers = args.num_layers, spec.num_hidden_layers
        if not 0 < kept <= layers:
            raise InputError(f"--num-layers: expected 1 to {layers}, got {kept}")
        # Weights of prediction layers, which follow the model's own, are not read.
        changes = {"num_hidden_layers": kept, "num_nextn_predict_layers": layers}
        spec = read_spec(spec.hf_config | changes, config.model.family)
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

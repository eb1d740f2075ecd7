"""Runs the matrix: a one-rank reference in its own process, then every layout, as a table."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_espo.config import Config, Data, Megatron, Model, Rollout, Run, load_config
from megatron_espo.config.checks import check_model
from megatron_espo.distributed import runtime as distributed_runtime
from megatron_espo.distributed.collectives import on_rank_0
from megatron_espo.errors import InputError
from megatron_espo.models.registry import read_spec
from megatron_espo.models.spec import ModelSpec
from megatron_espo.tools.parity import cases, measure, recorded

HEADER = (
    f"{'model':<6} {'layout':<11} {'ranks':>5} {'micro-batch':>11} {'objective':>9} "
    f"{'loss':>12} {'grad norm':>12} {'worst':>9}  tensor"
)


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
            launch = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id="parity",
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",  # the host name may not resolve
                local_addr="127.0.0.1",
                max_restarts=0,
            )
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
            wanted = {layout.moe for layout in layouts}
            child = get_context("spawn").Process(target=record, args=(args, folder, wanted))
            child.start()
            child.join()
            if child.exitcode:
                raise RuntimeError("parity: the reference on one rank failed, see above")
        print(HEADER, flush=True)
        return folder

    folder = on_rank_0(prepare)
    found: list[measure.Difference] = []
    for name, config, spec in models(args, folder):
        for layout in layouts:
            has_experts = spec.experts is not None
            if layout.moe == has_experts and layout.fits(runtime.world_size):
                found += run_layout(args, name, config, spec, layout, folder / name)
    breaches = sum(not difference.worst <= args.tolerance for difference in found)  # NaN is one
    # Zero comparisons do not count as agreement.
    verdict = on_rank_0(lambda: breaches > 0 or not found)
    if runtime.is_main:
        outcome = f"{breaches} DIFFER" if breaches else "all agree"
        worst = max((difference.worst for difference in found), default=0.0)
        print(
            f"{len(found)} gradients on {runtime.world_size} ranks: "
            f"{outcome if found else 'NOTHING was compared'}; worst relative difference "
            f"{worst:.1e}, tolerance {args.tolerance:.0e}",
            flush=True,
        )
    distributed_runtime.shutdown()
    return int(verdict)


def run_layout(
    args: argparse.Namespace,
    name: str,
    config: Config,
    spec: ModelSpec,
    layout: cases.ParallelLayout,
    folder: Path,
) -> list[measure.Difference]:
    """Print and return the differences of one layout on rank 0; ``[]`` on other ranks."""
    base = config.megatron.model_dump() | layout.sizes
    config = config.model_copy(update={"megatron": Megatron(**base)})
    label = f"{name:<6} {layout.name:<11}"
    try:
        check_model(config, spec)
    except InputError as error:
        if dist.get_rank() == 0:
            print(f"{label} skipped: {error}", flush=True)
        return []
    model = measure.Model(config, spec)
    sequences, differences = recorded.load_sequences(folder / "batch.json"), []
    for micro_batch in cases.SHORT_MICRO_BATCHES if args.short else cases.MICRO_BATCHES:
        megatron = Megatron(**base | cases.MICRO_BATCHES[micro_batch])
        for objective in objectives(args):
            loss, norm = model.backward(sequences, megatron, objective)
            found = measure.compare(model, loss, norm, objective, folder)
            if found:
                mark = "" if found.worst <= args.tolerance else "  DIFFERS"
                print(
                    f"{label} {model.runtime.world_size:>5} {micro_batch:>11} {objective:>9} "
                    f"{found.loss:>12.6g} {found.grad_norm:>12.6g} {found.worst:>9.1e}  "
                    f"{found.tensor}{mark}",
                    flush=True,
                )
                differences.append(found)
    return differences


def objectives(args: argparse.Namespace) -> tuple[cases.Objective, ...]:
    """The compared objectives."""
    return cases.SHORT_OBJECTIVES if args.short else cases.OBJECTIVES


def record(args: argparse.Namespace, folder: Path, wanted: set[bool]) -> None:
    """Write the batch and the one-rank reference of each model.

    Args:
        wanted: of the tiny models: with experts, without, or both.
    """
    os.environ.pop("RANK", None)
    for name, spec in recorded.MODELS.items():
        if not args.config and (spec.experts is not None) in wanted:
            recorded.write_model(folder / name / "model", spec)
    for name, config, spec in models(args, folder):
        (folder / name).mkdir(parents=True, exist_ok=True)
        model, vocab_size = measure.Model(config, spec), spec.vocab_size
        sequences = recorded.make_sequences(vocab_size, spec.max_position_embeddings)
        sequences = recorded.drift(sequences, *model.score(sequences), vocab_size)
        measure.write_reference(model, sequences, objectives(args), folder / name)
        recorded.save_sequences(folder / name / "batch.json", sequences)


def models(args: argparse.Namespace, folder: Path) -> list[tuple[str, Config, ModelSpec]]:
    """Name, configuration (one rank, float32) and specification of each model under test."""
    if not args.config:
        return [
            (name, _tiny_config(str(folder / name / "model")), spec)
            for name, spec in sorted(recorded.MODELS.items())
            if (folder / name).is_dir()
        ]
    config = load_config(args.config, args.overrides)
    spec = check_model(config)
    if args.num_layers:
        hf_config = spec.hf_config | {"num_hidden_layers": args.num_layers}
        spec = read_spec(hf_config, config.model.family)
    megatron = Megatron(transformer_impl=config.megatron.transformer_impl)
    model = config.model.model_copy(update={"dtype": "float32"})
    return [("yours", config.model_copy(update={"megatron": megatron, "model": model}), spec)]


def _tiny_config(path: str) -> Config:
    model, megatron = Model(path=path, dtype="float32"), Megatron(transformer_impl="local")
    rollout, data = Rollout(max_response_tokens=64), Data(prompts="reasoning_gym:none")
    return Config(run=Run(), model=model, megatron=megatron, rollout=rollout, data=data)

"""Megatron checkpoints: Megatron's own distributed format, beside a manifest that says whose weights these are and vouches for every file.

The format (``torch_dist``) stores whole tensors, so a checkpoint written in one layout loads in any other. Its ``.metadata`` is a
pickle, which runs code when it is opened: nothing in a folder is read before the manifest has vouched for it.
"""

import collections
import functools
import hashlib
import json
import queue
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_espo.collectives import gathered, on_rank_0
from megatron_espo.config.experts import read_experts
from megatron_espo.errors import InputError
from megatron_espo.mcore.model import rope_arguments
from megatron_espo.mcore.rng import load_rng, save_rng
from megatron_espo.run_files import make_durable
from megatron_espo.weights.families import is_tied, model_sizes

MANIFEST_NAME = "megatron_espo.json"
STATE_NAME = "state.json"
VERSION = 1
_CHECKSUM_THREADS = 4
_WRITER = re.compile(r"(?:__|rng_)(\d+)")  # rank; of other files, 0


def refuse_existing(out: str | Path) -> None:
    """InputError where ``out`` is there already."""
    if Path(out).exists():
        raise InputError(f"{out}: expected a path where nothing is yet, found something; choose another or remove it")


def save_checkpoint(
    chunks: Sequence[torch.nn.Module],
    hf_config: dict[str, Any],
    out: str | Path,
    *,
    optimizer=None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write this rank's part into ``<out>.partial``, which becomes ``out`` when all ranks are done. Collective over all ranks.

    ``out`` lies on a file system that all ranks share.

    Args:
        chunks: this rank's model chunks, not wrapped in DDP.
        optimizer: Megatron's optimizer, whose state is stored too, in the form that any layout can load.
        state: whatever else belongs to the run, as JSON values; rank 0's is written.

    Raises:
        InputError: ``out`` exists; nothing is written.
        OSError: a full or failing disk, on the rank that met it; ``out`` does not appear.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    on_rank_0(lambda: _begin(partial, out))
    try:
        _keep_results_here()
        form = optimizer and optimizer_form(chunks[0].config, hf_config)
        # Without it the first of several data-parallel ranks would write everything.
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy())
        with _checksums_while_written(partial) as shards:
            dist_checkpointing.save(_sharded_state(chunks, optimizer, form, is_loading=False), str(partial), strategy)
        if state is not None:
            save_rng(partial)
            if dist.get_rank() == 0:
                (partial / STATE_NAME).write_text(json.dumps(state) + "\n")
    except Exception as error:
        # Nobody is asked: the others are inside Megatron's collectives, and end when this rank is gone.
        raise OSError(f"{partial}: rank {dist.get_rank()} could not write its part: {error}") from error
    files = _checksums(partial, shards)
    on_rank_0(lambda: _finish(partial, out, hf_config, chunks[0].config.params_dtype, form, files))


def load_checkpoint(
    chunks: Sequence[torch.nn.Module], hf_config: dict[str, Any], path: str | Path, *, optimizer=None
) -> dict[str, Any]:
    """Load a checkpoint into this rank's chunks, in place, whatever layout wrote it. Collective over all ranks.

    Values are cast to the parameters' dtype. Embedding rows that only pad the vocabulary become zero where the checkpoint has none.

    Args:
        chunks: this rank's model chunks, not wrapped in DDP.
        optimizer: Megatron's optimizer, if its state is wanted too.

    Returns:
        The ``state`` that was saved with it. Random number states are restored where as many ranks saved theirs.

    Raises:
        InputError: missing, foreign, damaged, another model's, without an optimizer's state, or a parameter too few or too many.
    """
    from megatron.core import dist_checkpointing

    manifest = on_rank_0(lambda: read_manifest(path, hf_config))
    verify_files(path, manifest)
    form = optimizer and _loadable_form(path, manifest.get("optimizer"), optimizer_form(chunks[0].config, hf_config))
    wanted = _sharded_state(chunks, optimizer, form, is_loading=True)
    loaded, only_there, only_here = dist_checkpointing.load(wanted, str(path), strict="return_all")
    # Which parameters a checkpoint lacks is known only to the ranks that asked for them.
    differences = gathered([{key for key in keys if _must_match(key, optimizer)} for keys in (only_there, only_here)])
    on_rank_0(lambda: _refuse_other_parameters(path, *(sorted(set().union(*keys)) for keys in zip(*differences, strict=True))))
    for i, chunk in enumerate(chunks):
        # Not strict: Transformer Engine's extra state (FP8 scales) is absent where another layer implementation wrote the checkpoint.
        chunk.load_state_dict(loaded[_chunk_key(i)], strict=False)
    if optimizer is not None:
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
        _separate_step_counts(optimizer)
        load_rng(Path(path))
    return read_state(path)


def _refuse_other_parameters(path: str | Path, only_there: list[str], only_here: list[str]) -> None:
    if only_there or only_here:
        raise InputError(f"{path}: expected the model's parameters; lacks {only_here or 'none'}, has besides {only_there or 'none'}")


def read_state(path: str | Path) -> dict[str, Any]:
    """The JSON values saved with a checkpoint. InputError: damage."""
    file = Path(path, STATE_NAME)
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file}: expected JSON, found damage ({error}); copy it again") from None


def _must_match(key: str, optimizer) -> bool:
    """Whether a tensor that only model or checkpoint has is an error; the optimizer's are not asked for by a mere reader of weights."""
    return not key.endswith("_extra_state") and (optimizer is not None or not key.startswith("optimizer."))


def model_identity(hf_config: dict[str, Any]) -> dict[str, Any]:
    """What makes a model another model, from ``config.json``, the same whichever transformers version wrote it."""
    experts = read_experts(hf_config)
    return {
        "experts": experts and {**vars(experts), "layers": list(experts.layers)},
        "architecture": (hf_config.get("architectures") or ["none"])[0],
        "num_hidden_layers": hf_config["num_hidden_layers"],
        "num_attention_heads": hf_config["num_attention_heads"],
        "rms_norm_eps": hf_config.get("rms_norm_eps", 1e-6),
        "attention_bias": bool(hf_config.get("attention_bias")),
        "tie_word_embeddings": is_tied(hf_config),
        **model_sizes(hf_config),
        **rope_arguments(hf_config),
    }


def read_manifest(path: str | Path, hf_config: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint of this very model; reads nothing else. Zero collectives.

    Raises:
        InputError: no folder, no manifest, another version, or another model (the keys that differ are named).
    """
    file = Path(path, MANIFEST_NAME)
    if not file.is_file():
        found = "a folder without one" if Path(path).is_dir() else "no such folder"
        raise InputError(f"{path}: expected a checkpoint of `megatron-espo convert to-megatron` (with {MANIFEST_NAME}), got {found}")
    try:
        manifest = json.loads(file.read_text())
        version, model = manifest["version"], manifest["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected a checkpoint's manifest, got {error!r}") from None
    if version != VERSION:
        raise InputError(f"{file}: expected version {VERSION}, got {version}; convert with the megatron_espo that wrote it")
    refuse_differences(f"{path}: expected a checkpoint of the model at model.path, got another model's", model_identity(hf_config), model)
    return manifest


def refuse_differences(what: str, expected: dict[str, Any], found: dict[str, Any], way_out: str = "") -> None:
    """InputError that lists the keys in which a checkpoint differs from what is expected of it."""
    keys = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if keys:
        listed = ", ".join(f"{key} {expected.get(key)} (checkpoint: {found.get(key)})" for key in keys)
        raise InputError(f"{what}: {listed}" + (f"; {way_out}" if way_out else ""))


def verify_files(path: str | Path, manifest: dict[str, Any]) -> None:
    """InputError, on every rank, unless the folder holds exactly the manifest's files, byte by byte. Collective: :func:`_checksums`, and a broadcast."""
    found = _checksums(Path(path))
    on_rank_0(lambda: _refuse_other_files(path, found, manifest["files"]))


def _refuse_other_files(path: str | Path, found: dict[str, str], expected: dict[str, str]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            raise InputError(f"{path}: {name} is {'missing' if name in expected else 'not part of the checkpoint; remove it'}")
        if found[name] != expected[name]:
            raise InputError(f"{path}: {name} is not the file that was written (SHA-256 differs); convert or copy it again")


def _chunk_key(index: int) -> str:
    return f"model{index}"


def optimizer_form(config, hf_config: dict[str, Any]) -> dict[str, Any]:
    """How the optimizer's state is stored: as whole tensors, which any layout can load; or as DDP's buckets, which need the same TP, PP and VPP.

    Where an embedding tied over pipeline stages has a bucket of its own, Megatron-Core 0.16 cuts whole tensors at wrong places.
    """
    whole = not is_tied(hf_config) or config.pipeline_model_parallel_size == 1
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
    layout = {name: getattr(config, name) for name in (*sizes, "expert_model_parallel_size")}
    return {"format": "fully_reshardable" if whole else "dp_reshardable", **layout}


def _loadable_form(path: str | Path, stored: dict[str, Any] | None, own: dict[str, Any]) -> dict[str, Any]:
    if stored is None:
        raise InputError(f"{path}: expected a run's checkpoint, got one of weights only; put it to use with `megatron-espo convert to-hf`")
    if stored["format"] == "dp_reshardable":
        what = f"{path}: its optimizer state can be loaded in the layout that wrote it only (another data-parallel size is fine)"
        refuse_differences(what, own | {"format": "dp_reshardable"}, stored, "restore the layout, or convert the weights to Hugging Face")
    return stored


def _sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer, form: dict[str, Any] | None, is_loading: bool
) -> dict[str, Any]:
    model = {_chunk_key(i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    if optimizer is None:
        return model
    if is_loading:
        _prepare_loading(optimizer)
    metadata = {"distrib_optim_sharding_type": form["format"], "chained_optim_avoid_prefix": True}
    return model | {"optimizer": optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}


def _prepare_loading(optimizer) -> None:
    """Two things that torch's Adam (used where Apex and Transformer Engine are absent) needs before Megatron loads into it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not hasattr(part, "_init_optimizer_states_with_dummy_values"):
            continue  # only the distributed optimizer
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()  # there are no moments before the first step
        if any("step" in state for state in part.optimizer.state.values()):
            part._set_main_param_and_optimizer_states = functools.partial(_set_but_step, part)


def _set_but_step(optimizer, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    # Megatron loads "step" with the parameter groups, leaves it out of the tensors, and then misses it there.
    step = optimizer._get_main_param_and_optimizer_states(parameter)["step"]
    type(optimizer)._set_main_param_and_optimizer_states(optimizer, parameter, tensors | {"step": step})


def _separate_step_counts(optimizer) -> None:
    # Megatron gives all parameters one tensor as their step count, and torch's Adam counts it up once for each of them.
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _begin(partial: Path, out: Path) -> None:
    refuse_existing(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _finish(
    partial: Path, out: Path, hf_config: dict[str, Any], dtype: torch.dtype, form: dict[str, Any] | None, files: dict[str, str]
) -> None:
    """Write the manifest, make everything durable and rename."""
    from megatron.core import __version__

    manifest = {"version": VERSION, "megatron_core": __version__, "dtype": str(dtype), "optimizer": form}
    manifest |= {"model": model_identity(hf_config), "files": files}
    (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    make_durable(*partial.iterdir(), partial)
    partial.rename(out)


def _checksums(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but the manifest, on rank 0. One gather of objects.

    Each rank reads what it wrote (or, of more ranks' files, its share), several files at a time; not what it knows already.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_NAME)
    writers = {name: int(match[1]) if (match := _WRITER.match(name)) else 0 for name in names}
    found = known or {}
    unknown = [name for name, writer in writers.items() if writer % ranks == rank and name not in found]
    with ThreadPoolExecutor(_CHECKSUM_THREADS) as pool:  # hashlib lets other threads run
        found = found | dict(zip(unknown, pool.map(lambda name: _checksum(folder / name), unknown), strict=True))
    return {name: digest for part in gathered(found) for name, digest in part.items()}


@contextmanager
def _checksums_while_written(folder: Path) -> Iterator[dict[str, str]]:
    """SHA-256 of this rank's shards, there when the block is left. Megatron's writers only append to them, so a thread can read after them while the disk
    is busy. torch's own, weaker checksums are left out meanwhile."""
    digests: dict[str, Any] = collections.defaultdict(hashlib.sha256)
    positions: dict[str, int] = collections.defaultdict(int)
    written, found, crc32 = threading.Event(), {}, get_crc32_options()

    def follow() -> None:
        last = False
        while not last:
            last = written.wait(0.05)
            for file in folder.glob(f"__{dist.get_rank()}_*"):
                with file.open("rb") as stream:
                    stream.seek(positions[file.name])
                    while piece := stream.read(1 << 20):
                        digests[file.name].update(piece)
                    positions[file.name] = stream.tell()

    thread = threading.Thread(target=follow, daemon=True)
    set_crc32_options(False)
    thread.start()
    try:
        yield found
    finally:
        written.set()
        thread.join()
        set_crc32_options(crc32)
        found |= {name: digest.hexdigest() for name, digest in digests.items() if positions[name] == (folder / name).stat().st_size}


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _keep_results_here() -> None:
    # Megatron hands its writers' results over in a queue that lives in a process of its own, which outlives a killed rank (and wants scripts to have
    # a ``__main__`` guard). A save that is waited for needs no such process.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()

"""Save and load Megatron's distributed checkpoints, with a manifest of model identity and SHA-256.

The format (``torch_dist``) stores whole tensors, so a checkpoint written in one layout loads in any
other. Its ``.metadata`` is a pickle, which runs code when it is opened: nothing in a folder is read
before its checksum was compared with the manifest.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_espo.distributed.collectives import (
    control_device,
    first_not_none,
    gather_objects,
    on_rank_0,
)
from megatron_espo.errors import InputError
from megatron_espo.files import make_durable, read_object
from megatron_espo.megatron import patches
from megatron_espo.models.spec import ModelSpec

MANIFEST_NAME = "megatron_espo.json"
STATE_NAME = "state.json"
VERSION = 1
_CHECKSUM_THREADS = 4
_BLOCK = 4096  # direct I/O starts and ends at a multiple of it in the file
_LEAST_DIRECT = 256 << 10  # bytes; fewer are written through the page cache
_CHUNK = 4 << 20  # bytes that are hashed and then written, while they are in the cache
_WRITER = re.compile(r"__(\d+)")  # the rank that wrote a file; rank 0 wrote the others
_FORMAT = "fully_reshardable"  # whole tensors, which load in any layout


def check_existing(out: str | Path) -> None:
    """Raise InputError if ``out`` exists."""
    if Path(out).exists():
        raise InputError(
            f"{out}: expected a path where nothing is yet, found something; choose another or "
            "remove it"
        )


def save_strategy() -> Any:
    """Return Megatron's way to save. It plans the first two saves; the plan serves all others."""
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    strategy = get_default_save_sharded_strategy()
    strategy.use_cached_ckpt_structure = True
    # Without the wrapper the first of several data-parallel ranks would write everything.
    return FullyParallelSaveStrategyWrapper(strategy, do_cache_distribution=True)


def save_checkpoint(
    chunks: Sequence[Any],
    spec: ModelSpec,
    out: str | Path,
    *,
    optimizer: Any = None,
    state: dict[str, Any] | None = None,
    strategy: Any = None,
) -> "Save":
    """Copy this rank's part to the host and start to write it into ``<out>.partial``.

    Training may continue at once. ``Save.finish`` gives the folder the name ``out`` when all ranks
    are done. Collective over all ranks. All ranks share the file system of ``out``.

    Args:
        chunks: this rank's model chunks, not wrapped in DDP.
        optimizer: Megatron's optimizer, to store its state too.
        state: further JSON values of the run; rank 0's are written.
        strategy: of :func:`save_strategy`, for several saves of the same model and optimizer.

    Raises:
        InputError: ``out`` exists; nothing is written.
        OSError: this rank could not write; ``out`` does not appear.
    """
    from megatron.core import __version__, dist_checkpointing

    out = Path(out)
    partial = out.with_name(out.name + ".partial")

    def begin() -> None:
        check_existing(out)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    on_rank_0(begin)
    # Megatron-Core prefers another package's writer if it is installed.
    options = {"async_sharded_save": True, "async_strategy": "mcore"}
    try:
        patches.keep_checkpoint_results_in_process()
        strategy = strategy or save_strategy()
        tensors = _sharded_state(chunks, optimizer, is_loading=False)
        request = dist_checkpointing.save(tensors, str(partial), strategy, **options)
        if state is not None and dist.get_rank() == 0:
            (partial / STATE_NAME).write_text(json.dumps(state) + "\n")
        manifest = {
            "version": VERSION,
            "megatron_core": __version__,
            "dtype": str(chunks[0].config.params_dtype),
            "optimizer": optimizer and {"format": _FORMAT},
            "model": model_identity(spec),
        }
        return Save(out, partial, manifest, request)
    except Exception as error:
        # No collective here: the other ranks wait in Megatron's, and end when this rank ends.
        raise OSError(_not_written(partial, error)) from error


def _not_written(partial: Path, error: BaseException) -> str:
    return f"{partial}: rank {dist.get_rank()} could not write its part: {error}"


class Save:
    """A checkpoint that a thread of each rank writes from a copy of the state in host memory.

    Megatron-Core plans the save and writes the files (``AsyncRequest``). Its own callers of a
    request start processes. A forked process may deadlock because of the threads of the
    communication library. A spawned one needs CUDA, and reads tensors that lie on the CPU while
    training changes them.

    Args:
        out: the path of the complete checkpoint.
        partial: the folder to write into.
        manifest: without the checksums.
        request: of ``dist_checkpointing.save``.
    """

    def __init__(self, out: Path, partial: Path, manifest: dict[str, Any], request: Any) -> None:
        self.out, self._partial, self._manifest, self._request = out, partial, manifest, request
        self._checksums: dict[str, str] = {}
        self._error: str | None = None
        buckets = request.async_fn_args[1] if request.async_fn else []
        for _, _, (_, tensors) in buckets:
            for i, (item, tensor) in enumerate(tensors):
                tensors[i] = item, torch.empty_like(tensor, device="cpu").copy_(tensor)
        self._thread = threading.Thread(target=self._write, args=(buckets,), daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether every rank has written its files, or failed. Collective: one all-reduce."""
        is_busy = torch.tensor(int(self._thread.is_alive()), device=control_device())
        dist.all_reduce(is_busy, op=dist.ReduceOp.MAX)
        return not is_busy

    def finish(self) -> None:
        """Wait for all ranks, write the manifest and rename the folder. Collective: all ranks.

        Raises:
            OSError: on every rank, if a rank could not write; ``out`` does not appear.
        """
        self._thread.join()
        if error := first_not_none(self._error):
            raise OSError(error)
        for finalize in self._request.finalize_fns:
            finalize()
        manifest = self._manifest | {"files": _checksums(self._partial, self._checksums)}

        def commit() -> None:
            (self._partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
            make_durable(*self._partial.iterdir(), self._partial)
            self._partial.rename(self.out)
            make_durable(self.out.parent)

        on_rank_0(commit)

    def _write(self, buckets: Sequence[Any]) -> None:
        """Write the files of this rank, in parallel. The bytes are hashed on their way."""
        crc32 = get_crc32_options()
        set_crc32_options(False)  # SHA-256 is enough
        try:
            with ThreadPoolExecutor(max(1, len(buckets))) as pool:
                written = list(pool.map(_write_file, buckets))
            if buckets:
                results = {i: result for i, (result, _) in enumerate(written)}
                self._request.async_fn_args[2].put(results)
            self._checksums = dict(file for _, file in written)
        except BaseException as error:
            self._error = _not_written(self._partial, error)
        finally:
            set_crc32_options(crc32)
            for _, _, (_, tensors) in buckets:
                tensors.clear()  # frees the host memory


def _write_file(bucket: Any) -> tuple[list[Any], tuple[str, str]]:
    """Write one file with fsync, by Megatron's writer; return its results, name and SHA-256."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    with contextlib.closing(_Hashing(bucket[0])) as hashing:
        write = FileSystemWriterAsync.write_preloaded_data
        _, written = write([hashing], 0, bucket, None, None, use_fsync=True)
    if isinstance(written, Exception):
        raise written
    return written, (bucket[1], hashing.digest.hexdigest())


class _Hashing(_StorageWriterTransforms):
    """Computes SHA-256 of what is written to a file, and writes long tensors by direct I/O.

    Copies in the page cache would cost more CPU time than all other work of a save, and displace
    what the host keeps there. File systems without direct I/O get usual writes.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.digest = hashlib.sha256()
        self._buffer = mmap.mmap(-1, _CHUNK)  # starts at a page, as direct I/O needs it
        self._direct: int | None = None
        with contextlib.suppress(OSError):
            self._direct = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)

    def close(self) -> None:
        self._buffer.close()
        if self._direct is not None:
            os.close(self._direct)

    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> tuple[Any, list[str]]:
        def write(data: Any) -> int:
            view = memoryview(data).cast("B")
            done = 0
            while done < len(view):
                # First to the end of a block of the file, then whole blocks, then the rest.
                rest = len(view) - done
                size = -raw_stream.tell() % _BLOCK or rest // _BLOCK * _BLOCK or rest
                part = view[done : done + min(size, _CHUNK)]
                self.digest.update(part)
                if len(part) < _LEAST_DIRECT or not self._write_directly(part, raw_stream):
                    raw_stream.write(part)
                done += len(part)
            return len(view)

        stream, descriptors = super().transform_save_stream(write_item, raw_stream)
        stream.write = write  # type: ignore[method-assign]
        return stream, descriptors

    def _write_directly(self, blocks: memoryview, stream: Any) -> bool:
        """Write at the stream's position and move it; False if the file system refuses."""
        if self._direct is None:
            return False
        with memoryview(self._buffer)[: len(blocks)] as aligned:
            aligned[:] = blocks
            try:
                if os.pwrite(self._direct, aligned, stream.tell()) < len(blocks):
                    return False
            except OSError as error:
                if error.errno != errno.EINVAL:  # larger blocks
                    raise
                return False
        stream.seek(len(blocks), os.SEEK_CUR)
        return True


def load_checkpoint(
    chunks: Sequence[Any], spec: ModelSpec, path: str | Path, *, optimizer: Any = None
) -> dict[str, Any]:
    """Load a checkpoint of any layout into this rank's chunks, in place. Collective: all ranks.

    Values are cast to the parameters' dtype. Embedding rows that only pad the vocabulary become
    zero if the checkpoint has none.

    Args:
        chunks: this rank's model chunks, not wrapped in DDP.
        optimizer: Megatron's optimizer, to load its state too. Learning rates, betas and eps stay
            those of its configuration.

    Returns:
        The ``state`` that was saved with it.

    Raises:
        InputError: a missing, foreign or damaged checkpoint, another model's, one without the
            optimizer's state, or a missing or unknown parameter.
    """
    from megatron.core import dist_checkpointing

    manifest = on_rank_0(lambda: read_manifest(path, spec))
    verify_files(path, manifest)
    if optimizer is not None:
        _check_optimizer(path, manifest.get("optimizer"))
    wanted = _sharded_state(chunks, optimizer, is_loading=True)
    loaded, unknown, missing = dist_checkpointing.load(wanted, str(path), strict="return_all")

    def must_match(key: str) -> bool:
        # Without an optimizer only the weights are read.
        is_wanted = optimizer is not None or not key.startswith("optimizer.")
        return is_wanted and not key.endswith("_extra_state")

    # Only the ranks that asked for a parameter know that the checkpoint lacks it.
    differences = gather_objects([set(filter(must_match, keys)) for keys in (missing, unknown)])

    def check_parameters() -> None:
        lacks, has = (sorted(set().union(*keys)) for keys in zip(*differences, strict=True))
        if lacks or has:
            raise InputError(
                f"{path}: expected the model's parameters; lacks {lacks or 'none'}, has besides "
                f"{has or 'none'}"
            )

    on_rank_0(check_parameters)
    for i, chunk in enumerate(chunks):
        # Not strict: only Transformer Engine's layers store an extra state (FP8 scales).
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)
    if optimizer is not None:
        patches.keep_configured_settings(optimizer, loaded["optimizer"])
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
        patches.separate_adam_steps(optimizer)
    return read_state(path)


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the JSON values saved with a checkpoint. InputError if the file is damaged."""
    file = Path(path, STATE_NAME)
    return read_object(file) if file.is_file() else {}


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """Return what distinguishes models, independent of the transformers version."""
    experts = spec.experts
    names = ("num_hidden_layers", "num_attention_heads", "rms_norm_eps", "tie_word_embeddings")
    return {
        "experts": experts and {**vars(experts), "layers": list(experts.layers)},
        "architecture": spec.architecture,
        **{name: getattr(spec, name) for name in names},
        "attention_bias": bool(spec.hf_config.get("attention_bias")),
        **spec.sizes,
        **spec.rope.model_arguments(),
        **spec.rope.yarn,
    }


def read_manifest(path: str | Path, spec: ModelSpec) -> dict[str, Any]:
    """Return the manifest of a checkpoint of this model. Reads nothing else. Zero collectives.

    Raises:
        InputError: no folder, no manifest, another version, or another model (names the keys that
            differ).
    """
    file = Path(path, MANIFEST_NAME)
    if not file.is_file():
        found = "a folder without one" if Path(path).is_dir() else "no such folder"
        raise InputError(
            f"{path}: expected a checkpoint of `megatron-espo convert to-megatron` (with "
            f"{MANIFEST_NAME}), got {found}"
        )
    manifest = read_object(file)
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{file}: expected version {VERSION}, got {manifest.get('version')}; convert with the "
            "megatron_espo that wrote it"
        )
    what = f"{path}: expected a checkpoint of the model at model.path, got another model's"
    check_differences(what, model_identity(spec), manifest.get("model", {}))
    return manifest


def check_differences(
    what: str, expected: dict[str, Any], found: dict[str, Any], way_out: str = ""
) -> None:
    """Raise InputError with the keys in which ``found`` differs from ``expected``, if any."""
    every = sorted(expected.keys() | found.keys())
    keys = [key for key in every if expected.get(key) != found.get(key)]
    if keys:
        pairs = (f"{key} {expected.get(key)} (checkpoint: {found.get(key)})" for key in keys)
        raise InputError(f"{what}: {', '.join(pairs)}" + (f"; {way_out}" if way_out else ""))


def verify_files(path: str | Path, manifest: dict[str, Any]) -> None:
    """Raise InputError, on every rank, unless the folder has exactly the manifest's files.

    Collectives: one gather of objects and one broadcast.
    """
    expected, found = manifest["files"], _checksums(Path(path))

    def check() -> None:
        for name in sorted(found.keys() | expected.keys()):
            if name not in found:
                raise InputError(f"{path}: {name} is missing")
            if name not in expected:
                raise InputError(f"{path}: {name} is not part of the checkpoint; remove it")
            if found[name] != expected[name]:
                raise InputError(
                    f"{path}: {name} is not the file that was written (SHA-256 differs); convert "
                    "or copy it again"
                )

    on_rank_0(check)


def _check_optimizer(path: str | Path, stored: dict[str, Any] | None) -> None:
    if stored is None:
        raise InputError(
            f"{path}: expected a run's checkpoint, got one of weights only; use it with "
            "`megatron-espo convert to-hf`"
        )
    if stored["format"] != _FORMAT:
        raise InputError(
            f"{path}: expected an optimizer state of format {_FORMAT}, got "
            f"{stored['format']} of an earlier release; convert the weights to Hugging Face"
        )


def _sharded_state(chunks: Sequence[Any], optimizer: Any, is_loading: bool) -> dict[str, Any]:
    model = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    if optimizer is None:
        return model
    if is_loading:
        patches.prepare_adam_for_loading(optimizer)
    patches.save_optimizer_shards(optimizer)
    metadata = {"distrib_optim_sharding_type": _FORMAT, "chained_optim_avoid_prefix": True}
    return model | {"optimizer": optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}


def _checksums(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """Return SHA-256 of every file but the manifest, on rank 0. One gather of objects.

    Each rank reads the files that it (or rank modulo world size) wrote, except ``known`` ones.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    digests = dict(known or {})
    unknown = []
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        match = _WRITER.match(name)
        is_own = (int(match[1]) if match else 0) % ranks == rank
        if is_own and file.is_file() and file.name != MANIFEST_NAME and name not in digests:
            unknown.append(name)
    with ThreadPoolExecutor(_CHECKSUM_THREADS) as pool:  # hashlib releases the GIL
        found = pool.map(lambda name: _checksum(folder / name), unknown)
        digests |= zip(unknown, found, strict=True)
    return {name: digest for part in gather_objects(digests) for name, digest in part.items()}


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""vLLM weight transport ``files``: the trainer writes files, the engine's workers map them.

The trainer writes one gather group (for example one decoder layer) at a time, then announces its
byte offsets and checksums. It uses two files in turn: it gathers and writes the next group while
the workers load the last one.

* On one machine the files are anonymous memory files (``memfd_create``). Workers open them through
  ``/proc``. The size of /dev/shm does not limit them, and they vanish with the trainer's process.
* Across machines the files lie in a folder that all machines share. The trainer closes a file
  before it announces the group, and workers open the file again for each group. NFS guarantees
  that they then read the new bytes (close-to-open consistency).

All init and update infos consist of JSON types. Importing this module registers both sides with
vLLM's factories.
"""

import itertools
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from vllm.distributed.weight_transfer import base, factory

from megatron_espo.distributed.checksum import array_checksum
from megatron_espo.rollout import vllm_patches

BACKEND = "files"
_ALIGNMENT = 64  # bytes; each tensor starts on a cache line
_FILES = 2


@dataclass
class FileTrainerInitInfo(base.TrainerInitInfo):
    """Trainer side: rank 0 sends, all ranks iterate the source.

    Attributes:
        prefix: path that the names of the files begin with, in a folder that trainer and workers
            share under one path; another one for each engine. Empty: memory files.
    """

    backend: ClassVar[str] = BACKEND

    prefix: str = ""


@dataclass
class FileInitInfo(base.WeightTransferInitInfo):
    """Worker side: paths of the files; ``[name, dtype, shape]`` of each weight of an update."""

    paths: list[str]
    weights: list[tuple[str, str, list[int]]]


@dataclass
class FileUpdateInfo(base.WeightTransferUpdateInfo):
    """One group.

    Attributes:
        file: index of its file in ``FileInitInfo.paths``.
        positions: index of each tensor in ``FileInitInfo.weights``.
        offsets: first byte of each tensor in the file.
        checksums: ``array_checksum`` of each tensor's bytes.
    """

    file: int
    positions: list[int]
    offsets: list[int]
    checksums: list[int]


class FileWeightTransferEngine(base.WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Worker side. An error leaves the model half loaded: the engine must be restarted."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Keep the list of weights.

        Raises:
            OSError: trainer and engine do not share the files.
        """
        for path in init_info.paths:
            open(path, "rb").close()
        self._info = init_info

    def start_weight_update(self) -> None:
        self._arrived: set[int] = set()
        vllm_patches.start_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's method synchronizes the accelerator, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Map one group, check it and load it.

        Raises:
            ValueError: a weight arrived twice or damaged.
            RuntimeError: vLLM's loader failed.
        """
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        with open(self._info.paths[update_info.file], "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        buffer = torch.frombuffer(mapping, dtype=torch.uint8)
        items = zip(update_info.positions, update_info.offsets, update_info.checksums, strict=True)
        weights = []
        for position, offset, checksum in items:
            name, dtype_name, shape = self._info.weights[position]
            dtype = getattr(torch, dtype_name)
            if position in self._arrived:
                raise ValueError(f"transfer: weight {name!r} arrived twice in one update.")
            self._arrived.add(position)
            damaged = f"transfer: weight {name!r} arrived damaged"
            stop = offset + prod(shape) * dtype.itemsize
            if stop > len(mapping):
                raise ValueError(f"{damaged}: the file has {len(mapping)} of {stop} bytes.")
            if (found := array_checksum(buffer[offset:stop].numpy())) != checksum:
                raise ValueError(f"{damaged}: checksum {found:08x}, sent {checksum:08x}.")
            weights.append((name, buffer[offset:stop].view(dtype).view(shape)))
        load: Any = self.model.load_weights
        try:
            with disable_mtp_completeness_check():
                load(weights)
        except Exception as error:
            what = f"{weights[0][0]} ... {weights[-1][0]}: {type(error).__name__}: {error}"
            raise RuntimeError(f"vLLM could not load {what}") from error
        vllm_patches.clone_pending_weights(self.model, buffer)

    def missing_weights(self) -> list[str]:
        """Announced names that have not arrived in this update."""
        names = [name for name, _, _ in self._info.weights]
        return [name for i, name in enumerate(names) if i not in self._arrived]

    def finish_weight_update(self) -> None:
        """Repack what vLLM serves. ``VLLMEngine`` asks for missing weights before."""
        vllm_patches.finish_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to release: each mapping goes with the last tensor that views it."""


class FileTrainerWeightTransferEngine(base.TrainerWeightTransferEngine[FileTrainerInitInfo]):
    """Trainer side. ``send_weights`` runs on every rank; all collectives are the source's."""

    init_info_cls = FileTrainerInitInfo

    @classmethod
    def trainer_init(
        cls,
        init_info: FileTrainerInitInfo,
        *,
        client: base.VLLMWeightSyncClient,
        source: base.WeightSource | None = None,
    ) -> Self:
        assert source is not None
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            engine._open(init_info.prefix, source.metadata())
        return engine

    def _open(self, prefix: str, metas: list[base.ParamMeta]) -> None:
        self._metas = {meta.name: (i, meta) for i, meta in enumerate(metas)}
        self._paths: list[str] = []
        self._resources = ExitStack()
        for i in range(_FILES):
            if prefix:
                path = Path(f"{prefix}-{i}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)  # a killed run leaves its files
                path.touch(mode=0o600)
                self._resources.callback(path.unlink, missing_ok=True)
            else:
                fd = os.memfd_create("megatron_espo_weights")
                self._resources.enter_context(open(fd, "r+b"))
                path = Path(f"/proc/{os.getpid()}/fd/{fd}")
            self._paths.append(str(path))
        self._executor = self._resources.enter_context(ThreadPoolExecutor(1, "weight-update"))
        weights = [(m.name, str(m.dtype).removeprefix("torch."), list(m.shape)) for m in metas]
        info = FileInitInfo(self._paths, weights)
        self.client.init_weight_transfer_engine(asdict(info))

    def send_weights(self) -> None:
        """One weight update: start, one message per group, finish.

        After an error the source is not exhausted (``ObservedSource.one_pass``).
        """
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source.iter_groups():
                pass
            return
        files = itertools.cycle(range(_FILES))
        pending = self._executor.submit(self.client.start_weight_update)
        for names, tensors in self.source.iter_groups():
            # The workers have loaded the group before the last one, so its file is free.
            try:
                info = self._write(next(files), names, tensors)
            finally:
                del tensors  # the next gather needs the memory
                pending.result()
            pending = self._executor.submit(self.client.update_weights, asdict(info))
        pending.result()
        self.client.finish_weight_update()

    def _write(
        self, index: int, names: Iterable[str], tensors: Iterable[torch.Tensor | None]
    ) -> FileUpdateInfo:
        info = FileUpdateInfo(index, [], [], [])
        with open(self._paths[index], "r+b") as file:
            for name, tensor in zip(names, tensors, strict=True):
                position, meta = self._metas[name]
                announced = meta.dtype, tuple(meta.shape)
                got = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
                if tensor is None or got != announced:
                    raise ValueError(f"Weight {name!r} was announced as {announced}, got {got}.")
                flat = tensor.detach().reshape(-1).cpu().view(torch.uint8)
                data = flat.numpy()
                info.positions.append(position)
                info.offsets.append(file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT))
                info.checksums.append(array_checksum(data))
                file.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        return info

    def shutdown(self) -> None:
        """Remove the files."""
        if self.is_sender:
            self._resources.close()


factory.WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)
factory.WeightTransferTrainerFactory.register_engine(BACKEND, FileTrainerWeightTransferEngine)

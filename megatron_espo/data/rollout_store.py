"""Recorded rollouts on disk, one file for each step.

A run continues from them, or trains from them again (``run.replay``).
"""

import io
import json
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_espo.data.scored_groups import ScoredGroups, from_columns, split, to_columns
from megatron_espo.errors import InputError
from megatron_espo.files import make_durable

_JSON, _TEXTS = "step.json", "texts.txt"
_FORMAT = 2
_PIECE_BYTES = 4 << 20
_ENCODING = ("utf-8", "surrogatepass")


class RolloutLog:
    """The folder ``rollouts`` with one ``step_000007.npz`` for each step.

    The file is an uncompressed zip archive. Its ``.npy`` members contain the columns of
    :func:`megatron_espo.data.scored_groups.to_columns`; ``texts.txt`` contains the texts one after
    the other, and ``step.json`` the rest. The CRC of the zip format detects damage.

    Args:
        folder: folder of the files.
        fingerprint: settings by name. ``read`` does not return rollouts that were recorded with
            other settings.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-log")
        self._writing: Future[None] | None = None

    def write(
        self, step: int, groups: ScoredGroups, *, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        """Write a step's scored rollouts in the background and flush them to disk. The file appears
        complete or not at all.

        Nothing may change the arguments until :meth:`wait`.

        Args:
            step: counted from 1.
            groups: the rollouts.
            before, after: JSON values, the state of the prompt stream before and after sampling.

        Raises:
            OSError: the previous write failed.
        """
        self.wait()
        states = {"fingerprint": self._fingerprint, "before": before, "after": after}
        self._writing = self._thread.submit(self._write, self._path(step), groups, states)

    def wait(self) -> None:
        """Return when the last write is durable, or raise its error (once)."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the background thread after its write. Raises the error of that write."""
        self._thread.shutdown()
        self.wait()

    def _write(self, path: Path, groups: ScoredGroups, states: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content, columns = to_columns(groups)
        texts = content.pop("texts")
        content |= states | {"format": _FORMAT, "text_lengths": list(map(len, texts))}
        partial = path.with_name(path.name + ".partial")
        with zipfile.ZipFile(partial, "w") as archive:
            # An environment may add metadata that JSON does not have.
            archive.writestr(_JSON, json.dumps(content, default=str))
            with _open(archive, _TEXTS) as member:
                member.writelines(text.encode(*_ENCODING) for text in texts)
            for name, arrays in columns.items():
                _write_array(archive, name, arrays)
        make_durable(partial)
        partial.replace(path)
        make_durable(self.folder)

    def read(
        self, step: int, before: dict[str, Any] | None
    ) -> tuple[ScoredGroups, dict[str, Any]] | None:
        """Read a step's rollouts and the state of the prompt stream after they were sampled;
        ``None`` if this run has recorded none from the state ``before``. A warning names settings
        that have changed.

        Args:
            step: counted from 1.
            before: the current state of the prompt stream; ``None`` accepts any state and any run.

        Raises:
            InputError: the file is damaged, or another release wrote it.
        """
        self.wait()
        path = self._path(step)
        if not path.is_file():
            return None
        try:
            with np.load(path) as file:
                content = json.loads(file[_JSON])
                if content.get("format") != _FORMAT:
                    raise InputError(
                        f"{path}: expected recorded rollouts of format {_FORMAT}, got those of an "
                        "earlier release; remove the file to sample the step again, or replay it "
                        "with that release"
                    )
                if before is not None and before != content["before"]:
                    return None
                then, now = content["fingerprint"], self._fingerprint
                names = [n for n in then.keys() | now.keys() if then.get(n) != now.get(n)]
                if before is not None and names:
                    changed = f"{', '.join(sorted(names))} changed"
                    print(f"warning: {path} is not used, because {changed}", flush=True)
                    return None
                lengths = np.array(content["text_lengths"])
                content["texts"] = split(file[_TEXTS].decode(*_ENCODING), lengths)
                arrays = {n: file[n] for n in file.files if n not in (_JSON, _TEXTS)}
            return from_columns(content, arrays), content["after"]
        except InputError:
            raise
        except Exception as error:  # zipfile, numpy, json and zlib raise many types
            raise InputError(
                f"{path}: expected recorded rollouts, found damage ({error}); "
                "remove the file to sample the step again"
            ) from None

    def forget(self, up_to_step: int) -> None:
        """Remove the files up to a step, because a checkpoint makes them unnecessary."""
        for path in self.folder.glob("step_*.npz"):
            if int(path.stem[5:]) <= up_to_step:
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.npz"


def _open(archive: zipfile.ZipFile, name: str) -> io.BufferedWriter:
    """A new member of the archive, which is written in pieces of a few MiB.

    Each write waits for the interpreter lock twice, so many small ones would take long while
    another thread runs.
    """
    member: Any = archive.open(name, "w", force_zip64=True)
    return io.BufferedWriter(member, _PIECE_BYTES)


def _write_array(archive: zipfile.ZipFile, name: str, arrays: list[np.ndarray]) -> None:
    """Write the concatenation of ``arrays`` as a ``.npy`` member, without building it in memory:
    experts may take gigabytes.
    """
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    header = {"descr": arrays[0].dtype.str, "fortran_order": False, "shape": shape}
    with _open(archive, f"{name}.npy") as member:
        np.lib.format.write_array_header_1_0(member, header)
        for array in arrays:
            member.write(np.ascontiguousarray(array).data)

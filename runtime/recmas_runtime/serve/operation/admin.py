"""Models added and removed over HTTP, behind the key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.codec import to_json
from recmas_runtime.serve.http.bodies import JsonRoute, Strict
from recmas_runtime.serve.http.errors import ApiError, documented, of_problems, sentence
from recmas_runtime.serve.operation.catalog import Catalog
from recmas_runtime.serve.protocol import ModelInfo
from recmas_runtime.serve.service import Service, ServiceError

_RETRY_S = 5.0


class AddModel(Strict):
    """A bundle on the disk of the service, and the name that requests call it by."""

    path: str = Field(min_length=1, max_length=4096)
    name: str = Field(min_length=1, max_length=128)


def admin_router(catalog: Catalog, service: Service, *, has_key: bool) -> APIRouter:
    """Return the routes under `/admin`; without a key they refuse everybody."""
    router = APIRouter(
        prefix="/admin/models",
        route_class=JsonRoute,
        responses=documented(400, 404, 408, 413, 415),
    )

    @router.get("", summary="Tell what is loaded.")
    async def list_models() -> dict[str, Any]:
        _demand_key(has_key)
        models = [_shown(service.models[name]) for name in sorted(service.models)]
        return {"object": "list", "data": models}

    @router.post("", status_code=201, summary="Load a bundle, or another one under its name.")
    async def add_model(asked: AddModel) -> dict[str, Any]:
        _demand_key(has_key)
        with _as_api_errors():
            return _shown(await catalog.add(asked.path, asked.name))

    @router.delete("/{name:path}", summary="Let a model go once its requests have ended.")
    async def remove_model(name: str) -> dict[str, Any]:
        _demand_key(has_key)
        with _as_api_errors():
            await catalog.remove(name)
        return {"id": name, "object": "model", "deleted": True}

    return router


def _demand_key(has_key: bool) -> None:
    if not has_key:
        hint = "Start it with RECMAS_API_KEY or --api-key-file."
        raise ApiError(403, "RM544", sentence("a service without a key takes no orders", hint))


@contextmanager
def _as_api_errors() -> Iterator[None]:
    try:
        yield
    except ServiceError as error:
        reason = "input" if error.reason == "failed" else error.reason
        raise of_problems(error.problems, reason=reason, retry_after_s=_RETRY_S) from None
    except RecmasError as error:
        raise of_problems(error.problems) from None


def _shown(model: ModelInfo) -> dict[str, Any]:
    return {"id": model.name, "object": "model", **to_json(model)}

"""The web application: translate, explain, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from engine_fast import __version__
from engine_fast.decoding.sources import UNKNOWN_SHARE
from engine_fast.inference.serving.explain import Explanation
from engine_fast.inference.serving.gate import Gate
from engine_fast.inference.serving.limits import Limits
from engine_fast.inference.serving.metrics import Metrics
from engine_fast.inference.serving.page import load_page
from engine_fast.inference.serving.schema import (
    PROBLEMS,
    Detail,
    ExplainRequest,
    Health,
    Problem,
    TranslateRequest,
    TranslateResponse,
)
from engine_fast.inference.serving.service import CLIENT_GONE, Service
from engine_fast.inference.serving.systems import System, Translation

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text} for status, text in PROBLEMS.items()
}


def create_app(systems: Mapping[str, System], limits: Limits | None = None) -> FastAPI:
    """An application that serves these systems (see load_systems), the first by default.

    Threads start with the application's lifespan and end with it, after what was accepted has been answered. Routes:
    POST /translate, POST /explain, GET /health, GET /metrics, GET /, GET /openapi.json. No route writes or fetches.
    """
    limits = limits or Limits()
    metrics = Metrics()
    service = Service(systems, limits, metrics)
    page = load_page()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        yield
        await asyncio.to_thread(service.stop)

    # FastAPI's pages of documentation fetch from a CDN: they are off, the schema is at /openapi.json.
    app = FastAPI(title="engine_fast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, limits=limits, metrics=metrics)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(Exception, _tell_bug)

    @app.post("/translate", response_model_exclude_none=True, responses=_PROBLEMS)
    async def translate(body: TranslateRequest, request: Request) -> TranslateResponse:
        """Translate sentences; requests that come at the same time share batches."""
        start = time.perf_counter()
        system = service.choose(body)
        lines = body.lines
        service.check_lines(lines, "sentences" if "sentences" in body.model_fields_set else "text")
        wish = body.wish()
        found = await service.ask(request, system, lines, wish)
        if found is None:
            return Response(status_code=CLIENT_GONE)  # type: ignore[return-value]
        return TranslateResponse(
            model=system.name,
            translations=[each.text for each in found],
            seconds=time.perf_counter() - start,
            warnings=[*(f"{name}: without effect" for name in system.without_effect(wish)), *_remarks(found)],
            details=[_detail(system, each) for each in found] if body.details else None,
        )

    @app.post("/explain", responses=_PROBLEMS)
    async def explain(body: ExplainRequest, request: Request) -> Explanation:
        """One sentence through one model: length candidates, passes, confidence, energy."""
        system = service.choose(body)
        service.check_lines([body.text], "text")
        found = await service.ask(request, system, [body.text], body.wish(explain=True))
        if found is None:
            return Response(status_code=CLIENT_GONE)  # type: ignore[return-value]
        explanation: Explanation = found[0]
        return explanation

    @app.get("/health", responses={503: {"model": Health, "description": "Not ready."}})
    async def health(response: Response) -> Health:
        """Whether the service is ready, and what it offers."""
        found = service.health()
        response.status_code = 200 if found.status == "ready" else 503
        return found

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def tell_metrics() -> Response:
        """Counters in Prometheus' format."""
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page.html, headers={"Content-Security-Policy": page.policy})

    _state_limits(app.openapi(), limits)
    return app


def _state_limits(schema: dict[str, Any], limits: Limits) -> None:
    """Write into /openapi.json what this service takes; FastAPI keeps the schema that it has made once."""
    requests = schema["components"]["schemas"]
    sentences = requests["TranslateRequest"]["properties"]["sentences"]
    sentences |= {"maxItems": limits.max_sentences, "items": {"type": "string", "maxLength": limits.max_characters}}
    requests["ExplainRequest"]["properties"]["text"]["maxLength"] = limits.max_characters


async def _tell_invalid(request: Request, error: Exception) -> JSONResponse:
    """Where and why, without the input: that may be large, hold NaN or half a surrogate pair, or be secret."""
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):  # then FastAPI does not look into the body
        return JSONResponse({"detail": "Content-Type is not application/json; say that the body is JSON"}, 415)
    problems = [{key: each[key] for key in ("type", "loc", "msg")} for each in error.errors()]
    return JSONResponse({"detail": problems[:20]}, 422)


async def _tell_bug(_: Request, error: Exception) -> JSONResponse:
    """What nobody foresaw; the log has its traceback."""
    return JSONResponse({"detail": f"a bug in the service ({type(error).__name__})"}, 500)


def _remarks(found: list[Translation]) -> list[str]:
    """What was unusual about the sentences."""
    remarks = []
    cut = [place for place, each in enumerate(found, 1) if each.source.truncated]
    if cut:
        remarks.append(f"{len(cut)} of {len(found)} sentences, the first number {cut[0]}, were too long and were cut")
    pieces = sum(len(each.source) - 1 for each in found)
    share = sum(each.source.num_unknown for each in found) / max(1, pieces)
    if share > UNKNOWN_SHARE:
        remarks.append(f"{share:.0%} of the pieces are unknown to the vocabulary; is this the language of the model?")
    return remarks


def _detail(system: System, translation: Translation) -> Detail:
    source, hypothesis = translation.source, translation.hypothesis
    return Detail(
        tokens=system.loaded.target_vocabulary.pieces(hypothesis.tokens),
        score=hypothesis.score,
        log_probability=hypothesis.log_probability,
        num_source_tokens=len(source),
        num_unknown=source.num_unknown,
        truncated=source.truncated,
    )

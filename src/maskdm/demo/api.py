"""The JSON API: POST /generate."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from maskdm.demo.service import Drawn, Service
from maskdm.demo.wishes import Wish, wish_of
from maskdm.demo.work import Busy, Job, Stopped
from maskdm.errors import UserError
from maskdm.pictures import to_pil

MOST_BODY = 1 << 16
"""Bytes of a request."""

POLL = 0.1
"""Seconds between two looks at whether whoever asked is still there."""


class Api:
    """Answers POST /generate with what a service draws."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def generate(self, request: Request) -> JSONResponse:
        """Base64 PNGs and what was used; 400, 413, 415 or 503 with one sentence. One who hangs up stops the drawing."""
        # only a page of our own may send this type unasked: a browser asks first where another site's page would, and is refused
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return _refused("send JSON, with the header Content-Type: application/json", 415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY:
                return _refused(f"the request has more than {MOST_BODY >> 10} KiB", 413)
        try:
            job = self._service.generate(parse_wish(body))
        except Busy as error:
            return _refused(str(error), 503)
        except UserError as error:
            return _refused(str(error))
        return await _answer(job, request)


async def _answer(job: Job[Drawn], request: Request) -> JSONResponse:
    try:
        while not job.future.done():
            if await request.is_disconnected():
                return _refused("nobody waits for it any more", 499)
            await asyncio.sleep(POLL)
        drawn = job.result()
    except Stopped:
        return _refused("the demo was stopped", 503)
    except UserError as error:
        return _refused(str(error))
    finally:
        job.stop()
    return JSONResponse({"images": [_png(image) for image in drawn.images], "used": drawn.used})


def _png(image: Any) -> str:
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _refused(sentence: str, status: int = 400) -> JSONResponse:
    said = " ".join(sentence.split())
    return JSONResponse({"error": said.encode("utf-8", "replace").decode()}, status)  # halves of characters, quoted, cannot be sent


def parse_wish(body: bytes) -> Wish:
    """A request's JSON. Raises UserError, in one sentence."""
    try:
        given: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the request is no JSON") from None
    if not isinstance(given, dict):
        raise UserError('the request is no JSON object; give one such as {"num": 4, "seed": 1}')
    return wish_of(given)

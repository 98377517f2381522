"""Servers of this project answer their own pages and programs, not pages of others that a browser has open."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import PlainTextResponse

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


def port_number(argument: str) -> int:
    """The number of a port."""
    if not 0 <= (found := int(argument)) < 2**16:
        raise argparse.ArgumentTypeError(f"{found} is not from 0 to 65535")
    return found


def own_pages_only(application: Application, port: int) -> Application:
    """`application` served at 127.0.0.1:`port`, which answers 403 to a Host of another name (one that was made to lead
    here) and to an Origin of another page."""
    hosts = {f"{host}:{port}".encode() for host in ("127.0.0.1", "localhost")}
    origins = {None, *(b"http://" + host for host in hosts)}

    async def answer(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        foreign = headers.get(b"host") not in hosts or headers.get(b"origin") not in origins
        refused = PlainTextResponse(f"Only for pages of 127.0.0.1:{port}.", 403)
        await (refused if foreign and scope["type"] != "lifespan" else application)(scope, receive, send)

    return answer

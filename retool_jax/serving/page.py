"""The page at `/`: a chat in a browser, made of three files beside this one that load nothing from elsewhere.

A model's output is only shown as text: the page's script makes text nodes of it, and the Content-Security-Policy lets a
browser load and run only these files, connect only to this server, and create no markup from text.
"""

from pathlib import Path

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def page_routes() -> list[Route]:
    """Routes of the page's files. They need no token, since they contain nothing of the run."""
    return [_route(path, Path(__file__).with_name(name)) for path, name in _FILES.items()]


def _route(path: str, file: Path) -> Route:
    content, kind = file.read_bytes(), _TYPES[file.suffix]

    async def send(_: HTTPRequest) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return Route(path, send)

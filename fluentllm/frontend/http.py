"""What the HTTP parser refuses before any route sees it, answered in the same error format as everything else."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .responses import error_body


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, which would answer broken chunks, wrong lengths and what is no HTTP in plain text."""

    def send_400_response(self, msg: str) -> None:
        body = error_body(f"{msg} Its request line, headers, chunks or length are broken.", status=400, code="invalid_http")
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

"""What the HTTP parser refuses before any route sees it, answered in the same error format as everything else."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .responses import error_body

MAX_HEAD = 1024 * 1024
"""Most bytes of a request line and headers, or of trailers. The parser itself keeps whatever comes, from anybody."""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, which would answer broken chunks, wrong lengths and what is no HTTP in plain text."""

    _unfinished = 0
    """Bytes that came since the parser last had something whole: a head, a piece of a body, a request."""

    def data_received(self, data: bytes) -> None:
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD and not self.transport.is_closing():
            self._refuse(f"The request line and headers are longer than {MAX_HEAD} bytes.")

    def on_headers_complete(self) -> None:
        self._unfinished = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unfinished = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(f"{msg} Its request line, headers, chunks or length are broken.")

    def _refuse(self, message: str) -> None:
        body = error_body(message, status=400, code="invalid_http")
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

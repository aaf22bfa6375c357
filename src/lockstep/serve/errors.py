"""What a client is told when a request cannot be answered, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer with an error status.

    Args:
        status: HTTP status, 4xx or 5xx.
        message: one sentence for the client.
        param: the field of the request that it is about.
        code: a word for programs, one of OpenAI's where there is one.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def document(self) -> dict[str, Any]:
        """Return the answer's body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

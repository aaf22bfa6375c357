"""What a client is told when a request cannot be answered, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer with an error status; `param` is the field that it is about, `code` a word for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def document(self) -> dict[str, Any]:
        """Return the answer's body."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error: of one of ours, that there is one."""
    return error if isinstance(error, ApiError) else ApiError(500, "an error inside of the server; its log tells more")

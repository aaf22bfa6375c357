"""Errors that clients get, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error response; `param` is the field at fault, `code` a reason for programs."""

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
    """Return an error as clients see it: details of an internal one are only in the log."""
    return error if isinstance(error, ApiError) else ApiError(500, "an error inside of the server; its log tells more")

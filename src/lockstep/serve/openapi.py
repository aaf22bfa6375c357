"""The service as an OpenAPI document, for clients and tests that read one."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from lockstep._version import __version__
from lockstep.serve.schema import ChatRequest, CompletionRequest

_REFERENCE = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_NULLABLE = {"anyOf": [_TEXT, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT, "param": _NULLABLE, "code": _NULLABLE},
        }
    },
}
_USAGE = {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        **dict.fromkeys(("id", "object", "model"), _TEXT),
        "created": {"type": "integer"},
        "choices": {"type": "array", "items": {"type": "object", "required": ["index", "finish_reason"]}},
        "usage": {"type": "object", "required": list(_USAGE), "properties": _USAGE},
    },
}


def openapi_document(model: str) -> dict[str, Any]:
    """Return the document; `model` is the name of the model that is served."""
    kinds = [(kind, "validation") for kind in (CompletionRequest, ChatRequest)]
    _, schemas = models_json_schema(kinds, ref_template=_REFERENCE)
    components = {"schemas": schemas["$defs"] | {"Error": _ERROR, "Answer": _ANSWER}}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    paths: dict[str, Any] = {
        "/v1/completions": _generates("Continue prompts.", "CompletionRequest"),
        "/v1/chat/completions": _generates("Continue a conversation.", "ChatRequest"),
        "/v1/models": _shows("The model that is served.", "application/json", key=True),
        "/health": _shows("How the service and each rank is.", "application/json"),
        "/metrics": _shows("Figures for Prometheus.", "text/plain"),
    }
    info = {"title": f"Lockstep: {model}", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _generates(summary: str, schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Answer")}}, "text/event-stream": {}}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model=schema)}}}}
    return {"post": {"summary": summary, "requestBody": body, **_answers(content, key=True)}}


def _shows(summary: str, media_type: str, *, key: bool = False) -> dict[str, Any]:
    answers = _answers({media_type: {}}, key=key)
    if not key:  # `/health` tells what is wrong in its own form
        answers["responses"]["503"] = {"description": "Nothing can be answered.", "content": {media_type: {}}}
    return {"get": {"summary": summary, **answers}}


def _answers(content: dict[str, Any], *, key: bool) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    responses = {
        "200": {"description": "The answer.", "content": content},
        "default": {"description": "An error.", "content": error},
    }
    return {"responses": responses} | ({"security": [{"key": []}]} if key else {})

# A worker such as a foreign caller talks to: one JSON document per line in, one out, objects by reference. Values cross
# as they do through Snakepit: collections of plain values exactly, a bare int as a float, a bare None as the string
# "None", anything else as a reference. Each request runs in a thread of its own, so that nothing in a ContextVar
# reaches the next. An error crosses as the name of its type and its message, as Snakepit's `grpc_server.py` sends it.

import importlib
import itertools
import json
import sys
import threading
from typing import Any

refs: dict[str, Any] = {}
numbers = itertools.count()


def is_plain(value: object) -> bool:
    """Whether JSON carries a value exactly; a NumPy scalar or a bool in the place of an int is not plain."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and is_plain(each) for key, each in value.items())
    return type(value) in (int, float, str, bool)


def encode(value: object) -> object:
    if value is None:
        return "None"
    if type(value) is int:
        return float(value)
    if is_plain(value):
        return value
    ref = f"ref-{next(numbers)}"
    refs[ref] = value
    return {"ref": ref, "type": type(value).__name__, "inspect": repr(value)}


def decode(value: object) -> object:
    if isinstance(value, dict) and set(value) >= {"ref"}:
        return refs[value["ref"]]
    if isinstance(value, list):
        return [decode(each) for each in value]
    return value


def answer(request: dict[str, Any]) -> object:
    arguments = [decode(each) for each in request.get("args", [])]
    options = {name: decode(each) for name, each in request.get("kwargs", {}).items()}
    match request["op"]:
        case "create":
            return encode(getattr(importlib.import_module(request["module"]), request["class"])(*arguments, **options))
        case "get_class":
            return encode(getattr(importlib.import_module(request["module"]), request["class"]))
        case "call":
            return encode(getattr(decode(request["object"]), request["method"])(*arguments, **options))
        case "get":
            return encode(getattr(decode(request["object"]), request["attribute"]))
        case "enter":
            return encode(decode(request["object"]).__enter__())
        case "exit":
            return encode(decode(request["object"]).__exit__(*request["args"]))
        case "release":
            del refs[request["object"]["ref"]]
            return True
        case unknown:
            raise ValueError(f"unknown operation {unknown!r}")


def serve() -> None:
    for line in sys.stdin:
        reply: dict[str, object] = {}

        def work(line: str = line, reply: dict[str, object] = reply) -> None:
            try:
                reply["ok"] = answer(json.loads(line))
            except Exception as error:
                reply["error"] = {"type": type(error).__name__, "message": str(error)}

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()

# What a reader of Python classes for another language finds on ours. Prints it as JSON, so that other Python versions
# can be asked: `python tests/introspection.py DPMetadata` with the package on the path.

import inspect
import json
import sys
import typing


def describe(cls: type) -> dict:
    """Return functions and attributes of a class as such a reader finds them.

    It takes every name of `dir(cls)` but dunders: what can be called becomes a function, the rest an attribute; and the
    constructor. Types come from `typing.get_type_hints`, and are lost for a function in which one cannot be resolved.
    """
    functions, attributes = {}, []
    for name in dir(cls):
        if name.startswith("__") and name != "__init__":
            continue
        value = getattr(cls, name)
        if not callable(value):
            attributes.append(name)
            continue
        signature = inspect.signature(value)
        hints = typing.get_type_hints(value)
        functions[name] = {
            "parameters": [
                [
                    parameter.name,
                    parameter.kind.name,
                    type_name(hints.get(parameter.name)),
                    parameter.default is not inspect.Parameter.empty,
                ]
                for parameter in signature.parameters.values()
                if parameter.name != "self"
            ],
            "returns": type_name(hints.get("return")),
            "doc": inspect.getdoc(value) or "",
        }
    module = sys.modules[cls.__module__]
    return {"functions": functions, "attributes": attributes, "doc": inspect.getdoc(cls), "module_doc": module.__doc__}


def type_name(hint: object) -> str:
    """Return the name of a resolved annotation, the bare name of a class."""
    if hint is None:
        return ""
    return hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)


if __name__ == "__main__":
    import lockstep

    print(json.dumps({name: describe(getattr(lockstep, name)) for name in sys.argv[1:]}))

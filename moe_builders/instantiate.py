"""``_component_`` nodes of a config as objects, recursively, with mistakes named by their place."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_builders.errors import InputError


def instantiate(node: Mapping[str, Any], *args: Any, path: str, **kwargs: Any) -> Any:
    """Call the component that a config node names.

    Args:
        node: {"_component_": "package.module.name", argument: value, ...}; values that are such
            nodes themselves are instantiated first, at any depth.
        *args: positional arguments from the caller.
        path: where the node stands in the config, for messages.
        **kwargs: arguments from the caller; they win over the node's.

    Raises:
        InputError: no or unknown ``_component_``, or arguments it does not take.
    """
    if not isinstance(node, Mapping) or "_component_" not in node:
        raise InputError(f"{path} needs a _component_: the dotted path of what to build")
    component = find_component(node["_component_"], path=f"{path}._component_")
    own = {
        key: _build_value(value, f"{path}.{key}")
        for key, value in node.items()
        if key != "_component_"
    }
    _check_arguments(component, args, own | kwargs, path)
    return component(*args, **(own | kwargs))


def find_component(name: Any, *, path: str) -> Callable[..., Any]:
    """The object at a dotted path; modules in the working directory are found too.

    Raises:
        InputError: nothing there; near names are given.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    module_name, _, attribute = str(name).rpartition(".")
    if not module_name:
        raise InputError(f"{path} is {name!r}, but must be a dotted path (module.name)")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a path may also go through a class or a package attribute
        if error.name is None or not module_name.startswith(error.name):
            raise
        module = _attribute_path(module_name)
        if module is None:
            raise InputError(
                f"{path} is {name!r}, but there is no module {error.name!r}"
            ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise InputError(
            f"{path} is {name!r}, but {module_name} has no {attribute!r}"
            f"{did_you_mean(attribute, dir(module))}"
        )
    if not callable(found):
        raise InputError(f"{path} is {name!r}, which cannot be called")
    return found


def did_you_mean(word: str, known: Any) -> str:
    """ " (did you mean 'x'?)", or nothing when no name is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _attribute_path(name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        return None
    try:
        return getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError:
        return None


def _build_value(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        if "_component_" in value:
            return instantiate(value, path=path)
        return {key: _build_value(v, f"{path}.{key}") for key, v in value.items()}
    if isinstance(value, list):
        return [_build_value(v, f"{path}[{i}]") for i, v in enumerate(value)]
    return value


def _check_arguments(
    component: Callable[..., Any], args: tuple, kwargs: dict[str, Any], path: str
) -> None:
    try:
        signature = inspect.signature(component)
    except ValueError:  # some built-ins do not tell
        return
    parameters = signature.parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
        for key in kwargs:
            if key not in names:
                raise InputError(
                    f"unknown key {path}.{key}{did_you_mean(key, names)}; "
                    f"{getattr(component, '__name__', component)} takes "
                    f"{', '.join(names)}"
                )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{path}: {getattr(component, '__name__', component)}: {error}") from error

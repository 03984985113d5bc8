"""``_component_`` nodes of a config as objects, recursively, with mistakes named by their place."""

import difflib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_builders.errors import InputError

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}

_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow")


def instantiate(node: Mapping[str, Any], *args: Any, path: str, **kwargs: Any) -> Any:
    """Call the component that a config node names.

    Args:
        node: {"_component_": "package.module.name", argument: value, ...}; values that are such
            nodes themselves are instantiated first, at any depth.
        *args: positional arguments from the caller.
        path: where the node stands in the config, for messages.
        **kwargs: arguments from the caller; they win over the node's.

    Raises:
        InputError: no or unknown ``_component_``, arguments it does not take, or values it
            refuses with a ValueError.
    """
    component = component_of(node, path=path)
    own = {
        key: _build_value(value, f"{path}.{key}")
        for key, value in node.items()
        if key != "_component_"
    }
    _check_arguments(component, args, own | kwargs, path)
    _check_types(component, {k: v for k, v in own.items() if k not in kwargs}, path)
    try:
        return component(*args, **(own | kwargs))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {_name(component)}: {first_line(error)}") from error


def component_of(node: Any, *, path: str) -> Callable[..., Any]:
    """What a node's ``_component_`` names.

    Raises:
        InputError: see ``instantiate``.
    """
    if not isinstance(node, Mapping) or "_component_" not in node:
        shown = ""
        if isinstance(node, str):
            shown = f", here {path}: {{_component_: {node}}}"
        elif isinstance(node, Mapping) and any(str(k).startswith("_component_:") for k in node):
            shown = " (YAML wants a blank after the colon, {_component_: NAME})"
        raise InputError(f"{path} needs a _component_: the dotted path of what to build{shown}")
    return find_component(node["_component_"], path=f"{path}._component_")


def find_component(name: Any, *, path: str) -> Callable[..., Any]:
    """The object at a dotted path; modules in the working directory are found too.

    Raises:
        InputError: nothing there; near names are given. An error inside the module itself is
            raised as it is.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    module_name, _, attribute = str(name).rpartition(".")
    if not module_name or not all(part.isidentifier() for part in str(name).split(".")):
        raise InputError(f"{path} is {name!r}, but must be a dotted path (module.name)")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a path may also go through a class or a package attribute
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        module = _attribute_path(module_name)
        if module is None:
            raise InputError(
                f"{path} is {name!r}, but there is no module {error.name!r}"
                f"{_remedy(name, error, path)}"
            ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise InputError(
            f"{path} is {name!r}, but {module_name} has no {attribute!r}"
            f"{did_you_mean(attribute, _members(module))}"
        )
    if not callable(found):
        raise InputError(f"{path} is {name!r}, which cannot be called")
    return found


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", or nothing when no name is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def first_line(error: object) -> str:
    """What an error of somebody else's (or its message) says, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def signature_of(component: Callable[..., Any]) -> inspect.Signature | None:
    """With annotations as objects where they can be evaluated; None: it does not tell."""
    for eval_str in (True, False):
        try:
            return inspect.signature(component, eval_str=eval_str)
        except Exception:  # an annotation may be any program
            continue
    return None


def _remedy(name: str, error: ModuleNotFoundError, path: str) -> str:
    """A data file's name in place of a component, or a package that is not there at all."""
    if path.startswith("dataset") and Path(name).suffix in _DATA_SUFFIXES:
        return f": to read a file set {path.removesuffix('._component_')}.data_files={name}"
    package = str(error.name).partition(".")[0]
    if find_spec(package) is not None:
        return ""
    return f": install the package that has it, or start where {package}.py is"


def _members(module: Any) -> list[str]:
    """Names in a module or class but for modules; what is not loaded yet is not loaded."""
    loaded = getattr(module, "__dict__", {})
    return [n for n in dir(module) if not isinstance(loaded.get(n), types.ModuleType)]


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
    signature = signature_of(component)
    if signature is None:
        return
    parameters = signature.parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for key in kwargs:
            if key not in names:
                raise InputError(
                    f"unknown key {path}.{key}{did_you_mean(key, names)}; "
                    f"{_name(component)} takes {', '.join(names) or 'no arguments'}"
                )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{path}: {_name(component)}: {error}") from error


def _check_types(component: Callable[..., Any], own: Mapping[str, Any], path: str) -> None:
    """Numbers, words and switches against plain annotations; whatever is less plain passes."""
    signature = signature_of(component)
    if signature is None:
        return
    for key, value in own.items():
        parameter = signature.parameters.get(key)
        if parameter is None or (value is None and parameter.default is None):
            continue
        kinds = _plain_types(parameter.annotation)
        if kinds and not any(_is_a(value, kind) for kind in kinds):
            words = " or ".join(_WORDS.get(kind, "null") for kind in kinds)
            raise InputError(f"{path}.{key} is {value!r}, but must be {words}")


def _plain_types(annotation: Any) -> tuple[type, ...]:
    """The types of ``int``, ``int | None`` and the like; () when there is more to it."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = typing.get_args(annotation)
    else:
        kinds = (annotation,)
    plain = (*_WORDS, types.NoneType)
    return tuple(kinds) if all(kind in plain for kind in kinds) else ()


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: (int, float), str: (str, Path)}.get(kind, kind))


def _name(component: Callable[..., Any]) -> str:
    return getattr(component, "__name__", str(component))

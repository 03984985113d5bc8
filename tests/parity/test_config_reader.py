"""No field of a config.json is overlooked: it is honoured, refused by name, or listed as inert."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from helpers_parity import INERT, builder_arguments

from moe_builders.errors import InputError


def refusal(case, config) -> str:
    """The message; one sentence without line breaks."""
    with pytest.raises(InputError) as caught:
        builder_arguments(case, config)
    message = str(caught.value)
    assert "\n" not in message
    assert f"config.json of a {case.model_type}" in message
    return message


def test_an_unknown_field_is_refused_by_name(case, variant):
    config = case.written_config(variant)
    builder_arguments(case, config)  # as save_pretrained writes it
    for name in ("a_field_of_next_year", "quantization_of_another_kind"):
        assert f"{name}=3" in refusal(case, config | {name: 3})


def other_values(value: Any) -> Iterator[Any]:
    """Values near one of config.json, of the same type."""
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, value + 2, 2 * value, value - 1)
        case float():
            yield from (2 * value + 0.125, value / 2)
        case str():
            yield value + "_of_another_kind"
        case None:
            yield from (1, 7, True, "a word", {"a": 1}, [1])
        case list():
            yield from (value[1:], [*value, 0], [*value, 1], [*value, "a word"])
            for number, one in enumerate(value):
                for changed in other_values(one):
                    yield [*value[:number], changed, *value[number + 1 :]]
        case dict():
            yield {}


def outcome(case, config) -> Any:
    """The builder's arguments, or what is said instead."""
    try:
        return builder_arguments(case, config)
    except InputError as refused:
        return str(refused)


def parts(config: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths of all fields, in mappings too."""
    for name, value in config.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *inner) for inner in parts(value))


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return config


@pytest.mark.check("config")
def test_no_field_is_overlooked(case, variant):
    config = case.written_config(variant)
    plain = builder_arguments(case, config)
    overlooked = []
    for path in parts(config):
        if path[0] in INERT or path[0] in case.inert or ".".join(path) in case.inert:
            continue
        place = config
        for name in path:
            place = place[name]
        if not any(outcome(case, changed(config, path, v)) != plain for v in other_values(place)):
            overlooked.append(".".join(path))
    assert not overlooked, "honour, refuse, or list in Case.inert"


@pytest.mark.check("config")
def test_a_missing_field_is_named_or_has_the_default_of_transformers(case, variant):
    config = case.written_config(variant)
    names = type(case.reference()).attribute_map
    for name in config.keys() - INERT - case.inert.keys():
        short = {other: value for other, value in config.items() if other != name}
        found = outcome(case, short)
        if isinstance(found, str):
            # or by another of its names, or the part of it that is needed
            spellings = {name, names.get(name, name), *(k for k, v in names.items() if v == name)}
            if isinstance(config[name], dict):
                spellings |= config[name].keys()
            assert any(spelling in found for spelling in spellings), (name, found)
            continue
        if name in case.own_defaults:
            continue
        full = case.completed(short)
        assert found == outcome(case, full), f"the default of {name} is another one"


@pytest.mark.check("config")
def test_null_is_refused_or_means_what_transformers_makes_of_it(case, variant):
    config = case.written_config(variant)
    for name in config.keys() - INERT - case.inert.keys() - {"rope_parameters"}:
        found = outcome(case, config | {name: None})
        try:
            full = case.completed(config | {name: None})
        except Exception:  # its own checks: null is no value of this field
            continue
        if not isinstance(found, str):
            assert found == outcome(case, full), f"null of {name} is another value"


def test_hub_spelling_of_rotary_embedding(case, variant):
    """Older files have rope_theta and rope_scaling instead of rope_parameters."""
    config = case.written_config(variant)
    rope = config.pop("rope_parameters")
    if not all(isinstance(key, str) and not isinstance(v, dict) for key, v in rope.items()):
        pytest.skip("one rotary embedding for each kind of layer")
    hub = config | {"rope_theta": rope["rope_theta"]}
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    hub["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    if "partial_rotary_factor" in rope:
        hub["partial_rotary_factor"] = rope["partial_rotary_factor"]
    expected = builder_arguments(case, config | {"rope_parameters": rope})
    assert builder_arguments(case, hub) == expected

"""``_component_`` nodes: found, built at any depth, and every mistake named by its place."""

import json
import sys
import textwrap
from fractions import Fraction

import pytest

from moe_builders.errors import InputError
from moe_builders.instantiate import did_you_mean, find_component, first_line, instantiate

HERE = "test_instantiate"


class Box:
    """Anything by name, to look into."""

    def __init__(self, value=None, *, more=None, label="box"):
        self.value, self.more, self.label = value, more, label

    @classmethod
    def labelled(cls, value, label):
        return cls(value, label=label)


def typed(number: int, ratio: float = 1.0, flag: bool = False, word: str = "", *,
          maybe: int | None = None, implicit: int = None, either: int | str = 0,  # noqa: RUF013
          betas: tuple[float, float] = (0.9, 0.99), anything=None):  # fmt: skip
    return (number, ratio, flag, word, maybe, implicit, either, betas, anything)


def open_ended(first, **options):
    return first, options


def picky(value):
    raise ValueError(f"value is {value}\nand more lines")


def buggy(value):
    return value.no_such_attribute


def node(name, **arguments):
    return {"_component_": f"{HERE}.{name}"} | arguments


def test_arguments_of_the_node_and_of_the_caller():
    box = instantiate(node("Box", label="a"), 7, path="x", more=3)
    assert (box.value, box.more, box.label) == (7, 3, "a")
    box = instantiate(node("Box", value=7, label="a"), path="x", label="the caller's wins")
    assert (box.value, box.label) == (7, "the caller's wins")
    assert instantiate(node("open_ended", first=1, x=2), path="x") == (1, {"x": 2})
    assert instantiate({"_component_": "fractions.Fraction", "numerator": 3}, path="x") == 3
    assert isinstance(instantiate({"_component_": "fractions.Fraction"}, path="x"), Fraction)


def test_components_inside_components_lists_and_plain_mappings():
    tree = node("Box", value=[node("Box", value={"deep": [1, node("Box", label="leaf")]}), "text"],
                more={"plain": {"inner": node("Box", more=[[node("Box", value=4)]])}})  # fmt: skip
    before = json.dumps(tree)
    box = instantiate(tree, path="model")
    assert box.value[1] == "text"
    assert box.value[0].value["deep"][0] == 1
    assert box.value[0].value["deep"][1].label == "leaf"
    assert box.more["plain"]["inner"].more[0][0].value == 4
    assert json.dumps(tree) == before, "the config stays as it was"


def test_through_a_class_and_through_a_package():
    assert instantiate(node("Box.labelled", value=1, label="b"), path="x").label == "b"
    assert find_component("torch.optim.AdamW", path="x").__name__ == "AdamW"
    assert find_component("torchtune.datasets.chat_dataset", path="x").__name__ == "chat_dataset"


def refusal(tree, *args, path="model"):
    with pytest.raises(InputError) as caught:
        instantiate(tree, *args, path=path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("tree", "shown"),
    [
        *((tree, "") for tree in (None, 3, {}, {"lr": 1}, ["a"])),
        ("torch.optim.AdamW", ", here model: {_component_: torch.optim.AdamW}"),
        ({"_component_:a.b": None}, " (YAML wants a blank after the colon, {_component_: NAME})"),
    ],
)
def test_no_component(tree, shown):
    start = "model needs a _component_: the dotted path of what to build"
    assert refusal(tree) == start + shown


def test_a_submodule_is_not_what_was_meant():
    message = refusal({"_component_": "moe_builders.routers.Sinkhorn"})
    assert message.endswith("(did you mean 'SinkhornRouter'?)")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Box", "model._component_ is 'Box', but must be a dotted path (module.name)"),
        (None, "model._component_ is None, but must be a dotted path (module.name)"),
        (3.5, "model._component_ is 3.5, but must be a dotted path (module.name)"),
        ("", "model._component_ is '', but must be a dotted path (module.name)"),
        ("..Box", "model._component_ is '..Box', but must be a dotted path (module.name)"),
        ("a..Box", "model._component_ is 'a..Box', but must be a dotted path (module.name)"),
        ("a/b.Box", "model._component_ is 'a/b.Box', but must be a dotted path (module.name)"),
        ("nowhere.Box", "model._component_ is 'nowhere.Box', but there is no module 'nowhere'"),
        ("torch.nowhere.Box", "but there is no module 'torch.nowhere'"),
        ("torch.optim.Adam_W", "torch.optim has no 'Adam_W' (did you mean 'AdamW'?)"),
        ("torch.optim.AdamW.nothing", "torch.optim.AdamW has no 'nothing'"),
        ("torch.optim.AdamW.no.thing", "there is no module 'torch.optim.AdamW'"),
        ("sys.path", "model._component_ is 'sys.path', which cannot be called"),
        ("torch.optim", "model._component_ is 'torch.optim', which cannot be called"),
    ],
)  # fmt: skip
def test_unknown_components(name, message):
    assert message in refusal({"_component_": name})


DEPTHS = {
    "model": lambda bad: bad,
    "model.value": lambda bad: node("Box", value=bad),
    "model.value[1]": lambda bad: node("Box", value=[1, bad]),
    "model.value[0].more.a.b[1]": lambda bad: node(
        "Box", value=[node("Box", more={"a": {"b": [0, bad]}})]),
}  # fmt: skip


@pytest.mark.parametrize("path", DEPTHS)
def test_mistakes_name_their_place_at_any_depth(path):
    wrap = DEPTHS[path]
    assert refusal(wrap(node("Box", lebel=1))) == (
        f"unknown key {path}.lebel (did you mean 'label'?); Box takes value, more, label"
    )
    assert refusal(wrap(node("Bx"))) == (
        f"{path}._component_ is '{HERE}.Bx', but {HERE} has no 'Bx' (did you mean 'Box'?)"
    )
    assert refusal(wrap(node("typed"))) == (f"{path}: typed: missing a required argument: 'number'")
    assert refusal(wrap(node("picky", value=3))) == f"{path}: picky: value is 3"
    assert refusal(wrap(node("typed", number="3"))) == (
        f"{path}.number is '3', but must be an integer"
    )


def test_arguments_that_the_caller_gives_already():
    assert refusal(node("Box", value=1), 2) == "model: Box: multiple values for argument 'value'"


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"number": 1.0}, "number is 1.0, but must be an integer"),
        ({"number": True}, "number is True, but must be an integer"),
        ({"number": None}, "number is None, but must be an integer"),
        ({"number": [1]}, r"number is [1], but must be an integer"),
        ({"number": 1, "ratio": "2e-5x"}, "ratio is '2e-5x', but must be a number"),
        ({"number": 1, "flag": 1}, "flag is 1, but must be true or false"),
        ({"number": 1, "flag": "false"}, "flag is 'false', but must be true or false"),
        ({"number": 1, "word": 3}, "word is 3, but must be a string"),
        ({"number": 1, "maybe": "a"}, "maybe is 'a', but must be an integer or null"),
        ({"number": 1, "either": 1.5}, "either is 1.5, but must be an integer or a string"),
    ],
)  # fmt: skip
def test_values_against_plain_annotations(values, wanted):
    assert refusal(node("typed", **values)) == f"model.{wanted}"


def test_values_that_fit_or_cannot_be_judged():
    good = {"number": 2, "ratio": 3, "flag": True, "word": "a", "maybe": None, "implicit": None,
            "either": "b", "betas": [0.9, 0.95], "anything": object}  # fmt: skip
    assert instantiate(node("typed", **good), path="x") == tuple(good.values())


def test_a_bug_inside_a_component_keeps_its_traceback():
    with pytest.raises(AttributeError, match="no_such_attribute"):
        instantiate(node("buggy", value=1), path="x")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("local_")]:
        del sys.modules[name]


def write(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(textwrap.dedent(text))


def test_a_module_beside_the_config_is_found(workplace):
    write(workplace, "local_parts.py", "def build(size): return [0] * size")
    write(workplace, "local_package/deep.py", "from local_parts import build")
    for module in ("local_parts", "local_package.deep"):
        found = {"_component_": f"{module}.build", "size": 2}
        assert instantiate(found, path="model") == [0, 0]
    assert sys.path[-1] == str(workplace), "behind everything installed"
    assert sys.path.count(str(workplace)) == 1


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("import local_missing", ModuleNotFoundError, "No module named 'local_missing'"),
        ("import local_", ModuleNotFoundError, "No module named 'local_'"),
        ("from sys import no_such_name", ImportError, "no_such_name"),
        ("import local_broken.part", ModuleNotFoundError, "local_broken"),
        ("def broken(:", SyntaxError, None),
        ("raise RuntimeError('at import')", RuntimeError, "at import"),
    ],
)  # fmt: skip
def test_an_error_inside_a_module_is_not_a_missing_module(workplace, text, error, message):
    """The module is there: its own traceback says what is wrong with it."""
    write(workplace, "local_broken.py", text)
    with pytest.raises(error, match=message) as caught:
        instantiate({"_component_": "local_broken.build"}, path="model")
    assert not isinstance(caught.value, InputError)


def test_small_helpers():
    assert did_you_mean("bacth_size", ["batch_size", "seed"]) == " (did you mean 'batch_size'?)"
    assert did_you_mean("x", ["batch_size"]) == ""
    assert first_line(ValueError("\n  first \nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"

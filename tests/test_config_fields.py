"""Reading a config.json: every field honoured, at its only value, or refused by name."""

import pytest

from moe_builders.config_reader import ConfigReader
from moe_builders.errors import InputError


def reader(**fields) -> ConfigReader:
    return ConfigReader(fields, "tiny")


def complaint(read: ConfigReader) -> str:
    with pytest.raises(InputError) as raised:
        read.finish()
    message = str(raised.value)
    assert message.startswith("config.json of a tiny ")
    assert "\n" not in message
    return message.removeprefix("config.json of a tiny ")


def test_what_is_read_and_bookkeeping_are_not_refused():
    read = reader(
        a=3,
        b=0.5,
        c=True,
        d=[1],
        e="x",
        f=7,
        architectures=["X"],
        dtype="bfloat16",
        _attn_implementation_autoset=True,
        unsloth_fixed=True,
    )
    assert read.whole("a") == 3
    assert read.number("b") == 0.5
    assert read.flag("c") is True
    assert read.layers("d", num_layers=2) == (1,)
    read.only("e", "x", "y")
    read.ignore("f")
    read.finish()


def test_a_field_that_nobody_read():
    assert complaint(reader(z=1, y="two")) == "holds what is not supported: y='two', z=1"


def test_everything_wrong_is_said_at_once():
    read = reader(size=-1, kind="b", odd=1)
    read.whole("size")
    read.whole("needed")
    read.only("kind", "a")
    assert complaint(read) == (
        "holds what is not supported: odd=1, kind='b' (only 'a'); lacks needed; "
        "holds what must be a number above 0: size=-1"
    )


@pytest.mark.parametrize("value", [0, -3, 2.0, "2", True, [2]])
def test_whole_numbers(value):
    read = reader(n=value)
    read.whole("n")
    assert f"n={value!r}" in complaint(read)


def test_null_may_be_a_value_of_its_own():
    read = reader(n=None, m=None)
    assert read.whole("n", default=7, null=None) is None
    assert read.whole("m", default=7) == 7
    assert read.whole("o", default=7, null=None) == 7
    read.finish()


def test_null_where_only_a_value_will_do():
    read = reader(a=None, b=0)
    read.whole("a", default=3)
    read.whole("b", default=3, least=0)
    read.not_null("a", "b", "c")
    assert complaint(read) == "holds what is not supported: a=None (leave it out, or give a value)"


def test_whole_numbers_from_zero():
    read = reader(n=0)
    assert read.whole("n", least=0) == 0
    read.finish()
    read = reader(n=-1)
    read.whole("n", least=0)
    assert complaint(read).endswith("n=-1 (a whole number that is not negative)")


def test_whole_numbers_from_minus_one():
    assert reader(n=-1).whole("n", least=-1) == -1
    read = reader(n=-2)
    read.whole("n", least=-1)
    assert complaint(read).endswith("n=-2 (a whole number of at least -1)")


def test_shares():
    assert reader(n=0.1).share("n") == 0.1
    assert reader(n=0).share("n") == 0
    assert reader().share("n") == 0
    for value in (1, -0.1, "0.1", True):
        read = reader(n=value)
        read.share("n")
        assert complaint(read).endswith(f"n={value!r} (a number from 0 to below 1)")


def test_a_number_for_each_layer():
    assert reader(n=4).per_layer("n", num_layers=3) == (4, 4, 4)
    assert reader(n=[4, 2, 3]).per_layer("n", num_layers=3, least=2) == (4, 2, 3)
    for value in (1, [4, 2], [4, 2, 1], [4, 2, 2.0], [4, 2, True], "4", 4.0):
        read = reader(n=value)
        read.per_layer("n", num_layers=3, least=2)
        assert complaint(read).endswith(f"n={value!r} (a whole number of at least 2, or 3 of them)")
    read = reader()
    assert read.per_layer("n", "m", num_layers=3) == (1, 1, 1)
    assert complaint(read) == "lacks n"


@pytest.mark.parametrize("value", [0, -1e-6, "1", False, None])
def test_numbers(value):
    read = reader(n=value)
    read.number("n")
    assert "n" in complaint(read)


@pytest.mark.parametrize("value", [0, 1, "true"])
def test_flags(value):
    read = reader(n=value)
    read.flag("n", default=False)
    assert complaint(read).endswith(f"n={value!r} (true or false)")


def test_the_first_spelling_that_is_there_counts():
    assert reader(new=None, old=4).whole("new", "old") == 4
    assert reader(new=5, old=4).whole("new", "old") == 5
    read = reader()
    read.whole("new", "old")
    assert complaint(read) == "lacks new"


def test_null_is_the_default():
    assert reader(n=None).whole("n", default=None) is None
    assert reader(n=None).number("n", default=1e-6) == 1e-6


def test_layer_numbers():
    assert reader(n=[5, 1, 1, 9]).layers("n", num_layers=6) == (1, 5)
    assert reader().layers("n", num_layers=6, default=(2,)) == (2,)
    for value in ("all", [1.0], [True]):
        read = reader(n=value)
        read.layers("n", num_layers=6)
        assert "a list of layer numbers" in complaint(read)


def test_a_word_for_each_layer():
    words = {"num_layers": 2, "allowed": ("full", "part"), "default": ("full", "full")}
    assert reader(n=["part", "full"]).words("n", **words) == ("part", "full")
    assert reader().words("n", **words) == ("full", "full")
    for value in (["part"], ["part", "none"], "part", 3):
        read = reader(n=value)
        read.words("n", **words)
        assert "(2 of 'full', 'part')" in complaint(read)


@pytest.mark.parametrize(
    ("value", "allowed", "fine"),
    [
        (0, (0,), True), (0.0, (0,), True), (False, (0,), False), (0, (False,), False),
        (None, (None,), True), (None, (0,), False), ("b", ("a", "b"), True), (1, (0,), False),
    ],
)  # fmt: skip
def test_only(value, allowed, fine):
    read = reader(n=value)
    read.only("n", *allowed)
    if fine:
        read.finish()
    else:
        assert f"n={value!r} (only {allowed[0]!r})" in complaint(read)


def test_one_expert_with_normalised_weights_is_refused():
    read = reader(k=1)
    read.top_k("k", normalised=True)
    assert "k=1 with normalised weights" in complaint(read)
    read = reader(k=1)
    assert read.top_k("k", normalised=False) == 1
    read.finish()


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("fields", "base", "scaling"),
    [
        ({"rope_theta": 5e4}, 5e4, None),
        ({"rope_theta": 5e4, "rope_scaling": None}, 5e4, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, 5e4, None),
        ({"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e4, LINEAR),
        ({"rope_theta": 5e4, "rope_scaling": LINEAR | {"type": "linear"}}, 5e4, LINEAR),
        ({"rope_parameters": LINEAR | {"rope_theta": 5e4}}, 5e4, LINEAR),
        ({"rope_theta": 9, "rope_parameters": LINEAR | {"rope_theta": 5e4}}, 5e4, LINEAR),
        # both: rope_scaling counts, as in transformers
        ({"rope_theta": 5e4, "rope_scaling": LINEAR,
          "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 5e4, LINEAR),
    ],
)  # fmt: skip
def test_rope_in_each_spelling(fields, base, scaling):
    read = reader(**fields)
    assert read.rope() == {"rope_base": base, "rope_scaling": scaling}
    read.finish()


def test_partial_rope():
    for fields in (
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ):
        read = reader(**fields)
        assert read.rope(default_fraction=1.0)["rope_fraction"] == 0.5
        read.finish()
        read = reader(**fields)
        read.rope()
        assert "partial_rotary_factor=0.5 (only 1)" in complaint(read)
    assert reader(rope_theta=1e4).rope(default_fraction=0.25)["rope_fraction"] == 0.25
    null = reader(rope_theta=1e4, partial_rotary_factor=None)
    assert null.rope(default_fraction=0.25)["rope_fraction"] == 1
    reader(rope_theta=1e4, partial_rotary_factor=None).rope()


def test_a_fixed_alpha_only_where_the_family_has_it():
    scaling = {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}
    read = reader(rope_theta=1e4, rope_scaling=scaling)
    assert read.rope(fixed_alpha=True)["rope_scaling"]["alpha"] == 1000
    read.finish()
    read = reader(rope_theta=1e4, rope_scaling=scaling)
    read.rope()
    assert complaint(read).endswith("rope_parameters.alpha=1000.0 (leave it out)")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "lacks rope_theta"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_theta": 1e4, "rope_scaling": "yarn"}, "rope_scaling='yarn' (a mapping or null)"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "spiral"}}, "rope_type='spiral' (only"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": ["a"]}}, "rope_type=['a'] (only"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "lacks rope_parameters.factor"),
        (
            {"rope_theta": 1e4, "rope_scaling": LINEAR | {"slope": 3}},
            "rope_parameters.slope=3",
        ),
    ],
)
def test_rope_mistakes(fields, words):
    read = reader(**fields)
    read.rope()
    assert words in complaint(read)


def test_what_older_transformers_wrote_into_every_file():
    reader(id2label={"0": "A"}, temperature=1.0, pruned_heads={}, is_decoder=False).finish()
    read = reader(is_decoder=True, pruned_heads={"0": [1]})
    assert complaint(read) == (
        "holds what is not supported: is_decoder=True (only False), "
        "pruned_heads={'0': [1]} (only {})"
    )

"""Where values first went bad: place and process, in one sentence, without touching a number."""

import pytest
import torch
from helpers_decoder import batch, decoder_of
from helpers_train import config, losses_and_weights, on_ranks, sentence_of
from torch.nn.functional import cross_entropy

from moe_builders.training.finite_watch import (
    FiniteWatch,
    first_bad,
    watch_output,
    where_it_began,
)

FAULTY = "helpers_seeing.faulty_model"
INF = float("inf")
# what is hurt on rank 1 -> what goes bad, and where it began
FAULTS = {
    "weights": ({}, "loss is nan at step 2, first in layers.1 on rank 1: training has diverged"),
    "embedding": ({}, "loss is nan at step 2, first in tok_embeddings on rank 1:"),
    "loss": ({"number": INF}, "loss is nan at step 2, first in the output on rank 1:"),
    "backward": (
        {"number": INF}, "grad_norm is nan at step 2, first in the backward of layers.1 on rank 1:"
    ),
    # the gradient is summed over processes before anyone looks: the shard's owner sees it
    "gradient": (
        {"number": INF},
        "grad_norm is inf at step 2, first in the gradient of layers.1.attn.output_proj.weight on "
        "rank 0:",
    ),
}  # fmt: skip


def _config(folder, where, **changes):
    arguments = {"_component_": FAULTY, "where": where, "rank": 1} | changes.pop("arguments", {})
    return config(folder, model=arguments, max_steps=4, batch_size=2, **changes)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    cases = {}
    for where, (arguments, _) in FAULTS.items():
        for checkpointing in (False, True):
            cases[f"{where}/{checkpointing}"] = _config(
                folder / "run", where, arguments=arguments,
                enable_activation_checkpointing=checkpointing,
            )  # fmt: skip
    cases["copies"] = _config(folder / "run", "weights", dp_replicate=2)
    cases["everywhere"] = _config(folder / "run", "weights", arguments={"rank": -1})
    cases["micro"] = _config(
        folder / "run", "weights", gradient_accumulation_steps=2, arguments={"call": 5}
    )
    return on_ranks(2, {name: ("sentence_of", cfg) for name, cfg in cases.items()}, folder)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", FAULTS)
def test_two_processes_name_place_and_rank(sentences, where, checkpointing):
    first, second = sentences[f"{where}/{checkpointing}"]
    assert first == second, "all processes stop, with the same sentence"
    assert first.startswith(FAULTS[where][1])
    assert "\n" not in first


def test_copies_of_a_model_and_all_ranks_and_micro_batches(sentences):
    assert "first in layers.1 on rank 1:" in sentences["copies"][0]
    assert "first in layers.1 on ranks 0, 1:" in sentences["everywhere"][0]
    # the fifth forward is the third step's first micro-batch
    assert "at step 3, first in layers.1 on rank 1:" in sentences["micro"][0]


def test_the_last_step_is_seen_too_and_nothing_is_saved(tmp_path):
    cfg = _config(tmp_path / "run", "weights", arguments={"rank": 0, "call": 4})
    (sentence,) = sentence_of(cfg)
    assert "loss is nan at step 4, first in layers.1 on rank 0:" in sentence
    assert not (tmp_path / "run/model").exists()


def test_validation_and_counting_forwards_are_not_watched(tmp_path):
    """Hurt while nobody trains: the run goes on."""
    model = decoder_of()
    watch = model.probe = FiniteWatch(num_layers=3)
    tokens, info = batch()
    with torch.no_grad():
        model(tokens, info=info)
    assert watch.take().places == ()


def _step(model, watch, *, hurt=None):
    tokens, info = batch()
    handle = hurt and hurt(model)
    logits = model(tokens, info=info)
    loss = cross_entropy(logits.flatten(0, 1), tokens.flatten())
    watch_output(model, loss)
    loss.backward()
    if handle:
        handle.remove()
    watched = watch.take(model.named_parameters())
    model.zero_grad()
    return watched


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_order_of_places(checkpointing):
    model = decoder_of()
    model.activation_checkpointing = checkpointing
    watch = model.probe = FiniteWatch(num_layers=3)
    watched = _step(model, watch)
    forward = ("tok_embeddings", "layers.0", "layers.1", "layers.2", "the output")
    assert watched.places[:5] == forward
    assert watched.places[5:9] == tuple(f"the backward of {place}" for place in forward[:0:-1])
    gradients = watched.places[9:]
    names = [name for name, _ in model.named_parameters()]
    assert gradients == tuple(f"the gradient of {name}" for name in reversed(names))
    assert watched.sums.shape == (len(watched.places),)
    assert first_bad(watched.places, watched.sums.tolist()) is None
    assert where_it_began([None, None]) == ""


@pytest.mark.parametrize("number", [float("nan"), INF, -INF])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_bad_value_anywhere_in_a_layer_is_found(layer, number):
    model = decoder_of()
    watch = model.probe = FiniteWatch(num_layers=3)

    def put(module, args, output):
        output = output.clone()
        output[1, 4, 3] = number
        return output

    def hurt(model):
        return model.layers[layer].register_forward_hook(put)

    watched = _step(model, watch, hurt=hurt)
    assert first_bad(watched.places, watched.sums.tolist()) == (layer + 1, f"layers.{layer}")
    after = _step(model, watch)  # the next step starts anew
    assert first_bad(after.places, after.sums.tolist()) is None


def test_many_large_16_bit_values_are_no_overflow():
    watch = FiniteWatch(num_layers=1)
    watch("tok_embeddings", torch.full((4096,), 6e4, dtype=torch.float16, requires_grad=True))
    watched = watch.take()
    assert first_bad(watched.places, watched.sums.tolist()) is None


def test_opposite_infinities_do_not_hide_each_other():
    watch = FiniteWatch(num_layers=1)
    for number in (INF, -INF, 1.0):  # three micro-batches
        watch("layers.0", torch.tensor([1.0, number], requires_grad=True))
    watched = watch.take()
    assert first_bad(watched.places, watched.sums.tolist()) == (0, "layers.0")


def test_the_earliest_place_of_any_process_is_named():
    found = [(7, "the gradient of x"), (1, "layers.0"), None, (1, "layers.0")]
    assert where_it_began(found) == "in layers.0 on ranks 1, 3"


def test_watching_changes_no_bit(tmp_path, monkeypatch):
    import moe_full_finetune as recipe

    class Blind(FiniteWatch):
        def __call__(self, place, value):
            pass

    still = losses_and_weights(config(tmp_path / "a", max_steps=3))
    monkeypatch.setattr(recipe, "FiniteWatch", Blind)
    blind = losses_and_weights(config(tmp_path / "b", max_steps=3))
    assert still["loss"] == blind["loss"]
    assert all(torch.equal(still["weights"][n], blind["weights"][n]) for n in still["weights"])

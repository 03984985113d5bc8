"""The benchmark runs, measures equal work, and keeps every timing."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from moe_builders.activations import count_activations
from moe_builders.families import BY_MODEL_TYPE
from moe_builders.generic import moe_transformer
from moe_builders.ops.linear_cross_entropy import linear_cross_entropy_sum, working_bytes
from moe_builders.parallel.plan import MeshShape
from moe_builders.parallel.traffic import Collective
from moe_builders.parallel.world import open_world

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import balance  # noqa: E402
import collectives  # noqa: E402
import import_cost  # noqa: E402
import measuring  # noqa: E402
import scaling  # noqa: E402
import train_step  # noqa: E402

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_memory_by_hand():
    kept = []

    def work():
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(5 * MIB, dtype=torch.uint8)
        del first
        kept[:] = [torch.empty(2 * MIB, dtype=torch.uint8)]  # until the next call
        del second

    # 3 + 5, and what the call before left
    assert measuring.peak_bytes(work, CPU) == 10 * MIB


def test_what_a_model_needs():
    model = torch.nn.Linear(10, 10, bias=False)
    model.register_parameter("frozen", torch.nn.Parameter(torch.zeros(7), requires_grad=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones(10, 10)
    optimizer.step()
    needed = train_step.needed_bytes(model, optimizer)
    assert needed == {"weights": 428, "gradients": 400, "state": 804}  # two moments, and a count


def values(seconds, above=100):
    return {"seconds": seconds, "cpu_seconds": seconds, "bytes": {"above": above}}


def test_ratios_by_hand():
    found = {"recipe": values([1.0, 2.0, 4.0], 50), "grouped_mm": values([2.0, 2.0, 2.0]),
             "eager": values([9.0, 9.0, 9.0])}  # fmt: skip
    summary = train_step.compare(found, tokens=100)
    assert summary["best_of_transformers"] == "grouped_mm"
    ours = summary["ways"]["recipe"]
    assert ours["tokens_per_second"] == 50
    assert ours["speed_ratio"] == 1
    assert ours["speed_ratio_range"] == [0.5, 2]
    assert ours["memory_ratio"] == 0.5


def test_unequal_work_is_refused():
    found = {"recipe": {"losses": [5.0], "norms": [1.0]}, "eager": {"losses": [5.01], "norms": [1]}}
    with pytest.raises(SystemExit, match="do not do the same work: first losses are"):
        train_step.check_equal_work(found, "fp32")
    found["eager"]["losses"] = [5.0004]
    assert train_step.check_equal_work(found, "fp32")["losses"] == pytest.approx(8e-5, rel=0.01)
    found["eager"]["norms"] = [float("nan")]
    with pytest.raises(SystemExit, match="first norms"):
        train_step.check_equal_work(found, "fp32")


@pytest.mark.parametrize("shape", list(train_step.PUBLIC))
def test_released_models_with_fewer_layers_are_those_of_both_sides(shape):
    fields = train_step.public_fields(shape)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ours = BY_MODEL_TYPE[config.model_type].build(config.to_dict())
    assert len(ours.layers) == train_step.PUBLIC[shape][1]
    total = sum(p.numel() for p in ours.parameters())
    assert total == sum(p.numel() for p in theirs.parameters())
    assert 1e9 < total < 3e9
    assert ours.tok_embeddings.num_embeddings == train_step.vocabulary(shape)


def test_even_routing_is_shown_and_not_compared():
    found = {"recipe": values([1.0]), "recipe, balanced": values([0.5]),
             "grouped_mm": values([2.0])}  # fmt: skip
    ways = train_step.compare(found, tokens=100)["ways"]
    assert ways["recipe"]["speed_ratio"] == 2
    assert ways["recipe, balanced"] == {"tokens_per_second": 200, "above_mib": 100 / MIB}
    work = {"recipe": {"losses": [5.0], "norms": [1.0]},
            "recipe, balanced": {"losses": [6.0], "norms": [2.0]}}  # fmt: skip
    assert train_step.check_equal_work(work, "fp32") == {"losses": 0, "norms": 0}
    chosen = train_step.parse(["--ways", "recipe", "eager", "--routing", "real", "balanced"])
    assert train_step.ways_of(chosen) == ["recipe", "eager", "recipe, balanced"]
    chosen = train_step.parse(["--device", "cuda"])  # a way's model takes an own part of the memory
    assert [way for way in train_step.ways_of(chosen) if way not in train_step.THEIRS] == [
        "recipe", "bare", "recipe, balanced"
    ]  # fmt: skip
    case = train_step.Case("e8_k2", "fp32", "recipe, balanced", "", "cpu", 1, 1, 1)
    assert (case.kind, case.router) == ("recipe", train_step.BALANCED)


def test_the_fastest_of_theirs_takes_part(monkeypatch):
    seconds = {"grouped_mm": [3.0, 1.0, 2.0], "eager": [5.0]}

    def measure(cases, warmup, repeats):
        (case,) = cases
        if case.way not in seconds:
            raise train_step.NoRoom(f"{case.way}: out of memory: 9 GiB")
        return {case.way: {"seconds": seconds[case.way]}}

    monkeypatch.setattr(train_step, "measure", measure)
    cases = [train_step.Case("s", "bf16", way, "", "cuda", 1, 1, 1)
             for way in ("recipe", "eager", "grouped_mm", "batched_mm")]  # fmt: skip
    told = []
    kept, alone = train_step.choose_theirs(cases, told.append)
    assert [case.way for case in kept] == ["recipe", "grouped_mm"]
    assert alone == {"grouped_mm": 2.0, "eager": 5.0}
    assert told == ["s bf16 batched_mm: out of memory: 9 GiB"]


def test_a_trial_from_the_command_line(tmp_path):
    out = tmp_path / "new" / "trial.json"
    command = [
        sys.executable, str(ROOT / "benchmarks/train_step.py"), "--shapes", "tiny", "--dtypes",
        "mixed", "--ways", "recipe", "bare", "grouped_mm", "--rows", "2", "--length", "16",
        "--repeats", "2", "--warmup", "1", "--threads", "1", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "skipped: tiny mixed bare: computing in another dtype" in done.stdout
    assert "<- transformers' best" in done.stdout
    report = json.loads(out.read_text())
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["skipped"]) == 1
    (result,) = report["results"]
    for way in ("recipe", "grouped_mm"):
        assert len(result["ways"][way]["seconds"]) == 2
        assert len(result["ways"][way]["losses"]) == 3
        assert result["ways"][way]["bytes"]["above"] > 0


def test_import_cost_from_the_command_line(tmp_path):
    out = tmp_path / "cost.json"
    command = [
        sys.executable, str(ROOT / "benchmarks/import_cost.py"), "--gib", "0.02", "--vocab-size",
        "512", "--processes", "1", "--shard-mib", "50", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["checkpoint"]["files"] == 3
    (result,) = report["results"]
    assert 0 < result["model"] == pytest.approx(report["checkpoint"]["total"], rel=0.01)
    assert result["ranks"][0]["load"]["peak_above"] > 0
    assert "save: above" in done.stdout


def test_an_export_that_differs_is_seen(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        import_cost.save_file({"t": torch.tensor([value])}, tmp_path / name / "x.safetensors")
    assert import_cost.same_bytes(tmp_path / "a", tmp_path / "b")
    assert not import_cost.same_bytes(tmp_path / "a", tmp_path / "c")
    (tmp_path / "b" / "y.safetensors").write_bytes(b"")
    assert not import_cost.same_bytes(tmp_path / "a", tmp_path / "b")


def test_every_way_of_balancing_is_a_configuration_of_its_own(tmp_path):
    args = argparse.Namespace(rows=2, steps=3, seed=0, every=1)
    configs = {way: balance.run_config(tmp_path, tmp_path / "out", args, way)
               for way in balance.WAYS}  # fmt: skip
    for way, config in configs.items():
        same = [name for name, other in configs.items() if other == config]
        assert same == [way]
        assert config.dataset == configs["none"].dataset
        assert config.optimizer == configs["none"].optimizer
    assert configs["none"].router_losses.load_balancing_coef == 0


def test_the_end_of_a_run_by_hand():
    steps = [{"max_violation": float(n), "drop_rate": 0.0, "dead_experts": 2.0} for n in range(20)]
    ends = [{"val_loss": 5.0, "val_max_violation": 0.5}, {"val_loss": 4.5, "val_max_violation": 1}]
    found = {"history": steps, "validations": ends}
    assert balance.summary(found) == {"val_loss": 4.5, "val_max_violation": 1,
                                      "max_violation": 18.5, "drop_rate": 0,
                                      "dead_experts": 2}  # fmt: skip
    assert balance.table({"none": found}).splitlines()[-1] == (
        "| none | 4.500 | 1.000 | 18.500 | 0.000 | 2.000 |"
    )


def test_the_page_on_balancing_shows_what_was_measured():
    measured = json.loads((ROOT / "benchmarks/results/balance_cpu.json").read_text())
    assert list(measured["runs"]) == list(balance.WAYS)
    assert balance.table(measured["runs"]) in (ROOT / "docs/balancing.md").read_text()


def page_on_scaling():
    text = (ROOT / "docs/scaling.md").read_text()
    marked = re.search(r"<!-- begin: python benchmarks/scaling.py -->\n\n(.*)\n<!-- end -->", text,
                       re.DOTALL)  # fmt: skip
    assert marked is not None
    return marked[1]


def test_the_page_on_scaling_shows_what_is_computed():
    """Rows of one model; ``test_all_of_the_page_on_scaling`` has the others."""
    page = page_on_scaling()
    for line in scaling.table("30B", (8, 256)).splitlines():
        assert line in page


@pytest.mark.full
def test_all_of_the_page_on_scaling():
    assert page_on_scaling() == scaling.tables(list(scaling.MODELS), scaling.GPUS)


def test_bounds_of_a_step_by_hand():
    """A second to compute, two that can be hidden, a half that cannot."""
    gathered = Collective("", "all_gather", "dp_shard", 8, 1, 8 / 7 * 2 * scaling.NVLINK)
    rows = Collective("", "all_to_all", "ep", 16, 1, 2 * 0.5 * scaling.NETWORK, waits=True)
    plan = SimpleNamespace(
        step_flops=scaling.PEAK * scaling.SHARE, collectives=[gathered, rows],
        settings=SimpleNamespace(mesh=MeshShape(1, 8, 1)),
        memory=SimpleNamespace(peak=0.92 * 80e9),
    )  # fmt: skip
    outcome = scaling.Outcome(plan, "")
    assert outcome.compute == 1
    assert outcome.seconds == pytest.approx((2.5, 3.5))
    assert outcome.inside == pytest.approx(2 * scaling.NVLINK + 7 / 16 * scaling.NETWORK)
    assert outcome.outside == pytest.approx(0.5 * scaling.NETWORK)
    assert outcome.fits == "H100"
    plan.memory.peak += 1e6
    assert outcome.fits == "H200"
    plan.memory.peak = 0.93 * 141e9
    assert outcome.fits == "no"


def test_the_best_mesh():
    def of(fits, seconds, peak=0):
        plan = SimpleNamespace(memory=SimpleNamespace(peak=peak))
        return SimpleNamespace(fits=fits, seconds=seconds, plan=plan)

    quick, slow, large = of("H100", (1, 2)), of("H100", (1, 3)), of("H200", (0, 1))
    assert scaling.best([large, slow, quick]) is quick
    assert scaling.best([of("no", (0, 0)), large]) is large
    least = of("no", (9, 9), peak=1)
    assert scaling.best([of("no", (0, 0), peak=2), least]) is least


def test_shares_of_collectives_by_hand():
    steps = [{"seconds": 2.0, "inside": {"all_reduce": 0.5, "all_gather_single": 0.5}},
             {"seconds": 4.0, "inside": {"all_reduce": 3.0}},
             {"seconds": 1.0, "inside": {}}]  # fmt: skip
    found = collectives.summary(steps)
    assert found["seconds"] == 2.0
    assert found["share"] == [0.0, 0.5, 0.75]
    assert found["by_collective"] == {"all_reduce": 0.25, "all_gather_single": 0.0}
    alone = {"seconds": 1.0, "share": [0.0, 0.0, 0.0]}
    last = collectives.table({"one process": alone, "two": found}).splitlines()[-1]
    assert last == "| two | 2.00 | 50 % | 0 % to 75 % |"


def test_collectives_are_timed_once_and_put_back():
    before = torch.distributed.all_reduce
    with open_world(device="cpu"), collectives.timed_collectives() as inside:
        torch.distributed.all_reduce(torch.ones(3))
        torch.distributed.all_reduce(torch.ones(3))
    assert torch.distributed.all_reduce is before
    assert set(inside) == {"all_reduce"}
    assert inside["all_reduce"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_take_what_the_plan_says(dtype):
    """One process, a vocabulary that outweighs all else: the peak of a step."""
    model = moe_transformer(
        vocab_size=24000, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        num_experts=4, experts_per_token=2, expert_hidden_dim=32, max_seq_len=512,
    ).to(dtype)  # fmt: skip
    model.linear_cross_entropy = "none"
    tokens = torch.randint(0, 24000, (2, 256))

    def step():
        loss = model(tokens, labels=tokens)
        loss.backward()
        del loss  # the gradients of what it was made of are no part of the next peak
        model.zero_grad()

    step()  # the first one leaves what the next one finds
    wanted = count_activations(
        model, num_tokens=512, mask_len=0, compute_dtype=dtype, checkpointing=False
    )
    assert wanted.logits + wanted.kept == pytest.approx(measuring.peak_bytes(step, CPU), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [40, 700])
def test_a_loss_without_logits_takes_what_the_plan_says(t, dtype):
    d, v = 64, 16000
    h = torch.randn(t, d).to(dtype).requires_grad_()
    weight = torch.randn(v, d).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (t,))

    def step():
        loss = linear_cross_entropy_sum(h, weight, None, labels)
        (loss / 3).backward()
        h.grad = weight.grad = None

    step()
    wanted = working_bytes(num_tokens=t, dim=d, vocab_size=v, dtype=dtype, on_cpu=True)
    assert wanted == pytest.approx(measuring.peak_bytes(step, CPU), rel=0.1)

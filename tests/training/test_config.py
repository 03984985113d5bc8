"""Configs by name with overrides, typed; every mistake is one sentence that names the key."""

from dataclasses import dataclass

import pytest
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moe_builders.errors import InputError
from moe_builders.training.config import (
    RecipeConfig,
    check_config,
    configs_root,
    find_config,
    load_config,
    parse_command_line,
)

BASE = """
output_dir: out/run
dataset:
  _component_: some.dataset
  data_files: [a.json, b.json]
  nested: {deep: {list: [{x: 1}, {x: 2}]}}
optimizer:
  _component_: torch.optim.AdamW
  lr: 2e-5
  weight_decay: 0.1
lr_scheduler:
  _component_: some.schedule
"""


@pytest.fixture
def parse(tmp_path):
    """Overrides (and a YAML text in place of the usual one) -> RecipeConfig."""

    def call(*overrides, text=BASE, schema=RecipeConfig):
        (tmp_path / "c.yaml").write_text(text)
        return parse_command_line(["--config", str(tmp_path / "c.yaml"), *overrides], schema)

    return call


@pytest.fixture
def refusal(parse):
    def call(*overrides, text=BASE):
        with pytest.raises(InputError) as caught:
            parse(*overrides, text=text)
        message = str(caught.value)
        assert "\n" not in message
        assert message
        return message

    return call


def test_defaults_and_what_the_file_says(parse):
    config = parse()
    assert type(config) is RecipeConfig
    assert config.optimizer == {"_component_": "torch.optim.AdamW", "lr": 2e-5, "weight_decay": 0.1}
    assert isinstance(config.optimizer["lr"], float), "YAML 1.1 reads 2e-5 as a string"
    assert type(config.dataset["nested"]["deep"]["list"]) is list
    assert (config.batch_size, config.clip_grad_norm, config.model) == (1, 1.0, None)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("batch_size=4", lambda c: c.batch_size, 4),
        ("max_steps=null", lambda c: c.max_steps, None),
        ("max_steps=7", lambda c: c.max_steps, 7),
        ("shuffle=false", lambda c: c.shuffle, False),
        ("shuffle=no", lambda c: c.shuffle, False),
        ("compile=True", lambda c: c.compile, True),
        ("init_std=1e-2", lambda c: c.init_std, 0.01),
        ("clip_grad_norm=inf", lambda c: c.clip_grad_norm, float("inf")),
        ("clip_grad_norm=2", lambda c: c.clip_grad_norm, 2.0),
        ("router_losses.z_coef=1e-3", lambda c: c.router_losses.z_coef, 0.001),
        ("optimizer.lr=2e-5", lambda c: c.optimizer["lr"], 2e-5),
        ("optimizer.lr=2.0e-5", lambda c: c.optimizer["lr"], 2e-5),
        ("optimizer.betas=[0.9,0.95]", lambda c: c.optimizer["betas"], [0.9, 0.95]),
        ("optimizer.fused=true", lambda c: c.optimizer["fused"], True),
        ("optimizer=torch.optim.SGD", lambda c: c.optimizer["_component_"], "torch.optim.SGD"),
        ("optimizer=torch.optim.SGD", lambda c: c.optimizer["lr"], 2e-5),
        ("dataset.new_system_prompt=a=b, c=d", lambda c: c.dataset["new_system_prompt"],
         "a=b, c=d"),
        ("dataset.data_files={train: t.json}", lambda c: c.dataset["data_files"],
         {"train": "t.json"}),
        ("optimizer={_component_: a.b}", lambda c: c.optimizer, {"_component_": "a.b"}),
        ("dataset.split='train[:10%]'", lambda c: c.dataset["split"], "train[:10%]"),
        ("dataset.split=train[:10%]", lambda c: c.dataset["split"], "train[:10%]"),
        ("dataset.nested.deep.list[1].x=5", lambda c: c.dataset["nested"]["deep"]["list"],
         [{"x": 1}, {"x": 5}]),
        ("dataset.new.key=1", lambda c: c.dataset["new"], {"key": 1}),
        ("dataset.source=${output_dir}/data", lambda c: c.dataset["source"], "out/run/data"),
        ("model={_component_: a.b, experts: [1, 2]}", lambda c: c.model,
         {"_component_": "a.b", "experts": [1, 2]}),
        ("dataset_val=[{_component_: a.b}]", lambda c: c.dataset_val, [{"_component_": "a.b"}]),
        ("output_dir=2026", lambda c: c.output_dir, "2026"),
        *((f"{key}=a.b", lambda c, key=key: getattr(c, key), {"_component_": "a.b"})
          for key in ("router", "model", "tokenizer", "dataset_val", "metric_logger")),
        ("base_model=a.b", lambda c: c.base_model, "a.b"),
        ("~optimizer.weight_decay", lambda c: "weight_decay" in c.optimizer, False),
        ("~lr_scheduler", lambda c: c.lr_scheduler, None),
        ("~clip_grad_norm", lambda c: c.clip_grad_norm, None),
    ],
)  # fmt: skip
def test_overrides(parse, override, read, value):
    found = read(parse(override))
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_and_arguments_may_stand_anywhere(parse, tmp_path):
    assert parse("batch_size=2", "batch_size=3").batch_size == 3
    assert parse("~optimizer.lr", "optimizer.lr=1").optimizer["lr"] == 1
    path = str(tmp_path / "c.yaml")
    assert parse_command_line(["batch_size=5", "--config", path, "seed=2"]).batch_size == 5


def test_interpolation_inside_the_file(parse):
    config = parse("output_dir=elsewhere", text=BASE + "base_model: ${output_dir}/base\n")
    assert config.base_model == "elsewhere/base"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=4", "unknown key 'batchsize' in the config (did you mean 'batch_size'?)"),
        ("router_losses.zcoef=1",
         "unknown key 'router_losses.zcoef' in the config (did you mean 'z_coef'?)"),
        ("nothing_like_it=1", "unknown key 'nothing_like_it' in the config"),
        ("~foo", "unknown key 'foo' in the config"),
        ("~optimizer.foo", "~optimizer.foo: the config has no optimizer.foo to take out"),
        ("~dataset.nested.deep.foo", "the config has no dataset.nested.deep.foo to take out"),
        ("batch_size=abc", "batch_size is 'abc', but must be an integer"),
        ("batch_size=1.5", "batch_size is 1.5, but must be an integer"),
        ("batch_size=[1]", "batch_size is [1], but must be an integer"),
        ("batch_size=", "batch_size is null, but must be an integer: write batch_size=VALUE, or "
                        "leave it out for 1"),
        ("shuffle=maybe", "shuffle is 'maybe', but must be true or false"),
        ("clip_grad_norm=one", "clip_grad_norm is 'one', but must be a number or null"),
        ("seed.x=1", "seed is {'x': 1}, but must be an integer"),
        ("router_losses.z_coef=[1]", "router_losses.z_coef is [1], but must be a number"),
        ("router_losses.load_balancing_coef=true", "load_balancing_coef is True, but must be a n"),
        ("freeze=3", "freeze is 3, but must be a list"),
        ("router_losses=3", "router_losses is 3, but must hold key: value pairs"),
        ("router_losses=null", "router_losses is None, but must hold key: value pairs"),
        ("output_dir=null", "output_dir is null, but must be a text: write output_dir=VALUE"),
        ("output_dir=${nope}", "output_dir: Interpolation key 'nope' not found"),
        ("output_dir=${nope", "'output_dir=${nope' cannot be set: "),
        ("optimizer={a", "'optimizer={a' cannot be set: "),
        ("batch_size=[1,", "'batch_size=[1,' cannot be set: "),
        ("foo", "'foo' is not an override: write key=value, or ~key"),
        ("=3", "'=3' is not an override: write key=value, or ~key"),
        ("~", "'~' is not an override: write key=value, or ~key"),
        ("--batch_size=4", "'--batch_size=4' is not an override: write batch_size=4"),
        ("--", "'--' is not an override: write key=value, or ~key"),
        ("--foo", "'--foo' is not an override: write key=value, or ~key"),
        ("early_stop_patience=2", "early_stop_patience is 2, but there is nothing to validate on"),
        ("run_val_every_n_steps=2", "run_val_every_n_steps is 2, but there is nothing to valid"),
        ("dataset.column=???", "the config lacks a value for dataset.column: set it in the file"),
        ("compute_dtype=int8", "compute_dtype is 'int8', but must be one of fp32, bf16, fp64"),
        ("param_dtype=fp16", "param_dtype is 'fp16', but must be one of fp32, bf16, fp64"),
        ("device=tpu", "device is 'tpu', but must be one of auto, cpu, cuda"),
        ("router_losses.load_balancing_scope=globl",
         "router_losses.load_balancing_scope is 'globl', but must be one of sequence, micro"),
        ("router_losses.mask=all", "router_losses.mask is 'all', but must be one of padding, lab"),
        ("router_losses.global_exact=true",
         "router_losses.global_exact goes with router_losses.load_balancing_scope=global"),
        ("router_losses.load_balancing_form=hf",
         "load_balancing_form is hf, but router_losses.load_balancing_scope is sequence"),
        ("router_losses={load_balancing_form: mse, load_balancing_on: kept}",
         "load_balancing_form is mse, but router_losses.load_balancing_on is kept"),
        ("router_losses={load_balancing_form: mse, load_balancing_scope: global}",
         "load_balancing_form is mse on assigned, but router_losses.load_balancing_scope is glob"),
        ("router_losses={load_balancing_on: kept, load_balancing_scope: global}",
         "load_balancing_form is switch on kept, but router_losses.load_balancing_scope is glob"),
        ("router_losses={load_balancing_form: st_moe, load_balancing_scope: global}",
         "load_balancing_form is st_moe on assigned, but router_losses.load_balancing_scope is g"),
        ("routing.jitter=gumbel", "routing.jitter is gumbel, but routing.jitter_scale is 0.0"),
        ("routing.jitter_scale=0.1", "routing.jitter_scale is 0.1, but routing.jitter is none"),
        ("routing.capacity_factor=.inf", "routing.capacity_factor is inf, but must be finite, or"),
        ("routing.eval_capacity_factor=.inf", "routing.eval_capacity_factor is inf, but must be"),
        ("routing={pad_to_capacity: true, capacity_factor: 1}",
         "but routing.capacity_scope is sequence: set it to micro"),
        ("routing.pad_to_capacity=true", "routing.pad_to_capacity needs a capacity: set routing"),
        ("routing.drop=probs", "routing.drop is probs, but there is no capacity: set routing"),
        ("routing.min_capacity=8", "routing.min_capacity is 8, but there is no capacity"),
        ("expert_bias.recenter=true", "expert_bias.recenter is true, but no bias moves"),
        ("expert_bias.rule=quantile", "expert_bias.update_rate is 0.0, but must be above 0 and at"),
        ("expert_bias={rule: quantile, update_rate: 1.5}",
         "expert_bias.update_rate is 1.5, but must be above 0 and at most 1 with expert_bias.rule"),
        ("model={_component_: moe_builders.moe_decoder, load_balancing_coef: 0.1}",
         "model.load_balancing_coef is given, but modules take no coefficients: these live in "
         "router_losses and expert_bias, so set router_losses.load_balancing_coef=0.1 instead"),
        ("model={_component_: moe_builders.a, router: [{aux_loss_coef: 1}]}",
         "model.router[0].aux_loss_coef is given, but modules take no coefficients"),
        ("router={_component_: moe_builders.routers.a, z_coef: 1}",
         "router.z_coef is given, but modules take no coefficients"),
        ("router_losses.z_coef=-1", "router_losses.z_coef is -1.0, but must be at least 0"),
        ("router_losses.load_balancing_coef=nan", "load_balancing_coef is nan, but must be at lea"),
        ("clip_grad_norm=0", "clip_grad_norm is 0.0, but must be above 0 (or null)"),
        ("clip_grad_norm=nan", "clip_grad_norm is nan, but must be above 0 (or null)"),
        ("init_std=-0.1", "init_std is -0.1, but must be at least 0"),
        ("num_workers=-1", "num_workers is -1, but must be at least 0"),
        ("seed=-1", "seed is -1, but must be at least 0"),
        ("seed=9223372036854775808", "seed is 9223372036854775808, but must be below 2**63"),
        *((f"{key}=0", f"{key} is 0, but must be at least 1") for key in (
            "batch_size", "gradient_accumulation_steps", "epochs", "max_steps", "max_seq_len",
            "log_every_n_steps", "run_val_every_n_steps", "pad_to_multiple_of")),
    ],
)  # fmt: skip
def test_bad_overrides(refusal, override, message):
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("router_losses.zcoef", "(did you mean 'z_coef'?); router_losses takes load_balancing_coef,"
                                " load_balancing_scope, global_exact, load_balancing_form, load_b"),
        ("router_losses.capacity_factor", "(did you mean 'routing.capacity_factor'?); router_los"),
        ("routing.drop_policy", "; routing takes capacity_factor, eval_capacity_factor, min_capac"),
        ("expert_bias.xyz", "unknown key 'expert_bias.xyz' in the config; expert_bias takes "),
        ("capacity_factor", "(did you mean 'routing.capacity_factor'?)"),
        ("load_balancing_scope", "(did you mean 'router_losses.load_balancing_scope'?)"),
        ("moe_grouped_gemm", ": what concerns experts stands in router_losses: load_bal"),
        ("moe_grouped_gemm", "; expert_bias: update_rate, rule, recenter; or is an argum"),
        ("moe_token_dispatcher_type", "(did you mean 'ep_dispatcher'?)"),
        ("num_experts", "unknown key 'num_experts' in the config: here it is model.num_experts"),
        ("top_k", ": here it is model.experts_per_token (of a base_model, what its config.json"),
        ("moe_router_topk", ": here it is model.experts_per_token (of a base_model"),
        ("n_routed_experts", ": here it is model.num_experts (of a base_model"),
        ("router_jitter_noise", ": here it is routing.jitter (input_uniform) and routing.jitter_s"),
        ("moe_expert_capacity_factor", ": here it is routing.capacity_factor"),
        ("load_balance_coeff", ": here it is expert_bias.update_rate"),
        ("moe_router_load_balancing_type", ": here it is router, a component"),
        ("expert_bias.rate", "unknown key 'expert_bias.rate' in the config; expert_bias takes "),
    ],
)  # fmt: skip
def test_unknown_keys_are_told_the_known_ones(refusal, key, message):
    assert message in refusal(f"{key}=1")


def test_a_bias_of_routers_that_do_not_learn(refusal):
    assert (
        refusal("expert_bias.update_rate=0.001", "freeze_router=true")
        == "expert_bias.update_rate is 0.001, but freeze_router keeps the routers as they are: set "
        "expert_bias.update_rate=0, or freeze_router=false"
    )


@pytest.mark.parametrize(
    ("changes", "read", "value"),
    [
        ("router_losses={load_balancing_form: hf, load_balancing_scope: micro, "
         "load_balancing_on: kept}", lambda c: c.router_losses.load_balancing_form, "hf"),
        ("router_losses={load_balancing_form: mse, load_balancing_scope: micro}",
         lambda c: c.router_losses.load_balancing_scope, "micro"),
        ("router_losses={load_balancing_form: st_moe, load_balancing_on: kept}",
         lambda c: c.router_losses.load_balancing_on, "kept"),
        ("expert_bias={rule: quantile, update_rate: 1}", lambda c: c.expert_bias.update_rate, 1.0),
        ("routing={jitter: gumbel, jitter_scale: 1}", lambda c: c.routing.jitter, "gumbel"),
        ("routing={pad_to_capacity: true, capacity_factor: 1.5, capacity_scope: micro}",
         lambda c: c.routing.pad_to_capacity, True),
        ("model={_component_: mine.model, z_coef: 1}", lambda c: c.model["z_coef"], 1),
        ("recompute_up=true", lambda c: c.recompute_up, True),
        ("expert_backend=liger", lambda c: c.expert_backend, "liger"),
        ("expert_backend=bmm", lambda c: c.expert_backend, "bmm"),
    ],
)  # fmt: skip
def test_keys_that_go_together(parse, changes, read, value):
    assert read(parse(changes)) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["recompute_up=true", "enable_activation_checkpointing=true"],
         r"^recompute_up makes again in backward what .*: set ac_mode=selective, or recompute_"),
        (["recompute_up=true", "expert_backend=liger"],
         r"^recompute_up is of the package's own experts, .* is liger: set expert_backend=auto"),
        (["ep=2", "expert_backend=liger"],
         r"^expert_backend is liger, .* on one process, but ep is 2: set expert_backend=auto"),
        (["deterministic=true", "expert_backend=liger"],
         r"^expert_backend is liger, .* in no fixed order: set expert_backend=auto, or dete"),
        (["expert_backend=gather"],
         r"^expert_backend is 'gather', but must be one of auto, grouped, loop, bmm, liger$"),
    ],
)  # fmt: skip
def test_experts_that_do_not_go_together(parse, changes, message):
    with pytest.raises(InputError, match=message):
        parse(*changes)
    keys = ("recompute_up=true", "enable_activation_checkpointing=true", "ac_mode=selective")
    assert parse(*keys).recompute_up


BALANCING = ("router_aux_loss_coeff", "router_aux_loss_coef", "aux_loss_coeff", "aux_loss_coef",
             "moe_aux_loss_coeff", "load_balancing_loss_coef")  # fmt: skip
Z = ("router_z_loss_coef", "router_z_loss_coeff", "moe_z_loss_coeff")
BIAS = ("moe_router_bias_update_rate", "gate_bias_update_factor")
OLD = {
    **dict.fromkeys(BALANCING, "router_losses.load_balancing_coef"),
    **dict.fromkeys(Z, "router_losses.z_coef"),
    **dict.fromkeys(BIAS, "expert_bias.update_rate"),
}


@pytest.mark.parametrize("section", ["", "router_losses.", "expert_bias."])
@pytest.mark.parametrize("old", OLD)
def test_old_names_are_understood_with_a_warning(parse, old, section):
    with pytest.warns(FutureWarning) as told:
        config = parse(f"{section}{old}=0.25", "output_dir=x", "dataset.source=${output_dir}/y")
    parent, name = OLD[old].split(".")
    assert getattr(getattr(config, parent), name) == 0.25
    assert config == parse(f"{OLD[old]}=0.25", "output_dir=x", "dataset.source=${output_dir}/y")
    (warning,) = told
    said = str(warning.message)
    assert said.startswith(f"{section}{old} is an old name of {OLD[old]}")
    assert said.endswith(": use that one")
    assert ("whose loss is 1 where" in said) == (old in BALANCING)


def test_the_old_name_of_the_mask(parse):
    with pytest.warns(
        FutureWarning, match=r"router_loss_mask is an old name of router_losses\.mask"
    ):
        assert parse("router_loss_mask=labels").router_losses.mask == "labels"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_names_beside_others(parse, refusal):
    config = parse("aux_loss_coef=0.1", "router_losses.z_coef=0.2", "moe_router_bias_update_rate=1")
    losses = config.router_losses
    assert (losses.load_balancing_coef, losses.z_coef, config.expert_bias.update_rate) == (
        0.1, 0.2, 1.0
    )  # fmt: skip
    for section in ("", "router_losses."):
        assert (
            refusal(f"{section}aux_loss_coef=0.1", "router_losses.load_balancing_coef=0")
            == f"{section}aux_loss_coef is an old name of router_losses.load_balancing_coef, but "
            f"that is given too: leave {section}aux_loss_coef out"
        )
    assert "is given too" in refusal("aux_loss_coef=0.1", "router_aux_loss_coef=0.1")
    assert "router_losses is 3, but must hold" in refusal("aux_loss_coef=1", "router_losses=3")
    assert "load_balancing_coef is -1.0, but must be at least 0" in refusal("aux_loss_coef=-1")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("batch_size = 2", "batch_size=2"),
        ("batch_size =2", "batch_size=2"),
        ("batch_size= 2", "batch_size=2"),
        ("--batch_size 2", "batch_size=2"),
        ("-batch_size 2", "batch_size=2"),
        ("seed=1 --batch_size=2", "batch_size=2"),
        ("foo seed=1", "key=value, or ~key"),
        ("= 2", "key=value, or ~key"),
    ],
)
def test_what_blanks_and_dashes_were_meant_to_be(refusal, typed, meant):
    assert f"is not an override: write {meant}" in refusal(*typed.split())


@quick
@given(key=st.text(max_size=8), value=st.text(max_size=8))
def test_no_override_ends_in_another_error(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(BASE)
    for override in (f"{key}={value}", f"optimizer.{key}={value}", f"~{key}", f"seed={value}"):
        said = ""
        try:
            load_config(path, [override])
        except InputError as error:
            said = str(error)
        assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the config lacks a value for output_dir: set it in the file, or add output_dir=VAL"),
        ("output_dir: x\noptimizer: {}\n", "the config lacks a value for dataset"),
        ("output_dir: x\ndataset: {}\n", "the config lacks a value for optimizer"),
        ("- a\n", "c.yaml must hold key: value pairs"),
        ("3", "c.yaml is not valid YAML"),
        ("a: [1\n", "c.yaml is not valid YAML"),
        ("\tseed: 1\n", "c.yaml is not valid YAML"),
        ("seed: 1\nseed: 2\n", "found duplicate key seed"),
        (BASE + "1: 2\n", "unknown key '1' in the config"),
        (BASE + "router_losses: {coef: 1}\n", "unknown key 'router_losses.coef' in the config"),
        (BASE + "batch_size: {a: 1}\n", "batch_size is {'a': 1}, but must be an integer"),
        (
            BASE + "dataset_val: {}\nearly_stop_patience: 2\n",
            "early_stop_patience is 2, but nothing is validated during the run: set run_val",
        ),
    ],
)
def test_bad_files(refusal, text, message):
    assert message in refusal(text=text)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid YAML: 'utf-8' codec can't decode"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["qwen3_moe/30B_A3B_full", "qwen3_moe/30B_A3B_full.yaml"])
def test_built_in_names_resolve_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == configs_root() / "qwen3_moe/30B_A3B_full.yaml"
    config = parse_command_line(["--config", name, "base_model=/x", "~optimizer.fused"])
    assert (config.base_model, "fused" in config.optimizer) == ("/x", False)
    assert isinstance(config.optimizer["lr"], float)
    (tmp_path / "qwen3_moe").mkdir()
    (tmp_path / name).write_text(BASE)
    assert find_config(name).resolve() == tmp_path / name, "a file of one's own comes first"


def test_unknown_names_list_the_built_in_ones(refusal):
    for argv, message in (
        (["--config", "qwen3_moe/30B_A3B_ful"], "did you mean 'qwen3_moe/30B_A3B_full'?"),
        (["--config", "nope"], "nor a built-in name; built-in are: "),
        (["--config", "nope"], ", qwen3_moe/235B_A22B_full, qwen3_moe/30B_A3B_full, "),
        (["--config"], "--config is missing: give it a YAML file or a built-in name"),
        (["seed=1"], "--config is missing"),
        (["--conf", "nope"], "--config is missing"),
    ):
        with pytest.raises(InputError) as caught:
            parse_command_line(argv)
        assert message in str(caught.value)


@dataclass
class WiderConfig(RecipeConfig):
    """What a copied recipe may add."""

    my_key: int = 3
    aux_loss_coef: float = 0.5


def test_a_recipes_own_keys(parse, refusal):
    config = parse("my_key=4", schema=WiderConfig)
    assert isinstance(config, WiderConfig)
    assert (config.my_key, parse(schema=WiderConfig).my_key) == (4, 3)
    own = parse("aux_loss_coef=0.1", schema=WiderConfig)
    assert (own.aux_loss_coef, own.router_losses.load_balancing_coef) == (0.1, 0.0), "its own now"
    assert "unknown key 'my_key'" in refusal("my_key=4")
    with pytest.raises(InputError, match="did you mean 'my_key'"):
        parse("my_kye=4", schema=WiderConfig)


def test_a_checked_config_survives_being_written_and_read(tmp_path, parse):
    """As the recipe keeps it under output_dir."""
    config = parse("router_losses.z_coef=1e-5", "dataset.data_files=[x]")
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert check_config(OmegaConf.structured(config)) == config

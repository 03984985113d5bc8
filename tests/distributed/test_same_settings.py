"""Processes with different configurations do not train together; all of them say why."""

from helpers_train import on_ranks


def test_a_configuration_of_its_own_is_refused_on_all(tmp_path):
    names = ("same", "rate", "seed", "ep", "more")
    got = on_ranks(2, {name: ("helpers_settings.sentences", name) for name in names}, tmp_path)
    assert got["same"] == [None] * 2
    for name, start in {
        "rate": "optimizer.lr is 0.5 for process 1 (on ",
        "seed": "seed is 1 for process 1 (on ",
        "ep": "ep is 2 for process 1 (on ",
        "more": "router_losses.z_coef is 0.1 for process 1 (on ",
    }.items():
        assert got[name][0] == got[name][1], "the others would wait"
        assert got[name][0].startswith(start)
        assert got[name][0].endswith("): give all of them the same configuration")
    assert "but not there for process 0 (on " in got["more"][0]

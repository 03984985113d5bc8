"""Parametrisation by family and variant; one store of models a session."""

import pytest
from helpers_parity import Models, all_cases


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("parity"))


def pytest_generate_tests(metafunc):
    """``case`` and ``variant``: every variant of every family; ``case`` and ``mutation`` likewise.

    ``case`` alone: every family, or those that have what the mark ``needs`` names.
    """
    cases = all_cases().values()
    for name, values in (("variant", "variants"), ("mutation", "mutations")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(
                ("case", name),
                [
                    pytest.param(case, value, id=f"{case.model_type}-{value}")
                    for case in cases
                    for value in getattr(case, values)
                ],
            )
            return
    if "case" in metafunc.fixturenames:
        needs = metafunc.definition.get_closest_marker("needs")
        metafunc.parametrize(
            "case",
            [
                pytest.param(case, id=case.model_type)
                for case in cases
                if needs is None or getattr(case, needs.args[0])
            ],
        )


@pytest.fixture(autouse=True)
def skip_by_case(request):
    """What a case says cannot be checked on a variant, by the ``check`` marks of the test."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "variant" not in parameters:
        return
    for mark in request.node.iter_markers("check"):
        reason = parameters["case"].skipped(mark.args[0], parameters["variant"])
        if reason is not None:
            pytest.skip(reason)

"""The golden cases travel: they are small, complete, and notice what a comparison with the whole arrays would."""

import pytest
import torch

import golden

CASES = sorted(path.stem for path in golden.FOLDER.glob("*.npz") if path.stem != "losses_metrics")


def test_the_folder_is_small_and_holds_every_system():
    assert sum(path.stat().st_size for path in golden.FOLDER.iterdir() if path.is_file()) < 4 * 2**20
    systems = {"pamm_released", "mtmamba", "mtmamba_plus", "invpt", "taskprompter", "mlore"}
    assert all(any(name.startswith(system) for name in CASES) for system in systems)


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_its_weights_its_outputs_and_its_maps(name):
    case = golden.GoldenCase(name)
    assert {key: list(value.shape) for key, value in case.state.items()} == case.facts["state"]
    assert case.maps("output/") == [f"output/{task}" for task in case.tasks]
    assert case.maps("mid/") and set(case.maps()) == case.values.keys()
    assert case.facts["grad_norm"].keys() <= case.state.keys() | case.extras.keys()


def test_one_wrong_value_anywhere_is_noticed():
    case = golden.GoldenCase("pamm_released_pascal")
    name = "mid/tokens.0"
    whole = torch.from_numpy(case.values[name]).view(case.facts["maps"][name]["shape"])
    assert case.deviation(name, whole) == 0
    name = "output/semseg"
    shape, largest = (case.facts["maps"][name][key] for key in ("shape", "largest"))
    values = torch.zeros(shape).flatten()
    at = golden.formula.positions(f"{case.name}/{name}", len(values), golden.POSITIONS)
    values[at] = torch.from_numpy(case.values[name])
    signs = golden.formula.signs(f"{case.name}/{name}", len(values))
    rest = torch.ones(len(values), dtype=torch.bool)
    rest[at] = False
    first = int(rest.nonzero()[0])
    values[first] = signs[first] * (case.facts["maps"][name]["sum"] - float(signs @ values.double().numpy()))
    assert case.deviation(name, values.view(shape)) < 1e-6  # a map with the published values at all stored positions
    values[first] += 0.01 * largest
    assert case.deviation(name, values.view(shape)) > 1e-5
    with pytest.raises(AssertionError, match=r"output/semseg: found shape \(3,\), published"):
        case.deviation(name, values[:3])

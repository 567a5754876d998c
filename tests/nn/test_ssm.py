"""Initial parameters of the state space model."""

import math

import pytest
import torch
import torch.nn.functional as F

from pamm.nn.ssm import init_A_log, init_D, init_delta_bias, init_delta_weight, inverse_softplus


@pytest.mark.parametrize("lead", [(), (5,), (3, 4)], ids=str)
def test_parameters_stack_over_leading_axes(lead):
    assert init_A_log(*lead, channels=6, state_size=4).shape == (*lead, 6, 4)
    assert init_D(*lead, channels=6).shape == (*lead, 6)
    assert init_delta_bias(*lead, channels=6).shape == (*lead, 6)
    assert init_delta_weight(*lead, channels=6, rank=2).shape == (*lead, 6, 2)


def test_A_is_minus_one_to_minus_N_and_D_is_one():
    A = -init_A_log(2, channels=3, state_size=4).exp()
    torch.testing.assert_close(A, torch.tensor([-1.0, -2.0, -3.0, -4.0]).expand(2, 3, 4))
    assert (init_D(2, channels=3) == 1).all()


def test_delta_starts_log_uniform():
    torch.manual_seed(0)
    log_delta = F.softplus(init_delta_bias(channels=20_000)).log()
    low, high = math.log(1e-3), math.log(1e-1)
    assert log_delta.min() >= low - 1e-4
    assert log_delta.max() <= high + 1e-4
    # A uniform variable's mean and standard deviation; the sample's are within five standard errors.
    assert abs(log_delta.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * 20_000)
    assert abs(log_delta.std() - (high - low) / math.sqrt(12)) < 0.02


def test_inverse_softplus_inverts_small_and_large_values():
    values = torch.logspace(-8, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(F.softplus(inverse_softplus(values)), values, rtol=1e-7, atol=0)


def test_delta_weight_is_bounded_by_the_rank():
    torch.manual_seed(0)
    weight = init_delta_weight(channels=500, rank=16).abs()
    assert 0.24 < weight.max() <= 0.25


def test_decay_exempts_the_state_space_parameters_only():
    exempt = [init_A_log(channels=2, state_size=2), init_D(channels=2), init_delta_bias(channels=2)]
    assert all(parameter._no_weight_decay for parameter in exempt)
    assert not hasattr(init_delta_weight(channels=2, rank=1), "_no_weight_decay")

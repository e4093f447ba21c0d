"""S4D: chunks against convolutions and closed forms, and its share of parameters."""

import math

import pytest
import torch

from lra.registry import build_attention, load_task, task_names
from lra.training.config import Run, default_options
from lra.training.trainer import build_optimizer
from tests.models.cases import Case, Setting, inputs

H, N, D, E = 3, 149, 5, 15
SETTING = Setting((2, H, N, D), False)


def kernels(attention, causal):
    """K_l of the past and of the future, (E, N) each, from the paper's complex formula."""
    A = torch.complex(-attention.log_decay_ES.exp(), attention.frequency_ES)
    tA, C = attention.log_step_E.exp()[:, None] * A, torch.complex(*attention.readout_2ES)
    ages = torch.exp(tA[..., None] * torch.arange(N).double())
    each = 2 * ((C * (tA.exp() - 1) / A)[..., None] * ages).real
    half = each.shape[1] if causal else each.shape[1] // 2
    return each[:, :half].sum(1), each[:, half:].sum(1)


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_equal_the_fft_convolution_with_both_kernels(causal):
    attention, v = Case("s4d").build(SETTING), inputs(SETTING)[2].detach()
    past, future = kernels(attention, causal)
    signal = v.permute(0, 1, 3, 2).reshape(2, E, N)
    circle = torch.cat([past, future.flip(1)], 1)  # lag -1 is the last of 2 N
    out = torch.fft.irfft(torch.fft.rfft(signal, 2 * N) * torch.fft.rfft(circle), 2 * N)[..., :N]
    out = (out + attention.skip_E[:, None] * signal).view(2, H, D, N).transpose(2, 3)
    torch.testing.assert_close(attention(v, v, v, causal=causal), out)


def test_an_impulse_shows_one_kernel_behind_it_and_the_other_before_it():
    attention, at = Case("s4d").build(SETTING), 70
    v = torch.zeros(1, H, N, D).double()
    v[:, :, at] = 1
    out = attention(v, v, v)[0].transpose(1, 2).reshape(E, N)
    past, future = kernels(attention, False)
    torch.testing.assert_close(out[:, at + 1 :], past[:, 1 : N - at])
    torch.testing.assert_close(out[:, at], past[:, 0] + attention.skip_E)
    torch.testing.assert_close(out[:, :at].flip(1), future[:, :at])


def test_zero_order_hold_is_exact_for_a_constant_input_at_every_step_size():
    attention = Case("s4d").build(SETTING)
    attention.skip_E.data.zero_()
    A = torch.complex(-attention.log_decay_ES.exp(), attention.frequency_ES)
    time = attention.log_step_E.exp()[:, None] * torch.arange(1, N + 1).double()
    state = (torch.exp(time[:, None] * A[..., None]) - 1) / A[..., None]  # of dx/dt = A x + 1, x(0) = 0
    wanted = 2 * (torch.complex(*attention.readout_2ES)[..., None] * state).real.sum(1)
    v = torch.ones(1, H, N, D).double()
    out = attention(v, v, v, causal=True)[0].transpose(1, 2).reshape(E, N)
    torch.testing.assert_close(out, wanted)


def test_a_slow_state_keeps_its_digits_in_fp32():
    """e^z - 1 of a small z would lose them: here |z| is about 1e-5."""
    wide = Case("s4d").build(SETTING, trained=False)
    wide.log_step_E.data.fill_(math.log(1e-5))
    wide.skip_E.data.zero_()
    narrow = Case("s4d").build(SETTING, torch.float32)
    narrow.load_state_dict(wide.state_dict())
    v = inputs(SETTING)[2].detach()
    wanted = wide(v, v, v)
    assert (narrow(*[v.float()] * 3) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_it_starts_as_s4d_lin():
    attention = build_attention("s4d", heads=2, head_dim=32, max_len=N, num_states=16)
    assert (attention.log_decay_ES.exp() == 0.5).all()
    wanted = math.pi * torch.tensor([0.0, 1, 2, 3, 0, 1, 2, 3])
    torch.testing.assert_close(attention.frequency_ES, wanted.expand(64, 8))
    steps = attention.log_step_E.exp()
    assert steps.min() >= 1e-3 and steps.max() <= 1e-1 and steps.max() > 10 * steps.min()
    assert abs(attention.readout_2ES.square().mean() - 0.5) < 0.1


@pytest.mark.parametrize("preset", ["smoke", "small", "paper"])
@pytest.mark.parametrize("task_name", task_names())
def test_every_recipe_keeps_it_within_ten_percent_of_softmax(task_name, preset):
    task = load_task(task_name)
    recipe = task.RECIPES[preset]
    run = Run(task.META, preset, "s4d", default_options("s4d", recipe), recipe, {}, "held-out", 0, {})
    ours, softmax = (sum(p.numel() for p in run.build_model(n).parameters()) for n in ("s4d", "softmax"))
    assert 0.9 * softmax < ours <= 1.1 * softmax
    if recipe.encoder.width == 64:
        assert ours == softmax


def test_nothing_of_it_decays():
    attention = build_attention("s4d", heads=2, head_dim=32, max_len=N)
    optim = load_task("listops").RECIPES["small"].train
    decaying = [g for g in build_optimizer(attention, optim).param_groups if g["weight_decay"]]
    assert not any(g["params"] for g in decaying)


@pytest.mark.parametrize("wrong", [0, 2, 6, -4])
def test_states_that_do_not_split_are_refused(wrong):
    with pytest.raises(ValueError, match=f"num_states must be a multiple of 4 .* got {wrong}"):
        Case("s4d", {"num_states": wrong}).build(SETTING)

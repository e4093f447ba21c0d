"""The linear transformer: its scale, and denominators that are never zero."""

import pytest
import torch
import torch.nn.functional as F

from models.attention.linear import phi
from tests.models.cases import Case, Setting, inputs

SETTING = Setting((2, 3, 7, 5), False)


def textbook(q, k, v):
    """The paper's equation 4 without any scale."""
    kernel = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
    return kernel @ v / kernel.sum(-1, keepdim=True)


def test_the_default_scale_is_the_papers_none_and_others_are_relative_to_it():
    attention, (q, k, v) = Case("linear").build(SETTING), inputs(SETTING)
    torch.testing.assert_close(attention(q, k, v), textbook(q, k, v))
    torch.testing.assert_close(attention(q, k, v, scale=4 * 5**-0.5), textbook(2 * q, 2 * k, v))


def test_elu_plus_one_keeps_its_digits_where_adding_one_rounds_it_away():
    x = torch.tensor([-30.0, -17.5, -1.0, 0.0, 2.0])
    torch.testing.assert_close(phi(x), torch.where(x > 0, x + 1, x.exp()), rtol=1e-6, atol=0)
    assert (F.elu(x) + 1)[0] == 0 < phi(x)[0]
    slope = torch.func.vmap(torch.func.grad(phi))(x)
    torch.testing.assert_close(slope, x.clamp(max=0).exp())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_that_all_vanish_average_instead_of_dividing_zero_by_zero(causal, dtype):
    v = inputs(SETTING, dtype)[2].detach()
    q = torch.full_like(v, -300)
    attention = Case("linear").build(SETTING, dtype)
    out = attention(q, q, v, causal=causal).double()
    mean = v.double().cumsum(2) / torch.arange(1, 8)[:, None] if causal else v.double().mean(2, keepdim=True)
    torch.testing.assert_close(out, mean.expand_as(out), rtol=0, atol=0.02)


def test_a_step_under_autocast_keeps_fp32_sums():
    attention, (q, k, v) = Case("linear").build(SETTING, torch.float32), inputs(SETTING, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = attention.step(q[:, :, 0], k[:, :, 0], v[:, :, 0])
    assert {x.dtype for x in state} == {torch.float32}
    torch.testing.assert_close(out, v[:, :, 0])  # the only token has weight 1

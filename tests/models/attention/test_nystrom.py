"""Nystromformer: landmarks of real tokens only, the pseudo-inverse of each row alone, the convolution."""

import pytest
import torch
import torch.nn.functional as F

from lra.registry import build_attention
from models.attention.nystrom import CONV, depthwise, naive_nystrom, pseudo_inverse, segments

B, H, N, D = 2, 3, 41, 5
SHAPE = {"heads": H, "head_dim": D, "max_len": N}


def qkv(*, dtype=torch.float64, strength=1.0, length=N):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, B, H, length, D, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (strength * q, strength * k, v)]


def build(dtype=torch.float64, **options):
    return build_attention("nystrom", **SHAPE, **options).to(dtype)


# Landmarks


@pytest.mark.parametrize("landmarks", [1, 7, 40, 64])
def test_segments_hold_each_real_token_once_in_order_and_differ_by_one_at_most(landmarks):
    mask = torch.stack([torch.arange(N) % 3 != 1, torch.arange(N) < 5, torch.arange(N) < 0])
    index, inside = segments(mask, landmarks)
    for b in range(3):
        real = mask[b].nonzero()[:, 0]
        assert torch.equal(index[b][inside[b].flatten()], real)
        filled = inside[b].sum(1)[: min(landmarks, len(real))]
        assert len(real) == 0 or filled.max() - filled.min() <= 1 and filled.min() >= 1


def test_as_many_landmarks_as_tokens_and_iterations_enough_are_exact_attention():
    q, k, v = qkv(length=7)
    for landmarks in (7, 64):
        out = build(num_landmarks=landmarks, iterations=40)(q, k, v)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-8)


def test_padding_in_front_between_and_behind_leaves_the_landmarks_as_they_are():
    """nystrom-attention cuts segments by position: real tokens share them with padding."""
    q, k, v = qkv()
    mask = (torch.arange(N) % 5 != 2) & (torch.arange(N) > 3) & (torch.arange(N) < N - 2)
    attention = build(num_landmarks=8)
    out = attention(q, k, v, mask.expand(B, N))
    alone = attention(*(x[:, :, mask] for x in (q, k, v)))
    torch.testing.assert_close(out[:, :, mask], alone, rtol=0, atol=1e-10)


def test_error_to_exact_attention_falls_with_landmarks_where_neighbours_are_alike():
    t = torch.linspace(0, 6, 240, dtype=torch.float64)
    q, k = (torch.stack([(t * f + p).cos() for f in (1, 2, 3, 4, 5)], -1)[None, None] for p in (0, 1))
    v, errors = torch.randn(1, 1, 240, 5, generator=torch.Generator().manual_seed(1)).double(), []
    exact = F.scaled_dot_product_attention(q, k, v)
    for landmarks in (2, 8, 32):
        attention = build_attention("nystrom", heads=1, head_dim=5, max_len=240, num_landmarks=landmarks)
        errors.append((attention.double()(q, k, v) - exact).norm() / exact.norm())
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


# The pseudo-inverse


def test_pseudo_inverse_meets_penroses_conditions_zero_rows_and_columns_included():
    a = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    a = F.pad(a, (0, 2, 0, 2))
    z = pseudo_inverse(a, 30)
    assert (z[..., 6:, :] == 0).all() and (z[..., 6:] == 0).all()
    for got, want in ((a @ z @ a, a), (z @ a @ z, z), ((a @ z).mT, a @ z), ((z @ a).mT, z @ a)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_rows_and_heads_do_not_share_the_scale_of_their_first_guess():
    """nystrom-attention divides by maxima over the whole batch: its six steps depend on the other rows."""
    q, k, v = qkv()
    attention = build(num_landmarks=8)
    wild = [torch.cat([x[:1], 5 * x[1:]]) for x in (q, k, v)]
    assert torch.equal(attention(*wild)[0], attention(q, k, v)[0])
    q[:, 1:], k[:, 1:] = 5 * q[:, 1:], 5 * k[:, 1:]
    assert torch.equal(attention(q, k, v)[0, 0], attention(*qkv())[0, 0])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_half_precision_is_the_wide_result_rounded(half, strength):
    inputs = qkv(dtype=half, strength=strength)
    attention = build(torch.float32, num_landmarks=8)
    with torch.autocast("cpu", half):
        out = attention(*inputs)
    wanted = naive_nystrom(attention, *(x.double() for x in inputs))
    assert out.dtype == half
    assert (out.double() - wanted).norm() / wanted.norm() < 2e-2


# The convolution


def test_depthwise_and_its_gradients_are_those_of_a_convolution():
    """F.conv2d in fp32 gave a weight gradient 5% off at this size, on the CPU it was first written on."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 4, 256, 16, generator=generator), torch.randn(4, CONV, generator=generator)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    wide = [y.detach().double().requires_grad_() for y in leaves]
    wanted = F.conv2d(wide[0], wide[1][:, None, :, None], padding=(CONV // 2, 0), groups=4)
    got, g = depthwise(*leaves), torch.randn(2, 4, 256, 16, generator=generator)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-4)
    ours = torch.autograd.grad((got * g).sum(), leaves)
    theirs = torch.autograd.grad((wanted * g.double()).sum(), wide)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).abs().max() < 1e-5 * other.abs().max()


def test_convolution_is_off_unless_asked_for_and_adds_to_the_attention():
    q, k, v = qkv()
    plain, convolved = build(num_landmarks=8), build(num_landmarks=8, conv=True)
    assert not list(plain.parameters()) and [p.shape for p in convolved.parameters()] == [(H, CONV)]
    added = convolved(q, k, v) - plain(q, k, v)
    torch.testing.assert_close(added, depthwise(v, convolved.conv_HN), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("option", "value"), [("num_landmarks", 0), ("iterations", -1)])
def test_options_out_of_range_are_refused_with_the_value(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least .; got {value}"):
        build(**{option: value})

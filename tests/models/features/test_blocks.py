"""The family over two flash attentions: both forms against the textbook, states, merging, and the causal blocks."""

from dataclasses import dataclass

import pytest
import torch

from models.features import blocks, family
from models.features.blocks import State, joined, merge, read, state_of, sums
from models.features.family import FeatureAttention, FeatureConfig, Maps
from models.features.flash import NEVER, flash

B, H, N, D, M = 2, 3, 7, 5, 11
LONG = 301  # several blocks of the causal form, the last one incomplete
FORMS = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Given(FeatureAttention):
    """A method of the family with projections and biases of one's own; the key bias is jump_n + u.k_n - |k_n|^2 / 2."""

    Config = FeatureConfig

    def __init__(self, config=None, shift=0.0):
        super().__init__(config or FeatureConfig(num_features=M), heads=H, head_dim=D, max_len=LONG)
        self.aq, self.ak = (torch.nn.Parameter(normal(H, M, D, seed=s)) for s in (3, 4))
        self.u, self.fb = (torch.nn.Parameter(normal(H, D, 1, seed=5)), torch.nn.Parameter(normal(H, M, seed=6)))
        self.shift = shift

    def maps(self, k_BHND, scale):
        k = k_BHND
        key_bias = (k @ self.u.to(k.dtype))[..., 0] - k.square().sum(-1) / 2 + self.shift
        return Maps(self.aq.to(k.dtype), self.ak.to(k.dtype), k, key_bias, self.fb.to(k.dtype) - self.shift)

    def log_norm(self, q_BHND, scale):
        return torch.zeros_like(q_BHND[..., 0])


def leaves(n=N, dtype=torch.float64, *, strength=1.0):
    q, k, v = (normal(B, H, n, D, seed=s) for s in range(3))
    return [x.to(dtype).requires_grad_() for x in (strength * q, strength * k, v)]


def textbook(attention, q, k, v, mask=None, *, causal=False):
    """phi(q) phi(k)^T, features written out, one division."""
    maps = attention.maps(k, 1.0)
    r = q @ maps.aq_HMD.mT + maps.feature_bias_HM[:, None]
    l = k @ maps.ak_HMD.mT + maps.key_bias_BHN[..., None]  # noqa: E741, as in the equations
    kernel = r.exp() @ l.exp().mT
    if mask is not None:
        kernel = kernel * mask[:, None, None, :]
    kernel = kernel.tril() if causal else kernel
    total = kernel.sum(-1, keepdim=True)
    return kernel @ v / torch.where(total == 0, 1, total)


def masks(n):
    rows = torch.arange(n), torch.arange(B)[:, None]
    return {
        "no mask": None,
        "padded": rows[0] < n - rows[1] * (n // 2),
        "holes": (rows[0] + rows[1]) % 3 != 1,
        "padded on the left": rows[0] >= (1 + rows[1]) * (n // 3),
        "an empty row": (rows[0] >= 0) & (rows[1] > 0),
    }


def gradients(out, xs, mask):
    weight = normal(*out.shape, seed=9).to(out.dtype)
    if mask is not None:
        weight = weight * mask[:, None, :, None]
    return torch.autograd.grad((weight * out).sum(), xs)


def assert_equals_the_textbook(n, mask, causal, dtype=torch.float64, tolerance=1e-11, strength=0.5):
    xs, attention, exact = leaves(n, dtype, strength=strength), Given().to(dtype), Given().double()
    wide = [x.detach().double().requires_grad_() for x in xs]
    got, wanted = attention(*xs, mask, causal=causal), textbook(exact, *wide, mask, causal=causal)
    pairs = zip(
        gradients(got, [*xs, *attention.parameters()], mask),
        gradients(wanted, [*wide, *exact.parameters()], mask),
        strict=True,
    )
    for i, (x, y) in enumerate([(got, wanted), *pairs]):
        if mask is not None and i == 0:
            x, y = (z.masked_fill(~mask[:, None, :, None], 0) for z in (x, y))
        error = (x - y).abs().max() / y.abs().max().clamp(min=1)
        assert error < tolerance, f"tensor {i} is off by {error:.1e}"


@FORMS
@pytest.mark.parametrize("n", [1, N, LONG])
def test_equals_the_textbook_form_with_its_gradients(n, causal):
    for mask in masks(n).values():
        assert_equals_the_textbook(n, mask, causal)


@FORMS
def test_fp32_is_as_close_as_fp32_can_be(causal):
    assert_equals_the_textbook(LONG, masks(LONG)["holes"], causal, dtype=torch.float32, tolerance=4e-5)


@pytest.mark.parametrize("block, growth", [(1, 60), (2, 60), (5, 60), (5, -1e9), (300, 60), (301, 60)])
def test_the_size_of_a_block_changes_nothing(block, growth, monkeypatch):
    """Nor does summing every block term by term, as on a GPU."""
    monkeypatch.setattr(blocks, "GROWTH", growth)
    monkeypatch.setitem(family.BLOCK, "cpu", block)
    monkeypatch.setattr(blocks, "CACHE", 5 * M)
    for mask in masks(LONG).values():
        assert_equals_the_textbook(LONG, mask, True)


@FORMS
def test_a_constant_added_to_every_bias_changes_nothing(causal):
    xs = [x.detach() for x in leaves(LONG)]
    wanted = Given().double()(*xs, causal=causal)
    torch.testing.assert_close(Given(shift=70.0).double()(*xs, causal=causal), wanted, rtol=0, atol=1e-11)


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength, window", [(1.0, 0), (30.0, 0), (30.0, 7)])
def test_half_precision_is_within_two_percent_of_float64(dtype, strength, window, causal):
    """Of float64 on the same rounded inputs, relative in norm, gradients finite; logits up to some thousand."""
    half, config = leaves(LONG, dtype, strength=strength), FeatureConfig(num_features=M, window=window)
    attention, exact = Given(config).to(dtype), Given(config).to(dtype).double()
    out = attention(*half, causal=causal)
    wanted = exact(*(x.detach().double() for x in half), causal=causal)
    assert out.dtype == dtype and (out - wanted).norm() / wanted.norm() < 0.02
    assert all(g.isfinite().all() for g in gradients(out, [*half, *attention.parameters()], None))


# Parts and states


def test_attentions_over_parts_of_the_keys_merge_to_the_attention_over_all():
    q, k, v = leaves()
    bias = normal(B, H, N, seed=8)
    cuts = (slice(0, 3), slice(3, 4), slice(4, N))
    parts = [flash(q, k[:, :, c], v[:, :, c], bias[..., c]) for c in cuts]
    nothing = flash(q, k, v, torch.full_like(bias, NEVER))
    wanted, _ = flash(q, k, v, bias)
    got = merge(*parts, nothing)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for x, y in zip(gradients(got, [q, k, v], None), gradients(wanted, [q, k, v], None), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_states_of_disjoint_keys_have_a_sum():
    (q, k, v), a, bias = leaves(), normal(H, M, D, seed=3), normal(B, H, N, seed=8)
    one, other = (state_of(a, k[:, :, c], v[:, :, c], bias[..., c]) for c in (slice(0, 3), slice(3, N)))
    whole = state_of(a, k, v, bias)
    for x, y in zip(joined(one, other), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    out, lse = read(q, a, whole, torch.zeros(H, M).double())
    kernel = ((q @ a.mT) @ torch.eye(M).double())[..., None, :] + ((k @ a.mT) + bias[..., None])[..., None, :, :]
    torch.testing.assert_close(lse, kernel.logsumexp((-1, -2)), rtol=0, atol=1e-11)
    torch.testing.assert_close(out, kernel.logsumexp(-1).softmax(-1) @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("J", "reach", "both"), [(J, r, b) for J in (1, 2, 13) for r in (0, 1) for b in (False, True)])
def test_sums_are_over_all_blocks_beyond_the_reach(J, reach, both):
    L, Y = normal(B, J, H, M, seed=1), normal(B, J, H, M, D, seed=2)
    got = sums(State(L.flatten(0, 1), Y.flatten(0, 1)), B, reach, both=both)
    for j in range(J):
        taken = [i for i in range(J) if i < j - reach or (both and i > j + reach)]
        got_L, got_Y = (x.unflatten(0, (B, J))[:, j] for x in got)
        if not taken:
            assert (got_L < NEVER / 2).all() and got_Y.isfinite().all()
            continue
        torch.testing.assert_close(got_L, L[:, taken].logsumexp(1), rtol=0, atol=1e-12)
        wanted = (L[:, taken].softmax(1)[..., None] * Y[:, taken]).sum(1)
        torch.testing.assert_close(got_Y, wanted, rtol=0, atol=1e-12)


def test_a_sum_of_earlier_blocks_does_not_depend_on_later_ones():
    L, Y = (normal(13, *s).float() for s in ((H, M), (H, M, D)))
    wanted = sums(State(L, Y), 1, 0, both=False)
    L[6:], Y[6:] = 300 * L[6:], 1e4 * Y[6:]
    got = sums(State(L, Y), 1, 0, both=False)
    assert all(torch.equal(x[:7], y[:7]) for x, y in zip(got, wanted, strict=True))


# The causal form


@pytest.mark.parametrize("jump", [1.0, 30.0, 300.0])
def test_a_key_larger_than_all_before_it_by_any_amount_is_exact(jump):
    """The trap of a shared reference: exp(l - c) of a later key overflows, or the past underflows."""

    class Jumps(Given):
        def maps(self, k_BHND, scale):
            maps = super().maps(k_BHND, scale)
            jumps = torch.zeros(k_BHND.shape[2], dtype=maps.key_bias_BHN.dtype)
            jumps[100], jumps[140], jumps[141:] = jump, 3 * jump, 2 * jump
            return maps._replace(key_bias_BHN=maps.key_bias_BHN + jumps)

    xs, attention = [x.detach() for x in leaves(LONG)], Jumps().double()
    wanted = textbook(attention, *xs, causal=True)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        got = Jumps().to(dtype)(*(x.to(dtype) for x in xs), causal=True)
        if jump < 300:  # beyond, the textbook form itself overflows
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance)
        torch.testing.assert_close(got[:, :, :100].double(), wanted[:, :, :100], rtol=0, atol=tolerance)
        assert got.isfinite().all()


def test_a_stabiliser_over_the_future_would_leak_and_ours_does_not():
    """performer-pytorch's causal mode changes earlier outputs when later tokens are enlarged."""
    xs, attention = [x.detach().float() for x in leaves(LONG)], Given().float()
    out = attention(*xs, causal=True)
    for start in (1, 5, 130, 300):
        wild = [torch.cat([x[:, :, :start], 30 * x[:, :, start:]], 2) for x in xs]
        changed = attention(*wild, causal=True)
        torch.testing.assert_close(changed[:, :, :start], out[:, :, :start], rtol=0, atol=1e-5)
        assert not torch.allclose(changed[:, :, start:], out[:, :, start:])


# Options


@dataclass
class Bad:
    window: int
    sinks: int
    said: str


@pytest.mark.parametrize(
    "bad",
    [
        Bad(-1, 0, "window must be at least 0; got -1"),
        Bad(4, -2, "sinks must be at least 0; got -2"),
        Bad(4, 5, "sinks must be at most the window, 4 tokens; got 5"),
        Bad(0, 1, "sinks must be at most the window, 0 tokens; got 1"),
    ],
)
def test_a_window_or_sinks_out_of_range_are_refused_with_their_value(bad):
    with pytest.raises(ValueError, match=bad.said):
        Given(FeatureConfig(num_features=M, window=bad.window, sinks=bad.sinks))

"""The random projections, their redraws, and the methods of the family."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from lra.options import construct
from lra.registry import attention_class, build_attention
from lra.training.config import stored_options
from models.features.blocks import read, state_of
from models.features.projections import gaussian

B, H, N, D, M = 2, 3, 7, 5, 11
ROOT = Path(__file__).resolve().parents[3]
RECORDS = ROOT / "results" / "reference" / "records"
SHAPE = {"heads": H, "head_dim": D, "max_len": N}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(n=N, dtype=torch.float64):
    return [normal(B, H, n, D, seed=s, dtype=dtype) for s in range(3)]


def draw(heads=H, features=M, dim=D, *, orthogonal=True, seed=0, layer=0, redraw=0):
    return gaussian(heads, features, dim, orthogonal=orthogonal, seed=seed, layer=layer, redraw=redraw)


# Projections


def test_rows_of_a_block_are_orthogonal_and_blocks_are_not():
    w = draw(H, 2 * D + 1).double()
    for block in (w[:, :D], w[:, D : 2 * D]):
        gram = block @ block.transpose(-1, -2)
        cosine = gram / (block.norm(dim=-1)[:, :, None] * block.norm(dim=-1)[:, None, :])
        torch.testing.assert_close(cosine, torch.eye(D).double().expand(H, D, D), rtol=0, atol=1e-6)
    assert (w[:, :D] @ w[:, D : 2 * D].transpose(-1, -2)).abs().min() > 1e-6


def bias_in_standard_errors(directions_HMD):
    """Largest |z| of the mean of each entry of the D x D matrix of directions, over independent draws."""
    return (directions_HMD.mean(0) / directions_HMD.std(0) * len(directions_HMD) ** 0.5).abs().max()


def test_orthogonal_blocks_are_haar_and_not_raw_qr():
    """Public packages take Q as LAPACK returns it: its signs are not random, and the features are biased."""
    w = draw(20_000, D).double()
    assert bias_in_standard_errors(w / w.norm(dim=-1, keepdim=True)) < 4.5
    assert bias_in_standard_errors(torch.linalg.qr(normal(20_000, D, D)).Q.transpose(-1, -2)) > 20


@pytest.mark.parametrize("orthogonal", [True, False])
def test_every_row_is_standard_normal(orthogonal):
    w = draw(4_000, D, orthogonal=orthogonal).double()
    for row in range(D):
        assert stats.kstest(w[:, row].norm(dim=-1), stats.chi(D).cdf).pvalue > 0.001
        assert stats.kstest(w[:, row].flatten(), "norm").pvalue > 0.001


def test_norms_of_a_block_are_independent():
    norms = draw(20_000, 2).norm(dim=-1).double()
    assert abs(torch.corrcoef(norms.T)[0, 1]) < 4 / 20_000**0.5


def test_draws_depend_on_seed_layer_redraw_and_nothing_else():
    keys = [dict(seed=s, layer=y, redraw=r) for s in (0, 1, -1, 2**40) for y in (0, 1) for r in (0, 1)]
    draws = [draw(**key) for key in keys]
    torch.manual_seed(5)
    assert all(torch.equal(w, draw(**key)) for w, key in zip(draws, keys, strict=True))
    assert len({w.numpy().tobytes() for w in draws}) == len(keys)


def test_each_head_has_its_own_projection():
    """performer-pytorch shares one projection between the heads of a layer."""
    w = draw(2)
    assert not torch.allclose(w[0], w[1])


def kernel_estimates(orthogonal, q, k):
    """phi(q).phi(k) with D features, one estimate per independent draw."""
    w = draw(40_000, D, orthogonal=orthogonal, seed=2).double()
    return torch.exp(w @ (q + k) - (q.square().sum() + k.square().sum()) / 2).mean(-1)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_features_are_unbiased(orthogonal, seed):
    q, k = 0.4 * normal(2, D, seed=seed)
    estimates = kernel_estimates(orthogonal, q, k)
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert (estimates.mean() - torch.exp(q @ k)).abs() < 4 * standard_error


def test_orthogonal_features_have_the_smaller_variance():
    """arXiv 2009.14794, theorem 2."""
    q, k = 0.4 * normal(2, D, seed=3)
    assert kernel_estimates(True, q, k).var() < 0.9 * kernel_estimates(False, q, k).var()


# The family


def test_importance_weights_undo_the_proposal():
    """Features drawn from N(0, 4 I) with b = log p/psi estimate the kernel of N(0, I)."""
    q, k, v = (x[:1, :1] for x in qkv())
    q, k = q / 3, k / 3
    w = 2 * draw(1, 400_000, orthogonal=False, seed=1).double()
    log_ratio = D * math.log(2) - w.square().sum(-1) * (1 / 2 - 1 / 8)
    a, key_bias = D**-0.25 * w, -0.5 * D**-0.5 * k.square().sum(-1)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    state = state_of(a, k, v, key_bias)
    torch.testing.assert_close(read(q, a, state, log_ratio)[0], exact, rtol=0, atol=0.005)
    assert (read(q, a, state, 0 * log_ratio)[0] - exact).abs().max() > 0.05


def test_darkformer_at_the_identity_is_performer_with_the_same_draws():
    for orthogonal in (True, False):
        a, b = (
            build_attention(n, **SHAPE, seed=3, layer=2, orthogonal=orthogonal) for n in ("performer", "darkformer")
        )
        assert torch.equal(a.w_HMD, b.w_HMD)
        torch.testing.assert_close(a.double()(*qkv()), b.double()(*qkv()), rtol=0, atol=1e-13)


def test_darkformer_estimates_the_kernel_of_its_geometry():
    """Any G: the limit is softmax attention between G q and G k, not G^T q and G^T k."""
    q, k, v = (x[:1, :1] for x in qkv())
    attention = build_attention("darkformer", heads=1, head_dim=D, max_len=N, num_features=200_000).double()
    with torch.no_grad():
        attention.G_HDD.copy_(0.2 * normal(1, D, D, seed=8))
    G = attention.G_HDD.detach()

    def exact(G):
        return torch.nn.functional.scaled_dot_product_attention(q @ G.mT, k @ G.mT, v)

    out = attention(q, k, v).detach()
    torch.testing.assert_close(out, exact(G), rtol=0, atol=0.01)
    assert (out - exact(G.mT)).abs().max() > 0.05


@pytest.mark.parametrize("name", ["performer", "darkformer"])
class TestRedraw:
    def build(self, name, **options):
        return build_attention(name, **SHAPE, seed=3, layer=1, **options)

    def test_happens_before_steps_that_are_multiples_and_never_at_step_zero(self, name):
        attention, changed = self.build(name, redraw_every=3).train(), []
        for step in range(10):
            before = attention.w_HMD.clone()
            attention.before_step(step)
            attention(*qkv(dtype=torch.float32))
            if not torch.equal(before, attention.w_HMD):
                changed.append(step)
        assert changed == [3, 6, 9] and attention.redraws == 3

    def test_never_happens_at_zero_or_in_evaluation(self, name):
        fixed, evaluated = self.build(name, redraw_every=0), self.build(name, redraw_every=1).eval()
        before = fixed.w_HMD.clone()
        for step in range(5):
            fixed.before_step(step)
            evaluated(*qkv(dtype=torch.float32))
        assert torch.equal(fixed.w_HMD, before) and torch.equal(evaluated.w_HMD, before)

    def test_is_the_same_on_every_rank_whatever_the_global_generator(self, name):
        ranks = [self.build(name, redraw_every=2) for _ in range(2)]
        for rank, attention in enumerate(ranks):
            torch.manual_seed(rank)
            for step in range(5):
                attention.before_step(step)
        assert torch.equal(ranks[0].w_HMD, ranks[1].w_HMD)

    def test_survives_a_checkpoint_and_goes_on_as_if_uninterrupted(self, name):
        whole, first = (self.build(name, redraw_every=2) for _ in range(2))
        for step in range(5):
            whole.before_step(step)
            first.before_step(step)
        resumed = build_attention(name, **SHAPE, seed=3, layer=1, redraw_every=2)
        resumed.load_state_dict(first.state_dict())
        assert torch.equal(resumed.w_HMD, first.w_HMD) and resumed.redraws == first.redraws == 2
        for step in range(5, 9):
            whole.before_step(step)
            resumed.before_step(step)
        assert torch.equal(whole.w_HMD, resumed.w_HMD) and resumed.redraws == whole.redraws == 4

    def test_leaves_no_gradient_on_the_projections(self, name):
        attention = self.build(name)
        assert not attention.w_HMD.requires_grad and "w_HMD" in attention.state_dict()


def test_num_features_below_one_is_refused():
    with pytest.raises(ValueError, match="num_features must be at least 1; got 0"):
        build_attention("performer", **SHAPE, num_features=0)


# Hybrids


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["performer", "darkformer", "lfk", "optimal"])
def test_a_hybrid_whose_window_holds_everything_is_exact_attention(name, causal):
    for n, window in ((7, 7), (7, 4), (1, 1)):
        attention, (q, k, v) = build_attention(name, **SHAPE, window=window).double(), qkv(n)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(attention(q, k, v, causal=causal), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_without_its_far_keys_a_hybrid_is_the_window_in_blocks(causal):
    """The floor of a hybrid is a method: `local` with the same window and sinks, in blocks."""
    q, k, v = qkv(23)
    hybrid = build_attention("performer", **SHAPE, window=3, sinks=2).double()
    floor = build_attention("local", **SHAPE, window=3, sinks=2, shape="blocks").double()
    assert not torch.allclose(hybrid(q, k, v, causal=causal), floor(q, k, v, causal=causal))
    hybrid.far_H.fill_(-100)
    torch.testing.assert_close(hybrid(q, k, v, causal=causal), floor(q, k, v, causal=causal), rtol=0, atol=1e-12)


def test_calibration_sets_the_mass_of_the_far_keys():
    """With few features the estimate is too low on average (Jensen); with many it is right."""
    q, k, _ = qkv(64)
    few, many = (build_attention("performer", **SHAPE, window=2, num_features=m).double() for m in (8, 100_000))
    for attention in (few, many):
        attention.calibrate(q, k)
    assert (few.far_H > 0).all() and many.far_H.abs().max() < 0.05
    wanted, mask = few.far_H.clone(), torch.arange(64 + 7).repeat(len(q), 1) < 64
    few.calibrate(*(torch.nn.functional.pad(x, (0, 0, 0, 7), value=3.0) for x in (q, k)), mask)
    torch.testing.assert_close(few.far_H, wanted, rtol=0, atol=1e-12)
    assert "far_H" in few.state_dict() and "far_H" not in build_attention("performer", **SHAPE).state_dict()


@pytest.mark.parametrize("causal", [False, True])
def test_a_longer_window_brings_a_calibrated_hybrid_closer_to_exact_attention(causal):
    q, k, v = qkv(64)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def error(**options):
        total = 0
        for seed in range(8):
            attention = build_attention("performer", **SHAPE, num_features=M, seed=seed, **options).double()
            attention.calibrate(q, k)
            total += (attention(q, k, v, causal=causal) - exact).square().mean().item()
        return total

    assert error(window=16) < error(window=4) < error()


# Options in records


@pytest.mark.parametrize("name", ["performer", "darkformer"])
def test_new_options_leave_the_identity_of_committed_records_alone(name):
    record = json.loads(next(iter(sorted(RECORDS.glob(f"image/{name}/*/seed0.json")))).read_text())
    stored = record["model"]["attention_config"]
    assert stored_options(construct(attention_class(name).Config, stored, where="attention")) == stored
    changed = construct(attention_class(name).Config, stored | {"window": 8}, where="attention")
    assert stored_options(changed) == stored | {"window": 8}


# Head width 256, two threads


def test_calibration_at_width_256_with_two_threads_ends():
    """torch.linalg.inv of 4 x 256 x 256 matrices loops for ever in MKL 2024.2 once two threads are set."""
    code = """if True:
        import torch
        from lra.registry import build_attention
        torch.set_num_threads(2)
        q, k = torch.randn(2, 1, 4, 300, 256)
        options = {"align": "balance", "proposal": "variance_optimal", "init": "whitening", "num_features": 8}
        build_attention("darkformer", heads=4, head_dim=256, max_len=300, **options).calibrate(q, k)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, timeout=300, check=True)


# Defects of public packages


def performer(dtype=torch.float32, **options):
    return build_attention("performer", **SHAPE, **options).to(dtype)


def test_no_epsilon_flattens_sharp_attention():
    """performer-pytorch adds 1e-4 to features shifted by a maximum: with long keys it averages the values."""
    q, k, v = (4 * x if i < 2 else x for i, x in enumerate(qkv()))
    w = performer().w_HMD.double()
    out = performer()(q.float(), k.float(), v.float())
    wide = performer(torch.float64)(q, k, v)
    torch.testing.assert_close(out.double(), wide, rtol=0, atol=1e-4)

    def shifted(x, dims):
        x = D**-0.25 * x
        logits = torch.einsum("hmd,bhnd->bhnm", w, x)
        return torch.exp(logits - x.square().sum(-1, keepdim=True) / 2 - logits.amax(dims, keepdim=True)) + 1e-4

    kernel = shifted(q, (-1,)) @ shifted(k, (-1, -2)).mT
    assert (kernel @ v / kernel.sum(-1, keepdim=True) - wide).abs().max() > 0.1


def test_one_long_key_does_not_underflow_the_others():
    """A maximum over all positions, subtracted from each, sends every other feature to exp(-large) = 0."""
    q, k, v = qkv(dtype=torch.float32)
    wild = k.clone()
    wild[:, :, -1] *= 200  # weight exp(a.k - |k|^2 / 2), which is nothing
    out = performer()(q, wild, v)
    torch.testing.assert_close(
        out, performer()(q[:, :, :], k[:, :, :], v, torch.arange(N).expand(B, N) < N - 1), rtol=0, atol=1e-5
    )


def test_padding_does_not_take_part_in_any_stabiliser():
    q, k, v = qkv(dtype=torch.float32)
    mask = torch.arange(N).expand(B, N) < N - 2
    garbage = [torch.where(mask[:, None, :, None], x, 1e4 * torch.ones(())) for x in (q, k, v)]
    out, wanted = performer()(*garbage, mask), performer()(q, k, v, mask)
    assert torch.equal(out[:, :, : N - 2], wanted[:, :, : N - 2])


def test_statistics_are_wide_under_autocast():
    """|k|^2 / 2 rounded to bf16 is off by more than 1 at the scale of a trained model."""
    q, k, v = (x * s for x, s in zip(qkv(dtype=torch.float32), (6, 6, 1), strict=True))
    for name in ("performer", "darkformer"):
        attention = build_attention(name, **SHAPE)
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(q, k, v)
        torch.testing.assert_close(out, attention(q, k, v), rtol=0, atol=1e-6)

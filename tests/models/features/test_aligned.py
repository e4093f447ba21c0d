"""Alignment, geometry and proposals: the kernel stays, the variance falls, data is remembered and saved."""

import math
import warnings

import pytest
import torch

from lra.registry import build_attention
from models.features.projections import balance, moments, power, variance_optimal

B, H, N, D, M = 2, 3, 53, 5, 11
SHAPE = {"heads": H, "head_dim": D, "max_len": N}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(strength=1.0, n=N, condition=100.0):
    """q and k (B, H, n, D) around means of length 3, in directions whose variances differ `condition` times."""
    q, k = normal(2, B, H, n, D, seed=1)
    widths = condition ** -torch.linspace(0, 0.5, D).double()
    mean = torch.zeros(D).double()
    mean[0] = 3
    return strength * (q * widths + mean), strength * (k * widths.flip(0) + mean)


def build(name, calibrated=None, **options):
    attention = build_attention(name, **SHAPE, **options).double()
    if calibrated is not None:
        attention.calibrate(*calibrated)
    return attention.eval()


def expected_log_kernel(attention, q, k, scale):
    """log E exp(aq.q + ak.k + biases) over w ~ N(0, I), from the maps alone, up to a function of q: every
    projection is linear in w, so the mean of the exponential is that of a Gaussian."""
    D_HM = attention.w_HMD.shape[1]
    assert D_HM == D, "build with num_features = D: w is then replaced by the identity"
    attention.w_HMD.copy_(torch.eye(D))
    maps = attention.maps(k, scale)
    u = maps.aq_HMD @ q.mT  # (B, H, D, N): coefficients of w
    v = maps.ak_HMD @ maps.x_BHND.mT
    shift = maps.feature_bias_HM[..., None, None]  # linear in w as well
    total = u[..., :, None] + v[..., None, :] + shift
    return total.square().sum(-3) / 2 + maps.key_bias_BHN[..., None, :]


@pytest.mark.parametrize("align", ["none", "centre", "balance"])
def test_alignment_leaves_the_kernel_exactly_unchanged(align):
    """For any means and any invertible T, softmax of the expected kernel is softmax of s q.k."""
    q, k = normal(2, B, H, N, D, seed=2)
    attention = build("performer", align=align, num_features=D)
    with torch.no_grad():
        for i, name in enumerate(("mean_q_HD", "mean_k_HD")):
            if align != "none":
                getattr(attention, name).copy_(3 * normal(H, D, seed=3 + i))
        if align == "balance":
            T = normal(H, D, D, seed=5) + 2 * torch.eye(D)
            attention.Tk_HDD.copy_(T)
            attention.Tq_HDD.copy_(torch.linalg.inv(T).mT)
    for scale in (D**-0.5, 1.0):
        got = expected_log_kernel(attention, q, k, scale).softmax(-1)
        torch.testing.assert_close(got, (scale * q @ k.mT).softmax(-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("align", ["none", "centre", "balance"])
def test_a_target_norm_is_a_temperature_of_the_centred_kernel(align):
    q, k = skewed()
    attention = build("performer", (q, k), align=align, num_features=D, target_norm=0.1)
    norm = sum(attention.aligned(x, side).square().sum(-1).mean((0, 2)) for x, side in ((q, "q"), (k, "k")))
    torch.testing.assert_close(D**-0.5 * norm, torch.full((H,), 0.1).double())
    means = [getattr(attention, f"mean_{s}_HD", torch.zeros(H, D).double())[:, None] for s in "qk"]
    t2 = (attention.Tq_HDD.mT @ attention.Tk_HDD)[:, 0, 0][:, None, None]
    logits = t2 * (q - means[0]) @ (k - means[1]).mT + (means[0] @ k.mT)
    got = expected_log_kernel(attention, q, k, D**-0.5).softmax(-1)
    torch.testing.assert_close(got, (D**-0.5 * logits).softmax(-1), rtol=0, atol=1e-10)
    loose = build("performer", (q, k), align=align, target_norm=1e6)
    assert all(torch.allclose(x, torch.eye(D).double()) or align == "balance" for x in (loose.Tq_HDD, loose.Tk_HDD))
    torch.testing.assert_close(loose.Tq_HDD.mT @ loose.Tk_HDD, torch.eye(D).double().expand(H, D, D))


def test_balance_gives_both_sides_one_covariance_and_the_least_total_norm():
    Lq, Lk = (x @ x.mT for x in normal(2, H, D, 2 * D, seed=4))
    T = balance(Lq, Lk)
    ridged = [L + 0.03 * L.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(D) for L in (Lq, Lk)]
    inverse = torch.linalg.inv(T)
    torch.testing.assert_close(inverse @ ridged[0] @ inverse.mT, T @ ridged[1] @ T.mT)
    trace = lambda X: X.diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    root = power(ridged[1], 0.5)
    least = 2 * trace(power(root @ ridged[0] @ root, 0.5))
    torch.testing.assert_close(trace(inverse @ ridged[0] @ inverse.mT) + trace(T @ ridged[1] @ T.mT), least)


def relative_variance(align, q, k):
    """Of the estimate of exp(s q.k) by one feature, median over pairs: exp(|u|^2) - 1, with w.u the exponent."""
    attention = build("performer", (q, k), num_features=D, align=align)
    attention.w_HMD.copy_(torch.eye(D))
    m = attention.maps(k, D**-0.5)
    u = m.aq_HMD @ q.mT + m.ak_HMD @ m.x_BHND.mT + m.feature_bias_HM[..., None]
    return (u.square().sum(-2).exp() - 1).median().item()


def test_alignment_cuts_the_variance_a_hundredfold_on_skewed_data():
    """Mean shift 3, condition number 100."""
    plain, centred, balanced = (relative_variance(align, *skewed()) for align in ("none", "centre", "balance"))
    assert plain > 100 * centred > 100 * balanced, (plain, centred, balanced)


@pytest.mark.parametrize("proposal", ["isotropic", "variance_optimal"])
@pytest.mark.parametrize("align", ["none", "balance"])
def test_features_of_the_aligned_kernel_are_unbiased(align, proposal):
    """10^4 draws of one feature: the mean is within 4 standard errors of the kernel."""
    q, k = (0.25 * x for x in skewed(n=2))
    draws = 10_000
    attention = build("darkformer", (q, k), num_features=draws, align=align, proposal=proposal, orthogonal=False)
    scale = D**-0.5
    m = attention.maps(k, scale)
    r = m.aq_HMD @ q.mT + m.feature_bias_HM[..., None]
    l = m.ak_HMD @ m.x_BHND.mT + m.key_bias_BHN[..., None, :]  # noqa: E741
    one, other = r[..., 0].exp(), l[..., 1].exp()
    q0, k1 = q[..., 0, :], k[..., 1, :]
    factor = attention.aligned(q, "q")[..., 0, :].square().sum(-1) * scale / 2
    log_kernel = scale * (q0 * k1).sum(-1)
    if align != "none":
        factor = factor - scale * ((q0 - attention.mean_q_HD) * attention.mean_k_HD).sum(-1)
    estimates = one * other * (-factor - log_kernel).exp()[..., None]
    z = (estimates.mean(-1) - 1) / (estimates.std(-1) / draws**0.5)
    assert z.abs().max() < 4, z


def test_the_variance_optimal_proposal_has_the_closed_form_variance():
    """E[Z^2] = prod (1 - 2t)^-1 against prod ((1 - 6t)(1 + 2t))^-1/2 for isotropic draws (theorem 3.2)."""
    t = torch.tensor([0.1, 0.05, 0.02, 0.08, 0.12]).double()
    Lambda = torch.diag(t)
    root = variance_optimal(Lambda[None], "test")[0]
    torch.testing.assert_close(root @ root, torch.diag((1 + 2 * t) / (1 - 2 * t)))
    draws = 2_000_000
    q, k = (t.sqrt() * x for x in normal(2, draws, D, seed=6))
    z = normal(draws, D, seed=8)
    for w, log_ratio, wanted in (
        (z, 0.0, ((1 - 6 * t) * (1 + 2 * t)).rsqrt().prod()),
        (z @ root, (z.square() - (z @ root).square()).sum(-1) / 2 + torch.logdet(root), (1 / (1 - 2 * t)).prod()),
    ):
        logs = (w * (q + k)).sum(-1) - (q.square() + k.square()).sum(-1) / 2
        second = torch.exp(2 * (logs + log_ratio))
        assert abs(second.mean() - wanted) < 4 * second.std() / draws**0.5, wanted


def test_an_eigenvalue_of_one_half_is_clipped_with_a_warning_that_gives_it():
    with pytest.warns(UserWarning, match=r"darkformer, layer 0: largest eigenvalue 2 of Lambda clipped to 0.45"):
        root = variance_optimal(torch.diag(torch.tensor([0.1, 2.0]).double())[None], "darkformer, layer 0")
    torch.testing.assert_close(root[0, 1, 1] ** 2, torch.tensor(1.9 / 0.1).double())


def error_to_exact(attention, q, k, v, **arguments):
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return (attention(q, k, v, **arguments) - exact).square().mean().item()


@pytest.mark.parametrize("name", ["optimal", "darkformer", "performer"])
def test_calibration_brings_the_output_closer_to_exact_attention(name):
    q, k = skewed(0.7)
    v = normal(B, H, N, D, seed=9)
    options = {
        "optimal": {"align": "centre"},
        "darkformer": {"align": "balance", "proposal": "variance_optimal"},
        "performer": {"align": "balance"},
    }[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plain = [error_to_exact(build("performer", seed=s, num_features=M), q, k, v) for s in range(20)]
        better = [error_to_exact(build(name, (q, k), seed=s, num_features=M, **options), q, k, v) for s in range(20)]
    assert sum(better) < 0.5 * sum(plain)


def test_optimal_sampling_beats_gaussian_sampling_on_the_data_it_saw():
    q, k = (0.5 * x for x in skewed())
    v = normal(B, H, N, D, seed=9)
    plain, better = (
        sum(error_to_exact(build(name, (q, k), seed=s, num_features=64), q, k, v) for s in range(20))
        for name in ("performer", "optimal")
    )
    assert better < 0.5 * plain


def test_whitening_keeps_the_mean_norm_and_evens_out_the_directions():
    q, k = skewed()
    attention = build("darkformer", (q, k), init="whitening", align="centre")
    both = torch.cat([attention.aligned(x, side) for x, side in ((q, "q"), (k, "k"))], 2)
    _, covariance = moments(both)
    centred = torch.cat([x - x.mean((0, 2), keepdim=True) for x in (q, k)], 2)
    trace = lambda X: X.diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    torch.testing.assert_close(trace(covariance), trace(moments(centred)[1]), rtol=0.05, atol=0)
    values = torch.linalg.eigvalsh(covariance)
    assert (values[:, -1] / values[:, 0]).max() < 3  # not 1: the ridge
    low = build("darkformer", (q, k), init="whitening", align="centre", rank=2)
    assert low.G_HDD.shape == (H, 2, D) and low.aligned(q, "q").shape == (B, H, N, 2)
    small = torch.linalg.eigh(moments(centred)[1])[1][..., :-2]  # it reads the two directions in which most happens
    assert (low.G_HDD @ small).norm() < 1e-3 * low.G_HDD.norm()


def test_darkformer_starts_aligned_at_its_temperature_and_learns_it_from_there():
    q, k = skewed()
    fixed = build("performer", (q, k), align="balance", target_norm=0.1)
    learned = build("darkformer", (q, k), align="balance", target_norm=0.1, init="aligned")
    v = normal(B, H, N, D, seed=9)
    torch.testing.assert_close(learned(q, k, v), fixed(q, k, v), rtol=0, atol=1e-6)
    assert not torch.allclose(learned.G_HDD, torch.eye(D).double()) and learned.G_HDD.requires_grad


def test_shared_heads_have_one_geometry():
    attention = build("darkformer", share_heads=True)
    assert attention.G_HDD.shape == (1, D, D)
    assert attention(*skewed(), normal(B, H, N, D)).shape == (B, H, N, D)


# What a training run sees


def train(attention, steps, start=0):
    attention.train()
    for step in range(start, steps):
        attention.before_step(step)
        q, k = (x + step for x in skewed(0.3))
        attention(q.float(), k.float(), normal(B, H, N, D).float(), torch.arange(N).expand(B, N) < N - 5)
    return attention


ADAPTING = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("performer", {"align": "balance"}),
        ("darkformer", {"init": "whitening", "redraw_every": 2}),
        ("optimal", {"redraw_every": 2}),
    ],
)


@ADAPTING
def test_training_calibrates_once_before_step_one(name, options):
    attention = build_attention(name, **SHAPE, **options)
    assert not train(attention, 1).calibrated
    train(attention, 2, 1)
    before = {key: x.clone() for key, x in attention.state_dict().items() if key[:2] in ("Tq", "Tk", "G_")}
    assert attention.calibrated
    train(attention, 6, 2)
    after = attention.state_dict()
    assert all(torch.equal(after[key], x) for key, x in before.items())


@ADAPTING
def test_a_resumed_run_adapts_as_an_uninterrupted_one(name, options):
    for stop in (1, 3):
        whole, first, resumed = (build_attention(name, **SHAPE, **options) for _ in range(3))
        train(whole, 6)
        resumed.load_state_dict(train(first, stop).state_dict())
        train(resumed, 6, stop)
        assert all(torch.equal(x, resumed.state_dict()[key]) for key, x in whole.state_dict().items())


def test_an_explicit_calibration_is_not_overwritten_by_training():
    attention = build_attention("performer", **SHAPE, align="centre")
    attention.calibrate(*(x.float() for x in skewed()))
    mean = attention.mean_q_HD.clone()
    train(attention, 3)
    assert torch.equal(attention.mean_q_HD, mean)


def test_optimal_sampling_follows_the_data_at_each_redraw():
    attention = train(build_attention("optimal", **SHAPE, redraw_every=2), 4)
    w, b = attention.w_HMD.clone(), attention.b_HM.clone()
    train(attention, 5, 4)
    assert not torch.equal(attention.w_HMD, w) and not torch.equal(attention.b_HM, b)


def test_data_is_remembered_only_in_the_steps_before_it_is_used():
    for name, options, wanted in (("performer", {"align": "centre"}, [0]), ("optimal", {"redraw_every": 3}, [0, 2, 5])):
        attention, copied = build_attention(name, **SHAPE, **options), []
        for step in range(7):
            before = None if step == 0 else attention.seen_q_HSD.clone()
            train(attention, step + 1, step)
            if before is None or not torch.equal(before, attention.seen_q_HSD):
                copied.append(step)
        assert copied == wanted, name


def test_padding_is_never_part_of_what_is_remembered():
    attention = build_attention("performer", **SHAPE, align="centre").train()
    q, k = (x.float() for x in skewed())
    mask = (torch.arange(N) + torch.arange(B)[:, None]) % 3 != 1
    padded = [x.masked_fill(~mask[:, None, :, None], 1e6) for x in (q, k)]
    attention.before_step(0)
    attention(*padded, k, mask)
    assert attention.seen_q_HSD.abs().sum() > 0
    assert attention.seen_q_HSD.abs().max() < 1e3 and attention.seen_k_HSD.abs().max() < 1e3
    attention.calibrate(*padded, mask)
    wanted = torch.stack([q[:, h][mask].mean(0) for h in range(H)])
    torch.testing.assert_close(attention.mean_q_HD, wanted)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("performer", {"learn_mean": True}, "learn_mean=True needs align=centre or align=balance; got align=none"),
        ("performer", {"target_norm": -1.0}, r"target_norm must be 0 \(keep the kernel\) or more; got -1.0"),
        ("darkformer", {"rank": 6}, "rank must be 0 to the head width 5; got 6"),
        ("darkformer", {"rank": -1}, "rank must be 0 to the head width 5; got -1"),
        ("darkformer", {"init": "aligned"}, "init=aligned needs align=centre or align=balance"),
        ("optimal", {"pool": 0}, "pool must be at least 1; got 0"),
        ("lfk", {"num_features": 0}, "num_features must be at least 1; got 0"),
    ],
)
def test_bad_options_are_refused_with_their_value(name, options, said):
    with pytest.raises(ValueError, match=said):
        build_attention(name, **SHAPE, **options)


def test_lfk_learns_its_projections_from_performers_draws():
    lfk, performer = (build_attention(name, **SHAPE, seed=3) for name in ("lfk", "performer"))
    assert torch.equal(lfk.w_HMD, performer.w_HMD) and isinstance(lfk.w_HMD, torch.nn.Parameter)
    q, k = (x.float() for x in skewed(0.3))
    torch.testing.assert_close(lfk(q, k, q), performer(q, k, q))
    assert math.isclose(sum(p.numel() for p in lfk.parameters()), H * 64 * D)

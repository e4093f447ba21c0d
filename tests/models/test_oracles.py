"""Public packages as oracles: same projections or parameters, same outputs and gradients in float64."""

import warnings

import pytest
import torch

from lra.registry import build_attention
from tests.models.cases import assert_same, outputs_and_gradients

B, H, N, D, M = 2, 3, 7, 5, 11
SHAPE = {"heads": H, "head_dim": D, "max_len": N}


def oracle(module, attribute):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import, inside packages of 2020
        found = pytest.importorskip(module, reason=f"needs {module}: pip install -r requirements-dev.txt")
        return getattr(found, attribute)


def qkv(strength=1.0):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.requires_grad_() for x in (strength * q, strength * k, v)]


def ours(name, **options):
    torch.manual_seed(0)
    return build_attention(name, **SHAPE, **options).double()


def share_projection_between_heads(attention):
    """performer-pytorch and darkformer-pytorch have one projection (M, D) for all heads."""
    attention.w_HMD.copy_(attention.w_HMD[:1].expand_as(attention.w_HMD).clone())
    return attention.w_HMD[0]


def test_performer_equals_performer_pytorch_without_its_epsilon():
    softmax_kernel = oracle("performer_pytorch.performer_pytorch", "softmax_kernel")
    linear_attention = oracle("performer_pytorch.performer_pytorch", "linear_attention")
    attention, (q, k, v) = ours("performer", num_features=M), qkv()
    w_MD = share_projection_between_heads(attention)

    def phi(x, is_query):
        return softmax_kernel(x, projection_matrix=w_MD, is_query=is_query, eps=0)

    theirs = linear_attention(phi(q, True), phi(k, False), v)
    # Their maximum over all positions underflows nothing at this size, so that only rounding is left.
    wanted = outputs_and_gradients(theirs, None, q=q, k=k, v=v)
    assert_same(outputs_and_gradients(attention(q, k, v), None, q=q, k=k, v=v), wanted, 1e-11)


def test_performer_pytorch_as_it_is_called_differs_by_its_epsilon():
    """FastAttention adds 1e-4 to every feature: about 1e-3 for short vectors, and far more for long ones."""
    FastAttention = oracle("performer_pytorch.performer_pytorch", "FastAttention")
    attention = ours("performer", num_features=M)
    theirs = FastAttention(D, M).double()
    theirs.projection_matrix.copy_(share_projection_between_heads(attention))
    short, long = qkv(0.5), qkv(4.0)
    torch.testing.assert_close(attention(*short), theirs(*short), rtol=0, atol=1e-2)
    assert (attention(*long) - theirs(*long)).abs().max() > 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_darkformer_equals_darkformer_pytorch(masked):
    Oracle = oracle("darkformer_pytorch.attention", "DarkformerKernelAttention")
    attention, (q, k, v) = ours("darkformer", num_features=M), qkv()
    theirs = Oracle(D, H, num_features=M).double()
    mask = torch.arange(N) < torch.tensor([[N - 1], [4]]) if masked else None
    with torch.no_grad():
        attention.G_HDD += 0.3 * torch.randn(H, D, D)
        theirs.random_features.geometry.copy_(attention.G_HDD)
        theirs.random_features.projection_matrix.copy_(share_projection_between_heads(attention))
    wanted = outputs_and_gradients(
        theirs(q, k, v, key_mask=mask), mask, q=q, k=k, v=v, G=theirs.random_features.geometry
    )
    assert_same(outputs_and_gradients(attention(q, k, v, mask), mask, q=q, k=k, v=v, G=attention.G_HDD), wanted, 1e-11)


@pytest.mark.parametrize("length", [N, N - 2])
@pytest.mark.parametrize("share", ["heads", "kv"])
def test_linformer_equals_linformer(share, length):
    """Their module around ours: projections without bias, P and R shared by the heads, stored (N, K)."""
    Oracle = oracle("linformer.linformer", "LinformerSelfAttention")
    torch.manual_seed(0)
    attention, theirs = (ours("linformer", projected_length=4, share=share), Oracle(H * D, N, k=4, heads=H).double())
    x = torch.randn(B, length, H * D, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        theirs.proj_k.copy_(attention.project_k_HKN[0].T)
        theirs.proj_v.copy_(attention.project_v_HKN[0].T)

    def split(y):
        return y.view(B, length, H, D).transpose(1, 2)

    out = attention(split(theirs.to_q(x)), split(theirs.to_k(x)), split(theirs.to_v(x)))
    got = theirs.to_out(out.transpose(1, 2).reshape(B, length, H * D))
    wanted = theirs(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    dx, dk, dv = torch.autograd.grad((weight * wanted).sum(), [x, theirs.proj_k, theirs.proj_v])
    mine = torch.autograd.grad(
        (weight * got).sum(), [x, attention.project_k_HKN, *([attention.project_v_HKN] if share == "heads" else [])]
    )
    expected = [dx, dk.T[None], dv.T[None]] if share == "heads" else [dx, (dk + dv).T[None]]
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def nystrom_attention(heads, q, k, v, mask=None, **options):
    """Their module without its projections, which have no place for q, k and v of one's own."""
    Oracle = oracle("nystrom_attention.nystrom_attention", "NystromAttention")
    theirs = Oracle(heads * D, D, heads, residual=False, **options).double()

    def flat(x):
        return x.transpose(1, 2).flatten(2)

    theirs.to_qkv = theirs.to_out = torch.nn.Identity()
    out = theirs(torch.cat([flat(q), flat(k), flat(v)], -1), mask)
    return out.unflatten(-1, (heads, D)).transpose(1, 2)


@pytest.mark.parametrize("landmarks", [2, 4, 8])
def test_nystrom_equals_nystrom_attention_where_it_has_one_row_and_head(landmarks):
    """More, and its first guess at the inverse is not that of the paper; a length that K divides, no mask."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 16, D, dtype=torch.float64).requires_grad_() for _ in range(3))
    options = {"heads": 1, "head_dim": D, "max_len": 16}
    attention = build_attention("nystrom", num_landmarks=landmarks, **options).double()
    wanted = outputs_and_gradients(nystrom_attention(1, q, k, v, num_landmarks=landmarks), None, q=q, k=k, v=v)
    assert_same(outputs_and_gradients(attention(q, k, v), None, q=q, k=k, v=v), wanted, 1e-11)


def test_nystrom_equals_nystrom_attention_once_its_inverse_has_converged():
    q, k, v = qkv()
    attention = ours("nystrom", num_landmarks=N, iterations=40)
    theirs = nystrom_attention(H, q, k, v, num_landmarks=N, pinv_iterations=40)
    wanted = outputs_and_gradients(theirs, None, q=q, k=k, v=v)
    assert_same(outputs_and_gradients(attention(q, k, v), None, q=q, k=k, v=v), wanted, 1e-7)


def test_nystrom_attention_lets_a_row_change_with_the_rest_of_its_batch_and_ours_does_not():
    """Its first guess divides by maxima over batch and heads (section 3.2 of the paper: of one matrix)."""
    q, k, v = (x.detach() for x in qkv())
    alone = [x[:1] for x in (q, k, v)]
    with_another = [torch.cat([x[:1], 5 * x[1:]]) for x in (q, k, v)]
    attention = ours("nystrom", num_landmarks=N)
    assert torch.equal(attention(*with_another)[:1], attention(*alone))
    theirs = [nystrom_attention(H, *x, num_landmarks=N)[:1] for x in (with_another, alone)]
    assert (theirs[0] - theirs[1]).abs().max() > 1e-2

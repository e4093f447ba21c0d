"""Reformer: what its hashes find, strictly causal windows, rounds put together, redraws."""

import pytest
import torch
import torch.nn.functional as F

from lra.registry import build_attention
from models.attention.reformer import MOST_BUCKETS, naive_reformer

B, H, N, D = 2, 3, 61, 5
SHAPE = {"heads": H, "head_dim": D, "max_len": N}
SMALL = {"num_keys": 12, "rounds": 2, "buckets": 6}  # chunk 3 against 61 tokens: the hashes decide


def qkv(*, dtype=torch.float64, strength=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, B, H, N, D, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (strength * q, strength * k, v)]


def build(dtype=torch.float64, **options):
    return build_attention("reformer", **SHAPE, **options).to(dtype).eval()


def exact(q, k, v, causal=False, scale=D**-0.5):
    """All tokens but oneself, with shared queries and keys of unit length."""
    s, n = (q + k) / 2, torch.arange(q.shape[2])
    others = n[None] < n[:, None] if causal else n[None] != n[:, None]
    others[0, 0] |= causal  # the first has only itself
    return F.scaled_dot_product_attention(s, F.normalize(s, dim=-1), v, attn_mask=others, scale=scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [SMALL, SMALL | {"rounds": 3, "buckets": 2}, SMALL | {"buckets": 1}])
def test_equals_its_reference_where_the_hashes_decide(options, masked, causal):
    attention, (q, k, v) = build(**options), qkv()
    mask = (torch.arange(N) + torch.arange(B)[:, None]) % 4 != 1 if masked else None
    for slopes in (None, torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)):
        attention.add_alibi(slopes)
        out = attention(q, k, v, mask, causal=causal)
        wanted = naive_reformer(attention, q, k, v, mask, causal=causal)
        real = slice(None) if mask is None else mask[:, None].expand(B, H, N)
        torch.testing.assert_close(out[real], wanted[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_one_bucket_and_a_chunk_for_all_are_exact_attention(causal):
    attention, (q, k, v) = build(num_keys=4 * N, rounds=2, buckets=1), qkv()
    out = attention(q, k, v, causal=causal)
    torch.testing.assert_close(out, exact(q, k, v, causal), rtol=0, atol=1e-12)


def test_error_to_exact_attention_falls_with_rounds_on_clustered_data():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 8, generator=generator)
    which = torch.randint(16, (1, 2, 256), generator=generator)
    s = (6 * F.normalize(centres[which] + 0.1 * torch.randn(1, 2, 256, 8, generator=generator), dim=-1)).double()
    v = torch.randn(1, 2, 256, 8, generator=generator).double()
    wanted, errors = exact(s, s, v, scale=1.0), []
    for rounds in (1, 2, 4, 8):
        options = {"num_keys": 2 * 32 * rounds, "rounds": rounds, "buckets": 16}
        builds = [
            build_attention("reformer", heads=2, head_dim=8, max_len=256, seed=seed, **options).double()
            for seed in range(8)
        ]
        assert all(attention.chunk == 32 for attention in builds)
        errors.append(sum((a(s, s, v, scale=1.0) - wanted).square().mean() for a in builds))
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[0] > 4 * errors[3], errors


# Causality


def papers_chunks(s, w, buckets, chunk):
    """Which keys equations 4 and 5 let a query see, causal, one head and round: its bucket in two chunks."""
    n = torch.arange(len(s))
    bucket = torch.cat([s @ w.T, -s @ w.T], 1)[:, :buckets].argmax(1)
    place = (bucket * len(s) + n).argsort().argsort() // chunk
    back = place[:, None] - place
    return (bucket[:, None] == bucket) & (back >= 0) & (back <= 1) & (n < n[:, None])


def test_the_papers_chunks_show_later_tokens_and_these_windows_do_not():
    """Sorting by bucket puts later tokens in front: they move the cuts between an earlier query and its keys."""
    attention, t = build(**SMALL | {"rounds": 1, "num_keys": 6}), N - 9
    plain, other = qkv(), qkv(seed=1)
    changed = [torch.cat([x[:, :, :t], 30 * y[:, :, t:]], 2) for x, y in zip(plain, other, strict=True)]
    seen = []
    for q, k, _ in (plain, changed):
        w = attention.w_HMD[0].double()
        seen.append(papers_chunks((q[0, 0] + k[0, 0]) / 2, w, attention.buckets, attention.chunk)[:t, :t])
    assert (seen[0] != seen[1]).any()
    outs = [attention(*x, causal=True)[:, :, :t] for x in (plain, changed)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)


# What a query looks at


def keys_of(attention, q, k, v, causal):
    """Whether out_i depends on v_n, (B, H, N, N)."""
    eye = torch.eye(N, dtype=v.dtype).expand(B, H, N, N)
    parts = [attention(q, k, eye[..., i : i + D], causal=causal) for i in range(0, N - D + 1, D)]
    return torch.cat([*parts, attention(q, k, eye[..., -D:], causal=causal)[..., -(N % D) :]], -1) > 0


@pytest.mark.parametrize("causal", [False, True])
def test_looks_at_num_keys_at_most_and_at_itself_only_when_alone(causal):
    attention, (q, k, v) = build(**SMALL), qkv()
    seen = keys_of(attention, q, k, v, causal)
    counts, itself = seen.sum(-1), seen.diagonal(dim1=-2, dim2=-1)
    hashed = slice(attention.buckets + 1, None)
    assert counts[..., hashed].max() <= SMALL["num_keys"] // (2 if causal else 1)
    assert (counts >= 1).all() and (counts[itself] == 1).all()
    if causal:
        assert not seen.triu(1).any() and (counts[..., 0] == 1).all()
        wanted = torch.arange(1, attention.buckets + 1).expand(B, H, -1)
        assert torch.equal(counts[..., 1 : attention.buckets + 1], wanted)


def test_a_token_that_shares_no_bucket_gets_its_own_value():
    q, k, v = qkv()
    q, k = q.abs(), k.abs()
    q[:, :, 7], k[:, :, 7] = -q[:, :, 7], -k[:, :, 7]
    attention = build(**SMALL | {"buckets": 2})
    attention.w_HMD.abs_()  # the sign of x.w is that of x
    torch.testing.assert_close(attention(q, k, v)[:, :, 7], v[:, :, 7], rtol=0, atol=0)
    assert not torch.allclose(attention(q, k, v)[:, :, 8], v[:, :, 8])


@pytest.mark.parametrize("causal", [False, True])
def test_a_key_found_by_several_rounds_counts_once(causal):
    once, thrice = build(num_keys=8, rounds=1, buckets=6), build(num_keys=24, rounds=3, buckets=6)
    thrice.w_HMD.copy_(once.w_HMD.repeat(1, 3, 1))
    torch.testing.assert_close(thrice(*qkv(), causal=causal), once(*qkv(), causal=causal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_half_precision_is_the_wide_result_rounded(half, strength):
    inputs, attention = qkv(dtype=half, strength=strength), build(torch.float32, **SMALL)
    with torch.autocast("cpu", half):
        out = attention(*inputs)
    wanted = naive_reformer(attention, *(x.double() for x in inputs))
    assert out.dtype == half and (out.double() - wanted).norm() / wanted.norm() < 2e-2


# Buckets and hashes


def test_buckets_follow_from_max_len_and_never_from_the_batch():
    sizes = [build_attention("reformer", heads=1, head_dim=4, max_len=n).buckets for n in (5, 64, 512, 10**5)]
    assert sizes == [2, 4, 32, MOST_BUCKETS]


def test_hashes_are_redrawn_at_multiples_in_training_steps_and_saved():
    attention = build(**SMALL, redraw_every=3)
    drawn = [attention.w_HMD.clone()]
    for step in range(8):
        attention.before_step(step)
        if not torch.equal(attention.w_HMD, drawn[-1]):
            drawn.append(attention.w_HMD.clone())
            assert step in (3, 6)
    assert len(drawn) == 3 and attention.redraws == 2
    resumed = build(**SMALL, redraw_every=3)
    resumed.load_state_dict(attention.state_dict())
    resumed.before_step(8)
    assert torch.equal(resumed.w_HMD, drawn[-1])
    fixed = build(**SMALL, redraw_every=0)
    fixed.before_step(5)
    assert torch.equal(fixed.w_HMD, drawn[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds must be at least 1; got 0"),
        ({"rounds": 4, "num_keys": 7}, "num_keys must be at least 2 x 4 rounds; got 7"),
        ({"buckets": 3}, r"buckets must be 0 \(automatic\), 1 or even; got 3"),
        ({"buckets": -2}, r"buckets must be 0 \(automatic\), 1 or even; got -2"),
        ({"redraw_every": -1}, "redraw_every must be 0"),
    ],
)
def test_options_out_of_range_are_refused_with_the_value(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)

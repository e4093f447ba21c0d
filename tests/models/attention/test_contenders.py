"""Hedgehog, Mamba-2 and Gated DeltaNet: the papers' own formulas, memory, and the two directions."""

import pytest
import torch

from tests.models.cases import Case, Setting, inputs

N, D = 131, 5  # three chunks, the last one incomplete
SETTING = Setting((2, 3, N, D), False)


def prepared(name):
    attention = Case(name).build(SETTING)
    return attention, *(x.detach() for x in inputs(SETTING))


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_the_first_half_of_the_heads_sees_the_past_and_the_second_the_future(name):
    attention, q, k, v = prepared(name)
    at, out = 70, attention(q, k, v)
    # A token's time and share are read from v of all heads, so only k changes.
    moved = attention(q, k.index_fill(2, torch.tensor(at), 2.0), v)
    differs = (moved - out).abs().amax((0, 3)) > 1e-9
    assert not differs[:2, :at].any() and differs[:2, at : at + 3].all()
    assert not differs[2, at + 1 :].any() and differs[2, at - 2 : at + 1].all()
    causal = attention(q, k, v, causal=True)
    torch.testing.assert_close(out[:, :2], causal[:, :2])
    torch.testing.assert_close(out[:, 2:], attention(*(x.flip(2) for x in (q, k, v)), causal=True)[:, 2:].flip(2))


def test_mamba2_equals_the_masked_matrix_of_its_paper():
    """Listing 1 of arXiv 2405.21060: L = exp(segsum(A)), Y = (L o C B^T) X, with X and A times the step."""
    attention, q, k, v = prepared("mamba2")
    step, log_decay = attention.gate(v)
    segments = log_decay[..., None].expand(-1, -1, -1, N).tril(-1).cumsum(2)  # [i, n]: the sum over n + 1 ... i
    L = segments.masked_fill(~torch.ones(N, N).bool().tril(), -torch.inf).exp()
    wanted = (L * (q @ k.transpose(2, 3)) * D**-0.5) @ (step[..., None] * v) + attention.skip_H[:, None, None] * v
    torch.testing.assert_close(attention(q, k, v, causal=True), wanted)


def test_gated_deltanet_equals_the_recurrence_of_its_reference_code():
    """`naive_recurrent_gated_delta_rule` of flash-linear-attention: decay, read, replace."""
    attention, q, k, v = prepared("gated_deltanet")
    g, v_BNE = attention.gate(v)[1], v.transpose(1, 2).flatten(2)
    beta = (v_BNE @ attention.weight_HE.T + attention.bias_H).sigmoid().transpose(1, 2)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    S, outs = q.new_zeros(2, 3, D, D), []
    for i in range(N):
        S = S * g[:, :, i, None, None].exp()
        read = (S * k[:, :, i, :, None]).sum(-2)
        S = S + k[:, :, i, :, None] * ((v[:, :, i] - read) * beta[:, :, i, None])[..., None, :]
        outs.append((q[:, :, i, :, None] * S).sum(-2))
    torch.testing.assert_close(attention(*prepared("gated_deltanet")[1:], causal=True), torch.stack(outs, 2))


def test_gated_deltanet_keeps_the_last_value_of_a_key_where_a_sum_keeps_all():
    attention = Case("gated_deltanet").build(SETTING, trained=False)
    attention.bias_H.data.fill_(40.0)  # all of the old value gives way
    attention.gate.bias_H.data.fill_(-40.0)  # no time passes
    keys = torch.eye(D).double()[torch.arange(N) % D].expand(2, 3, N, D)
    v = inputs(SETTING)[2].detach()
    out = attention(keys, keys, v, causal=True)
    torch.testing.assert_close(out, v)  # each key asks right after it was written
    late = attention(keys.roll(1, 2), keys, v, causal=True)[:, :, D:]  # and one step later
    torch.testing.assert_close(late, v[:, :, D - 1 : -1])


def test_hedgehog_starts_from_softmaxes_of_its_inputs_and_their_negations():
    attention, q, k, v = Case("hedgehog").build(SETTING, trained=False), *(x.detach() for x in inputs(SETTING))
    phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k))
    weight = phi_q @ phi_k.transpose(2, 3)
    torch.testing.assert_close(attention(q, k, v), weight @ v / weight.sum(-1, keepdim=True))


@pytest.mark.parametrize("causal", [False, True])
def test_hedgehog_has_a_weight_for_every_key_however_spiky_its_features(causal):
    attention, v = Case("hedgehog").build(SETTING, torch.float32), torch.full(SETTING.size, 3.0)
    q, k = (1e4 * x.float() for x in inputs(SETTING)[:2])
    torch.testing.assert_close(attention(q, k, v, causal=causal), v)

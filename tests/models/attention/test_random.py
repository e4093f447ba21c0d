"""Random attention: its weights are those of the stated draws."""

import math

import torch

from lra.registry import build_attention

N, D = 211, 16


def log_weights(max_len=N, n=N, **shape):
    """Logarithms of the weights (H, N, N), read off with one-hot values, D columns at a time."""
    attention = build_attention("random", heads=2, head_dim=D, max_len=max_len, **shape)
    columns = [
        attention(*(x.expand(1, 2, n, D),) * 3)[0]
        for x in torch.nn.functional.pad(torch.eye(n), (0, -n % D)).split(D, 1)
    ]
    return torch.cat(columns, -1)[..., :n].log()


def test_weights_are_a_softmax_of_logits_with_variance_one():
    logs = log_weights()
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(2, N))
    logits = logs - logs.mean(-1, keepdim=True)  # a softmax forgets a constant in each row
    assert abs(logits.std() - 1) < 0.1
    # Rows, columns and heads are uncorrelated: 4 standard errors of a correlation of rank D.
    bound = 4 / math.sqrt(N * D)
    for a, b in ((logits[:, :-1], logits[:, 1:]), (logits[..., :-1], logits[..., 1:]), logits):
        assert abs((a * b).mean()) < bound


def test_a_position_keeps_its_draws_at_every_length_and_repeats_them_beyond_max_len():
    short, long = log_weights(max_len=13, n=7), log_weights(max_len=13, n=17)

    def ratios(logs):
        return logs[..., :6] - logs[..., 1:7]

    torch.testing.assert_close(ratios(long[:, :7]), ratios(short), rtol=0, atol=1e-4)
    torch.testing.assert_close(ratios(long[:, 13:]), ratios(long[:, :4]), rtol=0, atol=1e-4)


def test_scale_widens_the_logits():
    attention = build_attention("random", heads=2, head_dim=D, max_len=N)
    v = torch.randn(1, 2, N, D)
    torch.testing.assert_close(attention(v, v, v, scale=0.0), v.mean(2, keepdim=True).expand_as(v))
    assert not torch.allclose(attention(v, v, v, scale=1.0), attention(v, v, v))

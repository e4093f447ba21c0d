"""The chunked head against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from models.gemma.loss import Head, cross_entropy, reference, score

T, E, V = 19, 7, 43


def inputs(softcap=None):
    torch.manual_seed(2)
    hidden, weight = torch.randn(T, E, dtype=torch.float64), torch.randn(V, E, dtype=torch.float64)
    return hidden, Head(weight, softcap), torch.randint(0, V, (T,))


def plain(hidden, head):
    logits = hidden @ head.weight_VE.T
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_loss_and_gradients_equal_the_plain_form(softcap, chunk):
    hidden, head, targets = inputs(softcap)
    hidden.requires_grad_(), head.weight_VE.requires_grad_()
    expected = F.cross_entropy(plain(hidden, head), targets, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, (hidden, head.weight_VE))
    loss, correct = cross_entropy(hidden, head, targets, chunk)
    found = torch.autograd.grad(3 * loss, (hidden, head.weight_VE))
    torch.testing.assert_close(loss, expected.float())
    assert correct == (plain(hidden, head).argmax(-1) == targets).sum()
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, atol=1e-5, rtol=1e-5)


def test_frozen_weight_gets_no_gradient_and_evaluation_makes_none():
    hidden, head, targets = inputs()
    loss, _ = cross_entropy(hidden.requires_grad_(), head, targets)
    loss.backward()
    assert hidden.grad is not None and head.weight_VE.grad is None
    with torch.no_grad():
        assert not cross_entropy(hidden, head, targets)[0].requires_grad


def test_scores_equal_the_plain_form_and_divergence_needs_no_second_logits():
    hidden, head, targets = inputs()
    other = hidden + torch.randn_like(hidden)
    loss, correct, kl = score(other, head, targets, reference(hidden, head, 4), 5)
    log_p, log_q = (plain(h, head).log_softmax(-1) for h in (hidden, other))
    torch.testing.assert_close(loss, F.nll_loss(log_q, targets, reduction="none").float())
    assert torch.equal(correct, log_q.argmax(-1) == targets)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).float()
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-4)
    assert score(hidden, head, targets, reference(hidden, head))[2].abs().max() < 1e-5


def test_a_model_does_not_diverge_from_itself_over_a_large_vocabulary():
    # log_softmax in fp32 gives p a sum of 1.00004 here.
    hidden, head = torch.randn(7, 8), Head(torch.randn(2**18, 8))
    assert score(hidden, head, torch.zeros(7, dtype=torch.long), reference(hidden, head))[2].abs().max() < 5e-5


def test_a_position_with_a_logit_that_is_not_finite_has_no_loss():
    hidden, head, targets = inputs()
    for value in (-torch.inf, torch.inf, torch.nan):
        head.weight_VE[(targets[0] + 1) % V, 0] = value  # not the target of the first position
        assert score(hidden.abs(), head, targets)[0].isnan().all()


def test_a_capped_head_has_no_such_shortcut():
    hidden, head, _ = inputs(3.0)
    with pytest.raises(ValueError, match="capped"):
        reference(hidden, head)


def test_memory_holds_one_chunk_of_logits():
    """Peak of live tensor elements, seen by a hook on every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.seen = max(self.seen, t.numel())
            return out

    hidden, head, targets = inputs()
    with Largest() as largest:
        cross_entropy(hidden.requires_grad_(), head, targets, 3)[0].backward()
    assert largest.seen <= max(3 * V, V * E) < T * V

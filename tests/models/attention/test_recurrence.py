"""What the recurrent attentions share, beyond the lengths and masks of the contract."""

import pytest
import torch

from lra import registry
from tests.models.cases import Case, Setting, assert_same, inputs, outputs_and_gradients, run
from tests.models.contract import CHECKS

CASES = map(Case, registry.attention_names())
NAMES = [case.name for case in CASES if case.loads and case.cls.recurrent]
LONG = Setting((2, 1, 151, 5), True)  # several chunks, the last one incomplete
CAUSAL = pytest.mark.parametrize("causal", [False, True])
HOLES = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 1]]).bool()


@pytest.mark.parametrize("name", NAMES)
@CAUSAL
def test_the_contract_holds_over_several_chunks(name, causal):
    case = Case(name, causal=causal)
    for check in (
        "equals_the_naive_reference",
        "appending_padding_changes_nothing",
        "a_mask_of_ones_is_no_mask",
        "an_empty_row_gives_zeros_and_finite_gradients",
        "causal_outputs_depend_on_the_prefix_only",
        "steps_equal_the_causal_form",
    ):
        if CHECKS[check].applies(case):
            CHECKS[check].run(case, LONG)


@pytest.mark.parametrize("name", NAMES)
@CAUSAL
def test_padding_between_tokens_is_as_if_it_were_cut_out(name, causal):
    setting = Setting((1, 3, HOLES.shape[1], 5), False)
    q, k, v = (x.detach() for x in inputs(setting))
    attention = Case(name, causal=causal).build(setting)
    for mask in HOLES:
        got = attention(q, k, v, mask[None])[:, :, mask]
        assert_same({"out": got}, {"out": attention(*(x[:, :, mask] for x in (q, k, v)))}, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_steps_pass_over_padding_wherever_it_stands(name):
    setting = Setting((*HOLES.shape[:1], 3, HOLES.shape[1], 5), False)
    attention, (q, k, v), state, outs = Case(name, causal=True).build(setting), inputs(setting), None, []
    for i in range(HOLES.shape[1]):
        out, state = attention.step(q[:, :, i], k[:, :, i], v[:, :, i], state, HOLES[:, i])
        outs.append(out)
    leaves = dict(q=q, k=k, v=v, **dict(attention.named_parameters()))
    got = outputs_and_gradients(torch.stack(outs, 2), HOLES, **leaves)
    assert_same(got, run(attention, q, k, v, HOLES), 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_steps_stay_close_in_half_precision_over_long_sums(name, half):
    setting = Setting((1, 1, 701, 5), False)  # 701 values around 100 sum to more than 65,504, the largest of fp16
    attention = Case(name, causal=True).build(setting, torch.float32, trained=False)
    q, k, v = (x.detach() for x in inputs(setting, half))
    wanted, state = attention(q.float(), k.float(), v.float() + 100), None
    for i in range(setting.size[2]):
        out, state = attention.step(q[:, :, i], k[:, :, i], v[:, :, i] + 100, state)
    assert out.dtype == half and out.isfinite().all()
    assert ((out.float() - wanted[:, :, -1]).abs().max() / wanted.abs().max()) < 0.03

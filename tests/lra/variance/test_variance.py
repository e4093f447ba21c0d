"""`variance`: what it measures against closed forms, and the sources of queries and keys."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from lra.__main__ import main
from lra.variance import commands
from lra.variance.cases import synthetic
from lra.variance.commands import SCHEMES, calibrated
from lra.variance.measure import (
    closed_forms,
    exact_variance,
    log_ratio,
    log_second_moment,
    measure,
    output_error,
    pairs,
    seen,
    slope,
)

D = 5


def matched(tokens, trace=0.3, condition=7.0, seed=0):
    """q~ and k~ are N(0, Lambda)."""
    return synthetic("matched", D, condition, trace=trace, tokens=tokens, seed=seed)


def redraws(module, draws):
    """The module with independent projections, as training redraws them."""
    for redraw in range(draws):
        module.before_step(redraw)
        yield module


def build(case, scheme, M, **more):
    """A scheme with independent draws, calibrated on the case."""
    attention, options = SCHEMES[scheme]
    options = {name: 0.2 if value is None else value for name, value in options.items()}
    return calibrated(case, attention, M, 0, **options | more)[0]


# Closed forms


def test_closed_forms_are_those_of_section_3():
    t = torch.full((1, 64), 0.1)
    forms = closed_forms(t)
    assert forms["no_sampling"] == pytest.approx(-32 * math.log(1 - 0.04))
    assert forms["optimal"] + forms["no_sampling"] == pytest.approx(-64 * math.log(0.8))
    assert forms["isotropic"] + forms["no_sampling"] == pytest.approx(-32 * math.log(0.4 * 1.2))
    assert math.exp(forms["isotropic"] - forms["optimal"]) == pytest.approx(1e4, rel=0.1)
    uneven = torch.tensor([[0.1, 0.02], [0.05, 0.01]])
    heads = [math.exp(closed_forms(row[None])["optimal"]) for row in uneven]
    assert math.exp(closed_forms(uneven)["optimal"]) == pytest.approx(sum(heads) / 2)


@pytest.mark.parametrize(("t", "exist"), [(0.16, (1, 1)), (1 / 6 + 1e-9, (0, 1)), (0.49, (0, 1)), (0.5, (0, 0))])
def test_a_closed_form_that_does_not_exist_is_none(t, exist):
    forms = closed_forms(torch.tensor([[0.01, t]]).double())
    assert tuple(forms[name] is not None for name in ("isotropic", "optimal")) == tuple(map(bool, exist))


@pytest.mark.parametrize(("scheme", "form"), [("performer-iid", "isotropic"), ("darkformer-proposal-iid", "optimal")])
def test_the_exact_variance_over_pairs_has_its_closed_form_as_mean(scheme, form):
    """E[Z^2] / E[kappa^2], a ratio of means over independent pairs: within 4 standard errors.

    The trace keeps t below 1/12, where the squares that the standard error is made of have a mean, too.
    """
    case = matched(tokens=20_011, trace=0.15)
    module = build(case, scheme, 1)
    ((q, k, _),) = pairs(case)
    u_q, u_k = seen(module, q, k)
    weight = (2 * (u_q * u_k).sum(-1)).exp().flatten()
    second = weight * log_second_moment(module, q, k).exp().flatten()
    ratio = second.mean() / weight.mean()
    error = ((second - ratio * weight).std() / weight.mean() / len(weight) ** 0.5).item()
    assert error < 0.02
    assert abs(ratio.item() - math.exp(closed_forms(case.eigenvalues_HD)[form])) < 4 * error


# Sampling


@pytest.mark.parametrize("align", ["none", "balance"])
@pytest.mark.parametrize("scheme", ["performer-iid", "darkformer-proposal-iid", "darkformer-whitened"])
def test_sampled_bias_and_variance_are_the_exact_ones(scheme, align):
    """Means over 600 draws, of M features: bias 0 and variance (E[Z^2]/kappa^2 - 1) / M, within 4 standard errors."""
    M, draws, case = 11, 600, synthetic("skewed", D, 7.0, trace=0.3, shift=0.3, tokens=13)
    module = build(case, scheme, M, orthogonal=False, align=align)
    ((q, k, _),) = pairs(case)
    errors = torch.stack([log_ratio(m, q, k).exp() - 1 for m in redraws(module, draws)])
    for found, wanted in (
        (errors, torch.zeros(())),
        (errors.square(), log_second_moment(module, q, k).expm1().mean() / M),
    ):
        per_draw = found.flatten(1).mean(1)
        assert abs(per_draw.mean() - wanted) < 4 * per_draw.std() / draws**0.5


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if SCHEMES[s][0] != "optimal"])
def test_every_scheme_is_unbiased_for_its_own_kernel(scheme):
    case = synthetic("skewed", D, 7.0, trace=0.3, shift=0.3, tokens=13)
    found = measure(build(case, scheme, 17), case, 150)
    assert abs(found["kernel_bias"]) < 4 * found["kernel_bias_se"]


@pytest.mark.parametrize("pool", [1, 2])
def test_optimal_sampling_is_unbiased_whatever_its_pool(pool):
    case = synthetic("skewed", D, 7.0, trace=0.3, shift=0.3, tokens=13)
    found = measure(build(case, "optimal", 4, pool=pool), case, 400)
    assert abs(found["kernel_bias"]) < 4 * found["kernel_bias_se"] < 0.05


def test_importance_weights_of_optimal_sampling_average_to_one():
    case = matched(tokens=257)
    module = build(case, "optimal", 101)
    weights = torch.stack([m.b_HM.exp().mean() for m in redraws(module, 60)])
    assert weights.std() > 0 and abs(weights.mean() - 1) < 4 * weights.std() / 60**0.5


@pytest.mark.parametrize("scheme", ["performer-iid", "darkformer-proposal-iid", "optimal"])
def test_errors_fall_as_the_root_of_the_number_of_features(scheme):
    case = matched(tokens=67)
    points = [{"M": M, **measure(build(case, scheme, M), case, 40)} for M in (16, 64, 256)]
    for key in ("kernel_rms", "error"):
        fitted, error = slope(points, key)
        assert fitted == pytest.approx(-0.5, abs=0.06) and error < 0.05


def test_the_kernel_error_is_the_closed_form_over_m():
    case = matched(tokens=1009)
    found = measure(build(case, "performer-iid", 64), case, 60)["kernel_rms"]
    wanted = math.sqrt(math.expm1(closed_forms(case.eigenvalues_HD)["isotropic"]) / 64)
    assert found == pytest.approx(wanted, rel=0.1)


def test_output_errors_are_split_into_bias_and_variance():
    bias = torch.zeros(97).double()
    bias[0] = 2.0
    noise = torch.randn(400, 97, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = output_error(bias + 0.1 * noise)
    assert abs(found["bias_squared"] - 4) < 4 * found["bias_squared_se"] < 0.2
    assert found["variance"] == pytest.approx(0.97, rel=0.05)
    assert found["error"] ** 2 == pytest.approx(found["bias_squared"] + found["variance"])
    pure = output_error(0.1 * noise)
    assert abs(pure["bias_squared"]) < 4 * pure["bias_squared_se"]


def test_only_what_changes_the_kernel_biases_the_output():
    """A whitened kernel is another one; normalising an unbiased estimate leaves a bias that M takes away."""
    case = matched(tokens=67, condition=100.0)
    plain, white = (measure(build(case, s, 512), case, 30) for s in ("performer-iid", "darkformer-whitened"))
    assert abs(plain["bias_squared"]) < 4 * plain["bias_squared_se"] < 1e-3
    assert white["bias_squared"] > 0.02 > 10 * white["variance"]


def test_alignment_cuts_the_variance_a_hundredfold_on_skewed_data():
    """Mean shift 3, condition number 100. On the output only from many features on: its error without alignment
    is bounded, about 1, whatever the variance of the kernel."""
    case = synthetic("skewed", D, 100.0, trace=1.5, tokens=101)
    plain, balanced = (build(case, s, 1024) for s in ("performer-iid", "performer-balanced"))
    exact = [exact_variance(m, case) for m in (plain, balanced)]
    assert all(exact[0][name] - exact[1][name] > 2 for name in ("median", "weighted_mean"))
    sampled = [measure(m, case, 20) for m in (plain, balanced)]
    assert sampled[0]["variance"] > 100 * sampled[1]["variance"]
    assert sampled[0]["kernel_rms"] > 10 * sampled[1]["kernel_rms"]


# The command


def words(results, *more):
    """A small `variance`."""
    small = ["--features=4,8,16", "--draws=3", "--schemes=performer-iid,darkformer-proposal,optimal"]
    return ["variance", *small, f"--results={results}", *map(str, more)]


def synthetic_words(results, *more):
    """On synthetic data."""
    return words(results, "--dim=5", "--condition=1,10", "--tokens=17", *more)


def report(results, name="variance"):
    """What it wrote."""
    return json.loads((results / "bench" / f"{name}.json").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Numbers alone: no figure is drawn."""
    monkeypatch.setattr(commands, "draw", lambda *_: [])


def test_table_file_and_figures_say_what_was_measured_and_figures_are_drawn_again_alike(tmp_path, capsys):
    name = "--name=variance-small"
    assert main(synthetic_words(tmp_path, "--trace=0.6", "--kinds=matched", name)) == 0
    text = capsys.readouterr().out
    found = report(tmp_path, "variance-small")
    assert found["command"].startswith("python -m lra variance --dim 5 --condition 1,10") and found["env"]["torch"]
    assert len(found["cases"]) == 2
    iid, proposal, optimal = found["cases"][0]["schemes"]
    assert iid["closed_form_variance_log10"] is not None and proposal["closed_form_variance_log10"] is None
    assert iid["exact_log10"] and optimal["exact_log10"] is None and "sampled" in text
    assert "does not exist (t up to 0.278, bound 1/6)" in text and "3 draws" in text
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(drawn) == {f"variance-small-{f}.{s}" for f in ("features", "condition") for s in ("svg", "png")}
    assert b"darkformer-proposal" in drawn["variance-small-features.svg"]
    for path in (tmp_path / "figures").iterdir():
        path.unlink()
    assert main(["variance", "--redraw", name, "--results", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == drawn


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, undrawn):
    reports = []
    for seed in (0, 0, 1):
        assert main(synthetic_words(tmp_path, f"--seed={seed}")) == 0
        reports.append(report(tmp_path)["cases"])
    assert len(reports[0]) == 4 and reports[0] == reports[1] != reports[2]


def tensors(path, *, garbage=0.0, **changed):
    """q, k (2, 3, 17, 5) with a mask, as a file."""
    source = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 17, 5, generator=source)
    mask = torch.arange(17) < torch.tensor([[17], [11]])
    q, k, v = (x.masked_fill(~mask[:, None, :, None], garbage) for x in (q, k, v))
    found = {"q": q, "k": k, "v": v, "mask": mask} | changed
    save_file({name: x.contiguous() for name, x in found.items() if x is not None}, path)
    return path


def test_a_file_is_measured_and_its_padding_is_not(tmp_path, monkeypatch):
    reports = []
    for garbage in (0.0, 50.0):
        path = tensors(tmp_path / "x.safetensors", garbage=garbage)
        assert main(words(tmp_path, "--tensors", path)) == 0
        reports.append(report(tmp_path)["cases"])
        monkeypatch.setattr(commands, "draw", lambda *_: [])  # once is enough
    (case,) = reports[0]
    assert case["shape"] == [2, 3, 17, 5] and not case["gaussian"] and reports[0] == reports[1]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"variance-features"}


def test_values_are_drawn_where_a_file_has_none(tmp_path, undrawn):
    path = tensors(tmp_path / "x.safetensors", v=None, mask=None)
    assert main(words(tmp_path, "--tensors", path)) == 0


def test_a_trained_run_is_measured_layer_by_layer(lab, capsys, undrawn):
    lab.train()
    (record,) = lab.records()
    for run in (record, lab.folder("model.safetensors")):
        capsys.readouterr()
        assert main(words(lab.results, "--run", run, f"--data={lab.data}", f"--runs={lab.runs}")) == 0
        found = report(lab.results)["cases"]
        assert [case["name"] for case in found] == [f"tiny, softmax, layer {i}" for i in range(len(found))]
        assert found and "if q and k were Gaussian" in capsys.readouterr().out


def test_a_run_that_reads_no_queries_is_refused(lab, error_line):
    lab.train(attention="constant")
    line = error_line(*words(lab.results, "--run", lab.records()[0], f"--data={lab.data}", f"--runs={lab.runs}"))
    assert "constant reads no queries and keys" in line


def test_a_run_without_its_weights_is_refused(lab, error_line):
    lab.train()
    line = error_line(*words(lab.results, "--run", lab.records()[0], f"--data={lab.data}", "--runs=elsewhere"))
    assert "no weights of" in line and "looked for elsewhere" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trace=1", "--largest=0.1"], "--trace and --largest both set the scale"),
        (["--kinds=macthed"], "did you mean 'matched'"),
        (["--schemes=performer-idd"], "did you mean 'performer-iid'"),
        (["--name=attention"], "--name must start with variance"),
        (["--name=variance/../x"], "--name must start with variance"),
        (["--run=missing.json"], "no record at missing.json"),
        (["--tensors=missing.safetensors"], "no file at missing.safetensors"),
        (["--synthetic", "--run=missing.json"], "--synthetic and --run exclude each other"),
        (["--tensors=x", "--dim=5"], "--dim is an option of synthetic data: leave it out with --tensors"),
        (["--tensors=x", "--condition=10"], "--condition is an option of synthetic data: leave it out with --tensors"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(tmp_path, error_line, options, said):
    assert said in error_line(*words(tmp_path, *options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", ["features=0,16", "features=16.5", "features=16,16", "condition=0.5", "condition=nan", "shift=-1",
               "target-norm=0", "trace=inf", "largest=0"],
)  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused_by_name(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        main(words(tmp_path, f"--{option}"))
    name, _, value = option.partition("=")
    line = capsys.readouterr().err
    assert f"argument --{name}: must be " in line and f"; got {value} " in line
    assert not list(tmp_path.iterdir())


def test_bad_files_are_one_line(tmp_path, error_line):
    def line(**changed):
        return error_line(*words(tmp_path, "--tensors", tensors(tmp_path / "x.safetensors", **changed)))

    assert "has no tensor k" in line(k=None)
    assert "k must be float (B, H, N, D), as q" in line(k=torch.zeros(2, 3, 17, 7))
    assert "mask must be bool (B, N) = (2, 17)" in line(mask=torch.ones(2, 17))
    assert "q has values that are not finite" in line(q=torch.full((2, 3, 17, 5), math.nan))
    assert "at least 2 real tokens" in line(mask=torch.zeros(2, 17, dtype=torch.bool))
    path = tensors(tmp_path / "x.safetensors")
    path.write_bytes(b"no tensors at all")
    assert "is not a safetensors file" in error_line(*words(tmp_path, "--tensors", path))
    assert not (tmp_path / "bench").exists()

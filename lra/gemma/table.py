"""Tables of the Gemma track: a pure function of its records; and which records share a table and a row. No torch."""

from __future__ import annotations

import re
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from lra.gemma.stats import SPIKE, WINDOW, Record, accuracy, gap, recovered, score, spike_rate, validation
from lra.options import UsageError
from lra.records.markup import MISSING, Block, Grid, Heading, Text, markdown
from lra.records.record import iterate_records
from lra.records.stats import Uncertain
from tasks.store.files import atomic_path

Label = tuple[str, str]  # of a row: attention, options
Rows = dict[Label, list[Record]]
DEFAULTS = {("orthogonal", True), ("redraw_every", 0), ("pool", 8)}  # which records name all the same
NAMES = {"num_features": "M"}
FLOORS = ("constant", "local")  # averaging; a window of near keys, with or without the first tokens
RECIPE = ("lr", "lr_kernel", "batch", "warmstart", "transfer_tokens")  # of finetuning
LEGEND = (
    "Next-token accuracy in percent on the test blocks [95% interval] (number of seeds). Intervals are clustered by "
    "document and hold, where there are several seeds, the noise of training (Student's t), in gaps and shares that of "
    "every method in them. A single seed shows none, so its training noise is in no interval. gap: exact minus the "
    "method, on the same tokens. recovered: (method − floor) / (exact − floor). The floor is the best row of constant "
    "(averaging) and local (a window, with or without the first tokens). The share is left out where the floor is not "
    "told apart from exact. Where exact attention or a floor was trained in several ways, its row of least validation "
    "loss is the one compared with. KL: from the exact model's predictions, nats per token. tokens/s: of training "
    "steps by the clock of the run, which may have shared the machine. MB: peak memory of training."
)
LEGEND_STABILITY = (
    f"Test accuracy in percent / loss spikes per 100 steps (a loss {SPIKE:g} median absolute deviations above the "
    f"median of the {WINDOW} before) at each peak learning rate; diverged: the loss stopped being finite."
)
LEGEND_ANISOTROPY = (
    "Of q~ = sqrt(scale) q and k~ in the exact model. largest: eigenvalue of their second moment, over heads. "
    "aligned: after centring and balancing, which leave attention unchanged. pair: median over pairs of "
    "log10 E[Z²] / E[Z]² of one random feature. optimal: log10 E[Z²] in closed form for w ~ N(0, Sigma*), where "
    "all eigenvalues are below 1/2."
)


def show(args: Namespace) -> None:
    """`gemma table`: write DIR/gemma/<kind>.md for every kind that has records, and name the files."""
    for name, text in render(args.results).items():
        path = args.results / "gemma" / f"{name}.md"
        with atomic_path(path) as temporary:
            temporary.write_text(text, "utf-8")
        print(path)


def render(results: Path) -> dict[str, str]:
    """Kind to Markdown. Raises UsageError for a record that cannot be read."""
    try:
        return {kind: markdown(MAKERS[kind](records)) for kind, records in by_kind(results).items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"a record of the Gemma track is not usable: {type(error).__name__} {error}") from error


def by_kind(results: Path) -> dict[str, list[Record]]:
    """All records of the track, which has a place of its own, so that no table of the arena meets them."""
    kinds: dict[str, list[Record]] = {kind: [] for kind in MAKERS}
    for path, record in iterate_records(results / "gemma"):
        kind = str(record["task"]["name"]).removeprefix("gemma-")
        if kind not in kinds:
            raise UsageError(f"{path} is of an unknown kind of the Gemma track: {kind!r}")
        kinds[kind].append(record)
    return {kind: records for kind, records in kinds.items() if records}


# Which records share a table and a row


def grouped(records: Sequence, key: Callable) -> dict:
    """Records by key, in the order of the keys."""
    groups = defaultdict(list)
    for r in records:
        groups[key(r)].append(r)
    return dict(sorted(groups.items()))


def by_setting(records: Sequence[Record], *joined: str) -> dict[str, Rows]:
    """Records by setting, then by row; rows that differ in the options `joined` alone are one."""
    settings = grouped(records, setting_of)
    return {name: grouped(runs, lambda r, runs=runs: row_of(r, runs, *joined)) for name, runs in settings.items()}


def setting_of(r: Record) -> str:
    """What the runs of one table share: model, text, length, layers, precision; of training, tokens and parameters."""
    e, recipe = r["model"]["encoder"], r["training"]["recipe"]
    first, last = e["layers"][0], e["layers"][-1]
    whole = e["layers"] == list(range(first, last + 1))
    layers = f"{first} to {last}" if whole and last > first + 1 else ",".join(map(str, e["layers"]))
    text = f"{r['task']['dataset']} ({r['data']['splits']['test']['sha256'][:8]})"
    parts = [e["base"], text, f"{r['task']['seq_len']} tokens", f"layers {layers}", r["training"]["precision"]]
    if recipe:
        parts += [f"{recipe['tokens']:,} training tokens", f"train {recipe['train']}"]
    return ", ".join(parts)


def row_of(r: Record, among: Sequence[Record], *joined: str) -> Label:
    """(attention, options). Options are those not at their defaults, and the parts of the recipe in which the runs of
    this attention in the setting differ; `joined` ones are left out."""

    def recipe(run):
        shown = {k: run["training"]["recipe"].get(k) for k in RECIPE}
        return shown | {"window": "kept" if run["model"]["encoder"]["keeps_window"] else "ignored"}

    own, name = recipe(r), r["model"]["attention"]
    others = [recipe(x) for x in among if x["model"]["attention"] == name]
    differ = {k: v for k, v in own.items() if any(x[k] != v for x in others) and v not in (None, "none")}
    options = {k: v for k, v in r["model"]["attention_config"].items() if (k, v) not in DEFAULTS} | differ
    return without((name, ", ".join(f"{NAMES.get(k, k)}={v}" for k, v in options.items())), *joined)


def without(label: Label, *options: str) -> Label:
    """A row's name without the options that begin with one of `options`."""
    return label[0], ", ".join(p for p in label[1].split(", ") if not p.startswith(options))


def titled(label: Label) -> str:
    """The name of a row."""
    return label[0] + (f" ({label[1]})" if label[1] else "")


def order(label: Label) -> tuple:
    """Exact, constant, then by name; M = 64 before 256."""
    numbers = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label[1])]
    return {"softmax": 0, "constant": 1}.get(label[0], 2), label[0], numbers


def baseline(rows: Rows, *names: str) -> list[Record]:
    """The runs that methods are compared with, of the attentions of these names; [] where there are none.

    Failed runs are left out, and softmax without its windows. Of several rows it is the best one: of finetuned rows
    that of least validation loss, of others that of most accuracy. A method must not look good because the learning
    rate of its baseline was bad, or because a better floor was left out.
    """

    def loss(runs):
        trained = runs[0]["training"]["recipe"]
        return statistics.fmean(r["result"]["curve"][-1][2] if trained else -accuracy(r) for r in runs)

    ended = [[r for r in runs if r["result"]] for label, runs in rows.items() if label[0] in names]
    usable = [x for x in ended if x and ("softmax" not in names or x[0]["model"]["encoder"]["keeps_window"])]
    return min(usable, key=loss, default=[])


def label_of(rows: Rows, runs: Sequence[Record]) -> Label:
    """The row that holds the first of the runs."""
    return next(label for label, others in rows.items() if runs[0] in others)


# Tables


def scores(records: Sequence[Record]) -> list[Block]:
    """One table per setting, and for finetuning one of accuracy against tokens."""
    blocks: list[Block] = [Text(LEGEND)]
    trained = records[0]["task"]["name"] == "gemma-finetune"
    last = ("validation before", "tokens/s", "MB") if trained else ("KL",)
    header = ("attention", "accuracy", "gap to exact", "recovered", "loss", *last)
    for setting, rows in by_setting(records).items():
        cells = tuple(line(label, rows[label], rows) for label in sorted(rows, key=order))
        blocks += [Heading(setting), Grid(header, cells), *sight(rows), *(curves(rows) if trained else [])]
    return blocks


def sight(rows: Rows) -> list[Block]:
    """What the setting cannot see, as a sentence."""
    exact, floor = baseline(rows, "softmax"), baseline(rows, *FLOORS)
    if exact and floor and recovered(exact, floor, exact) is None:
        name = titled(label_of(rows, floor))
        return [Text(f"{name} is not told apart from exact attention: this setting cannot see far attention.")]
    if any(label[0] == "local" for label in rows):
        return []
    return [Text("No row of local: what near keys and the first token bring alone is not known here.")]


def line(label: Label, runs: Sequence[Record], rows: Rows) -> list[str]:
    """Cells of one row."""
    name, trained = titled(label), runs[0]["training"]["recipe"]
    done = [r for r in runs if r["result"]]
    if not done:
        return [name, runs[0]["status"], *[MISSING] * (6 if trained else 4)]
    failed = f", {len(runs) - len(done)} failed" if len(done) < len(runs) else ""
    exact, floor = baseline(rows, "softmax"), baseline(rows, *FLOORS)
    share = recovered(exact, floor, done) if exact and floor and label[0] not in ("softmax", *FLOORS) else None
    cells = [name, f"{percent(score(done))} ({len(done)}{failed})"]
    cells.append(percent(gap(exact, done)) if exact and exact != done else MISSING)
    cells.append(percent(share, 0) if share else MISSING)
    cells.append(f"{statistics.fmean(r['result']['loss'] for r in done):.3f}")
    if not trained:
        kl = [r["result"]["kl"] for r in done if r["result"]["kl"] is not None]
        return [*cells, f"{statistics.fmean(kl):.3f}" if kl else MISSING]
    first = [r["result"]["curve"][0] for r in done]
    cells.append(f"{100 * statistics.fmean(c[3] / c[4] for c in first):.1f}")
    rate, peak = (statistics.median(r["cost"].get(key) or 0 for r in done) for key in ("tokens_per_s", "peak_bytes"))
    return [*cells, f"{rate:,.0f}", f"{peak / 1e6:,.0f}"]


def curves(rows: Rows) -> list[Block]:
    """Validation accuracy against training tokens, mean over seeds."""
    points = {label: validation([r for r in rows[label] if r["result"]]) for label in sorted(rows, key=order)}
    at = next((list(values) for values in points.values() if values), [])
    mean = {t: {x: f"{100 * statistics.fmean(v):.1f}" for x, v in values.items()} for t, values in points.items()}
    table = tuple((titled(label), *(mean[label].get(t, MISSING) for t in at)) for label in points)
    return [Grid(("validation accuracy after tokens", *(f"{t:,}" for t in at)), table)] if at else []


def stability(records: Sequence[Record]) -> list[Block]:
    """Test accuracy, spikes and divergence at each learning rate."""

    def cell(runs):
        done = [r for r in runs if r["result"]]
        lost = f", {len(runs) - len(done)} of {len(runs)} diverged" if len(done) < len(runs) else ""
        return f"{mean(done)} / {spike_rate(runs):.1f}{lost}" if runs else MISSING

    def mean(runs):
        return f"{100 * statistics.fmean(map(accuracy, runs)):.1f}" if runs else MISSING

    blocks: list[Block] = [Text(LEGEND_STABILITY)]
    for setting, rows in by_setting(records, "lr").items():
        by_rate = {label: grouped(rows[label], lambda r: r["training"]["recipe"]["lr"]) for label in rows}
        rates = sorted({rate for runs in by_rate.values() for rate in runs})
        table = []
        for label in sorted(rows, key=order):
            ended = [x for x in by_rate[label].values() if all(r["result"] for r in x)]
            ended.sort(key=lambda runs: statistics.fmean(map(accuracy, runs)))
            best_worst = f"{mean(ended[-1])} / {mean(ended[0])}" if ended else MISSING
            table.append((titled(label), *(cell(by_rate[label].get(rate, [])) for rate in rates), best_worst))
        header = ("attention", *(f"{x:g}" for x in rates), "best / worst")
        blocks += [Heading(setting), Grid(header, tuple(table))]
    return blocks


def anisotropy(records: Sequence[Record]) -> list[Block]:
    """A row per layer."""
    header = ("layer", "q²", "k²", "largest", "condition", "pair")
    header += ("aligned q²", "aligned largest", "above 1/2", "aligned pair", "optimal")
    blocks: list[Block] = [Text(LEGEND_ANISOTROPY)]
    for r in records:
        rows = []
        for x in r["result"]["layers"]:
            best = [v for v in x["aligned_log10_optimal"] if v is not None]
            optimal = f"{max(best):.1f}" if len(best) == len(x["top"]) else "infinite"
            pair, aligned_pair = (f"{x[name]['median']:.1f}" for name in ("log10_pair", "aligned_log10_pair"))
            raw = f"{x['q_norm2']:.0f}", f"{x['k_norm2']:.0f}", f"{max(x['top']):.3g}", f"{max(x['condition']):.2g}"
            aligned = f"{x['aligned_norm2']:.1f}", f"{max(x['aligned_top']):.3g}", str(max(x["aligned_above_half"]))
            rows.append((str(x["layer"]), *raw, pair, *aligned, aligned_pair, optimal))
        blocks += [Heading(setting_of(r)), Grid(header, tuple(rows))]
    return blocks


def percent(e: Uncertain, digits: int = 1) -> str:
    """Value and interval; zero has no sign."""
    return f"{100 * e.value:z.{digits}f} [{100 * e.low:z.{digits}f}, {100 * e.high:z.{digits}f}]"


MAKERS = {"swap": scores, "finetune": scores, "stability": stability, "anisotropy": anisotropy}

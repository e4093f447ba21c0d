"""Tables of the Gemma track: a pure function of its records. No torch."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from lra.gemma.rows import (
    FLOORS,
    Label,
    Rows,
    baseline,
    by_distance,
    by_setting,
    grouped,
    label_of,
    order,
    setting_of,
    titled,
)
from lra.gemma.stats import SPIKE, WINDOW, Record, accuracy, gap, recovered, score, spike_rate, validation
from lra.options import UsageError
from lra.records.markup import MISSING, Block, Grid, Heading, Text, markdown
from lra.records.record import iterate_records
from lra.records.stats import Uncertain
from tasks.store.files import atomic_path

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
LEGEND_RECALL = (
    "Passages that stand twice in a block. Only the second occurrence counts, without its first tokens: who sees the "
    "first occurrence knows it. Of each distance between the two, in tokens: accuracy in percent [95% interval], "
    "clustered by block; with several seeds it holds the noise of random draws. loss: nats per token. recovered: "
    "(method − floor) / (exact − floor) in percent. The floor is the best row of constant and local at that distance. "
    "The share is left out where the floor is not told apart from exact. text: documents of the test split, joined. "
    "random: tokens that occur in them, each equally likely."
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


def share(rows: Rows, label: Label) -> str:
    """The cell of what a row recovers of the distance between the best floor and exact attention."""
    exact, floor = baseline(rows, "softmax"), baseline(rows, *FLOORS)
    done = [r for r in rows.get(label, []) if r["result"]]
    if not (exact and floor and done) or label[0] in ("softmax", *FLOORS):
        return MISSING
    found = recovered(exact, floor, done)
    return percent(found, 0) if found else MISSING


def line(label: Label, runs: Sequence[Record], rows: Rows) -> list[str]:
    """Cells of one row."""
    name, trained = titled(label), runs[0]["training"]["recipe"]
    done = [r for r in runs if r["result"]]
    if not done:
        return [name, runs[0]["status"], *[MISSING] * (6 if trained else 4)]
    failed = f", {len(runs) - len(done)} failed" if len(done) < len(runs) else ""
    exact = baseline(rows, "softmax")
    cells = [name, f"{percent(score(done))} ({len(done)}{failed})"]
    cells.append(percent(gap(exact, done)) if exact and exact != done else MISSING)
    cells.append(share(rows, label))
    cells.append(f"{statistics.fmean(r['result']['loss'] for r in done):.3f}")
    if not trained:
        kl = [r["result"]["kl"] for r in done if r["result"]["kl"] is not None]
        return [*cells, f"{statistics.fmean(kl):.3f}" if kl else MISSING]
    first = [r["result"]["curve"][0] for r in done]
    cells.append(f"{100 * statistics.fmean(c[3] / c[4] for c in first):.1f}")
    rate, peak = (statistics.median(r["cost"].get(key) or 0 for r in done) for key in ("tokens_per_s", "peak_bytes"))
    return [*cells, f"{rate:,.0f}", f"{peak / 1e6:,.0f}"]


def recall(records: Sequence[Record]) -> list[Block]:
    """Accuracy, loss and share recovered at each distance."""

    def loss(part, label):
        return f"{statistics.fmean(r['result']['loss'] for r in part[label]):.2f}" if label in part else MISSING

    def found(part, label):
        return percent(score(part[label])) if label in part else MISSING

    def seeds(runs):
        failed = [r["status"] for r in runs if not r["result"]]
        return f"{len(runs)}, {len(failed)} {failed[0]}" if failed else str(len(runs))

    blocks: list[Block] = [Text(LEGEND_RECALL)]
    for setting, rows in by_setting(records).items():
        parts = by_distance(rows)
        blocks.append(Heading(setting))
        for name, cell in (("accuracy", found), ("loss", loss), ("recovered", share)):
            header = f"{name} at distance", *(f"{d:,}" for d in parts), "seeds"
            shown = [x for x in sorted(rows, key=order) if cell is not share or x[0] not in ("softmax", *FLOORS)]
            cells = {x: [cell(part, x) for part in parts.values()] for x in shown}
            blocks += [Grid(header, tuple((titled(x), *cells[x], seeds(rows[x])) for x in shown))] if shown else []
        said = [(f"{d:,}", sentence.text) for d, part in parts.items() for sentence in sight(part)]
        for text, ds in grouped(said, lambda pair: pair[1]).items():
            blocks.append(Text(f"At {', '.join(d for d, _ in ds)}: {text}"))
    return blocks


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


MAKERS = {"swap": scores, "recall": recall, "finetune": scores, "stability": stability, "anisotropy": anisotropy}

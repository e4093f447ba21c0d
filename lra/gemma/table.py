"""Tables of the Gemma track: a pure function of its records. No torch."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lra.gemma.rows import FLOORS, baseline, grouped, label_of, order, row_of, setting_of, titled, without
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
    kinds: dict[str, list[Record]] = defaultdict(list)
    for path, record in iterate_records(results / "gemma"):
        kind = str(record["task"]["name"]).removeprefix("gemma-")
        if kind not in MAKERS:
            raise UsageError(f"{path} is of an unknown kind of the Gemma track: {kind!r}")
        kinds[kind].append(record)
    return {kind: kinds[kind] for kind in MAKERS if kinds[kind]}


# Swap and finetune


def scores(records: Sequence[Record]) -> list[Block]:
    """One table per setting, and for finetuning one of accuracy against tokens."""
    blocks: list[Block] = [Text(LEGEND)]
    for setting, runs in grouped(records, setting_of).items():
        rows = grouped(runs, lambda r: row_of(r, runs))
        trained = runs[0]["task"]["name"] == "gemma-finetune"
        last = ("validation before", "tokens/s", "MB") if trained else ("KL",)
        cells = tuple(line(label, rows[label], rows) for label in sorted(rows, key=order))
        header = ("attention", "accuracy", "gap to exact", "recovered", "loss", *last)
        blocks += [Heading(setting), Grid(header, cells), *sight(rows), *(curves(rows) if trained else [])]
    return blocks


def sight(rows) -> list[Block]:
    """What the setting cannot see, as a sentence."""
    exact, floor = baseline(rows, "softmax"), baseline(rows, *FLOORS)
    if exact and floor and recovered(exact, floor, exact) is None:
        name = titled(label_of(rows, floor))
        return [Text(f"{name} is not told apart from exact attention: this setting cannot see far attention.")]
    if any(label[0] == "local" for label in rows):
        return []
    return [Text("No row of local: what near keys and the first token bring alone is not known here.")]


def line(label, runs, rows) -> list[str]:
    """Cells of one row."""
    name = titled(label)
    done = [r for r in runs if r["result"]]
    if not done:
        return [name, runs[0]["status"], *[MISSING] * (6 if runs[0]["training"]["recipe"] else 4)]
    failed = f", {len(runs) - len(done)} failed" if len(done) < len(runs) else ""
    own = score(done)
    exact, floor = baseline(rows, "softmax"), baseline(rows, *FLOORS)
    cells = [name, f"{percent(own)} ({len(done)}{failed})"]
    cells.append(percent(gap(exact, done)) if exact and exact != done else MISSING)
    share = recovered(exact, floor, done) if exact and floor else None
    cells.append(MISSING if share is None or label[0] in ("softmax", *FLOORS) else percent(share, 0))
    cells.append(f"{statistics.fmean(r['result']['loss'] for r in done):.3f}")
    if not runs[0]["training"]["recipe"]:
        kl = [r["result"]["kl"] for r in done if r["result"]["kl"] is not None]
        return [*cells, f"{statistics.fmean(kl):.3f}" if kl else MISSING]
    first = [r["result"]["curve"][0] for r in done]
    cells.append(f"{100 * statistics.fmean(c[3] / c[4] for c in first):.1f}")
    rate, peak = (statistics.median(r["cost"].get(key) or 0 for r in done) for key in ("tokens_per_s", "peak_bytes"))
    return [*cells, f"{rate:,.0f}", f"{peak / 1e6:,.0f}"]


def curves(rows) -> list[Block]:
    """Validation accuracy against training tokens, mean over seeds."""
    points = {label: validation([r for r in rows[label] if r["result"]]) for label in sorted(rows, key=order)}
    at = next((list(found) for found in points.values() if found), None)
    if at is None:
        return []
    mean = {t: {x: f"{100 * statistics.fmean(v):.1f}" for x, v in found.items()} for t, found in points.items()}
    table = tuple((titled(label), *(mean[label].get(t, MISSING) for t in at)) for label in points)
    return [Grid(("validation accuracy after tokens", *(f"{t:,}" for t in at)), table)]


# Stability and anisotropy


def stability(records: Sequence[Record]) -> list[Block]:
    """Test accuracy, spikes and divergence at each learning rate."""
    legend = (
        f"Test accuracy in percent / loss spikes per 100 steps (a loss {SPIKE:g} median absolute deviations above the "
        f"median of the {WINDOW} before) at each peak learning rate; diverged: the loss stopped being finite."
    )
    blocks: list[Block] = [Text(legend)]
    for setting, runs in grouped(records, setting_of).items():
        rates = sorted({r["training"]["recipe"]["lr"] for r in runs})
        rows = grouped(runs, lambda r, runs=runs: without(row_of(r, runs), "lr"))
        table = []
        for label in sorted(rows, key=order):
            by_rate = grouped(rows[label], lambda r: r["training"]["recipe"]["lr"])
            ended = [statistics.fmean(map(accuracy, x)) for x in by_rate.values() if all(r["result"] for r in x)]
            best_worst = f"{100 * max(ended):.1f} / {100 * min(ended):.1f}" if ended else MISSING
            table.append((titled(label), *(stable(by_rate.get(rate, [])) for rate in rates), best_worst))
        header = ("attention", *(f"{x:g}" for x in rates), "best / worst")
        blocks += [Heading(setting), Grid(header, tuple(table))]
    return blocks


def stable(runs: Sequence[Record]) -> str:
    """One cell."""
    if not runs:
        return MISSING
    done = [r for r in runs if r["result"]]
    lost = f", {len(runs) - len(done)} of {len(runs)} diverged" if len(done) < len(runs) else ""
    shown = f"{100 * statistics.fmean(map(accuracy, done)):.1f}" if done else MISSING
    return f"{shown} / {spike_rate(runs):.1f}{lost}"


def anisotropy(records: Sequence[Record]) -> list[Block]:
    """A row per layer."""
    legend = (
        "Of q~ = sqrt(scale) q and k~ in the exact model. largest: eigenvalue of their second moment, over heads. "
        "aligned: after centring and balancing, which leave attention unchanged. pair: median over pairs of "
        "log10 E[Z²] / E[Z]² of one random feature. optimal: log10 E[Z²] in closed form for w ~ N(0, Sigma*), where "
        "all eigenvalues are below 1/2."
    )
    header = ("layer", "q²", "k²", "largest", "condition", "pair")
    header += ("aligned q²", "aligned largest", "above 1/2", "aligned pair", "optimal")
    blocks: list[Block] = [Text(legend)]
    for r in records:
        rows = tuple(spectrum(x) for x in r["result"]["layers"])
        blocks += [Heading(setting_of(r)), Grid(header, rows)]
    return blocks


def spectrum(x: dict) -> tuple[str, ...]:
    """The row of one layer."""
    best = [v for v in x["aligned_log10_optimal"] if v is not None]
    optimal = f"{max(best):.1f}" if len(best) == len(x["top"]) else "infinite"
    raw = (f"{x['q_norm2']:.0f}", f"{x['k_norm2']:.0f}", f"{max(x['top']):.3g}", f"{max(x['condition']):.2g}")
    aligned = (f"{x['aligned_norm2']:.1f}", f"{max(x['aligned_top']):.3g}", str(max(x["aligned_above_half"])))
    pairs = [f"{x[name]['median']:.1f}" for name in ("log10_pair", "aligned_log10_pair")]
    return (str(x["layer"]), *raw, pairs[0], *aligned, pairs[1], optimal)


# Text


def percent(e: Uncertain, digits: int = 1) -> str:
    """Value and interval; zero has no sign."""
    return f"{100 * e.value:z.{digits}f} [{100 * e.low:z.{digits}f}, {100 * e.high:z.{digits}f}]"


MAKERS = {"swap": scores, "finetune": scores, "stability": stability, "anisotropy": anisotropy}

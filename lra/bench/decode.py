"""`bench decode`: the time of one more token and the bytes of the cache, against the tokens of context."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lra import registry
from lra.bench.base import Column, Point, finish, twice
from lra.figures import style
from lra.machine import set_threads
from lra.options import UsageError
from lra.records.markup import Grid, markdown
from lra.records.measured import BASELINE, crossover
from lra.records.measured import Point as At
from models.gemma.bridge import attach, select_layers, text_layers
from models.gemma.cache import KernelState

SHAPES = {  # of the models of the Gemma track; a full layer after five with a window
    "gemma-3-270m": {"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
    | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256}
    | {"sliding_window": 512, "max_position_embeddings": 32768},
    "tiny": {"vocab_size": 259, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6}
    | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24, "query_pre_attn_scalar": 24}
    | {"sliding_window": 32, "max_position_embeddings": 1024},
}
ALIGNED = {"align": "balance", "init": "aligned", "target_norm": 4.0}
ROWS = {"local": {}, "performer hybrid": {}, "darkformer hybrid": ALIGNED}  # beside BASELINE; all with a window, sinks
FLAT = 1024  # tokens from which the time of a hybrid is to be constant


def bench_decode(args: Namespace) -> None:
    """`bench decode`: measure, print and write, with a figure."""
    set_threads(args.threads)
    contexts, most = sorted(map(int, args.contexts.split(","))), SHAPES[args.model]["max_position_embeddings"]
    if contexts[-1] >= most:
        raise UsageError(f"--contexts {contexts[-1]} is beyond the model: {args.model} has {most} positions")
    facts = {"contexts": tuple(contexts), "model": args.model, "data": str(args.data), "M": args.features}
    facts |= {"window": args.window, "sinks": args.sinks}
    names = [BASELINE, *ROWS]
    held = {name: {N: size(cache) for N, cache in Decoding(name, **facts).caches.items()} for name in names}
    measured = twice("lra.bench.decode", [Column(facts, args.rounds, names)])
    seconds = {setting: {p["name"]: times(p) for p in points} for setting, points in measured.items()}
    lists = {"model": args.model, "weights": source(args.model, args.data)}
    for setting, rows in seconds.items():
        cells = [(name, N) for name in names for N in contexts]
        points = [{"name": name, "N": N, "seconds": rows[name][N], "bytes": held[name][N]} for name, N in cells]
        lists["points" if setting == "tuned" else setting] = points
    with style.drawing():
        paths = style.save(figure(seconds["tuned"], held), args.results / "figures" / "decode")
    finish(args.results, "decode", "decode", lists, report(args, seconds, held))
    print(*paths, sep="\n")


def times(point: Point) -> dict[int, float]:
    """Seconds of a token by context."""
    first, *others = point["contexts"]
    return {first: point["seconds"]} | {N: point["parts"][str(N)] for N in others}


def source(model: str, data: Path) -> str:
    """Where the weights come from, on which no time depends."""
    return "pretrained" if (Path(data) / "gemma" / model).is_dir() else "random"


class Decoding:
    """A model of the track with one attention in all layers (BASELINE: as it is), and caches that stand for `contexts`.

    Keys and values in the caches are random: neither times nor sizes depend on them.
    """

    def __init__(self, name: str, contexts: Sequence[int], model: str, data: str, M: int, window: int, sinks: int):
        from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

        torch.manual_seed(0)
        if source(model, Path(data)) == "pretrained":
            self.model = Gemma3ForCausalLM.from_pretrained(Path(data) / "gemma" / model, dtype=torch.float32).eval()
        else:
            self.model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPES[model])).eval()
        if name != BASELINE:
            base = name.partition(" ")[0]
            options = ROWS[name] | registry.budget_options(base, M) | {"window": window, "sinks": sinks}
            attach(self.model, partial(registry.build_attention, base, **options), select_layers(self.model, "all"))
        self.caches = {}
        for N in contexts:
            self.caches[N] = cache = DynamicCache(config=self.model.config)
            self.token(N)  # the cache gets its layers
            cache.reset()
            for index in range(len(cache.layers)):
                self.fill(index, cache, N)

    @torch.no_grad()
    def fill(self, index: int, cache: Any, N: int) -> None:
        """One layer of a cache, as after N tokens."""
        config, attention = self.model.config, text_layers(self.model)[index].self_attn
        k, v = torch.randn(2, 1, config.num_key_value_heads, N, config.head_dim)
        layer = cache.layers[index]
        layer.update(k, v)
        if isinstance(layer, KernelState):
            heads = config.num_attention_heads
            layer.state = attention.socket.kernel.state_after(*(x.expand(-1, heads, -1, -1) for x in (k, v)))

    @torch.no_grad()
    def token(self, N: int) -> Tensor:
        """One more token after N, logits included."""
        return self.model(torch.ones(1, 1, dtype=torch.int64), past_key_values=self.caches[N], use_cache=True).logits


@lru_cache(maxsize=1)
def contender(name: str, **facts: Any) -> Mapping[str, Callable[[], Any]]:
    """A token at each context; the first one stands for the whole."""
    decoding = Decoding(name, **facts)
    return {str(N): partial(decoding.token, N) for N in decoding.caches}


def size(cache: Any) -> int:
    """Bytes of all numbers in a cache."""
    held = [layer.state if isinstance(layer, KernelState) else (layer.keys, layer.values) for layer in cache.layers]
    return sum(x.nbytes for x in tree_leaves(held) if isinstance(x, Tensor))


# Report

Rows = dict[str, dict[int, float]]


def crossing(rows: Mapping[str, Mapping[int, float]]) -> str:
    """From how many tokens on each row stays below exact attention."""
    curves = {name: [At(N, y) for N, y in row.items()] for name, row in rows.items()}
    from_ = {name: crossover(curve, curves[BASELINE]) for name, curve in curves.items() if name != BASELINE}
    last = max(rows[BASELINE])
    return "; ".join(f"{n}: " + (f"from {x:,.0f} on" if x else f"not up to {last:,}") for n, x in from_.items())


def grid(rows: Mapping[str, Mapping[int, float]], unit: float, form: str) -> str:
    """A table of a row's values at each context, and how they grow from FLAT to the longest."""
    contexts = list(rows[BASELINE])
    ends = [(contexts[-1], FLAT)] if FLAT in contexts[:-1] else []
    header = ["attention", *(f"N {N:,}" for N in contexts), *(f"{long:,} / {short:,}" for long, short in ends)]
    cells = [
        [n, *(form.format(x * unit) for x in row.values()), *(f"{row[long] / row[short]:.2f}" for long, short in ends)]
        for n, row in rows.items()
    ]
    return markdown([Grid(header, cells)])


def report(args: Namespace, seconds: Mapping[str, Rows], held: Rows) -> str:
    """The text of the report, with {command} in it."""
    shape, weights = SHAPES[args.model], source(args.model, args.data)
    text = f"""# The next token, with a cache

`{{command}}`: one token of batch 1 through all of {args.model} ({weights} weights), logits included, where the cache \
stands for N tokens; fp32. {BASELINE}: transformers' own attention and cache, which keeps {shape["sliding_window"]} \
tokens in five layers of six and all in the sixth. The others replace all {shape["num_hidden_layers"]} layers: local: \
a window of {args.window} and {args.sinks} sink(s); hybrids: blocks of {args.window}, the same sinks, and \
{args.features} features for all other keys. Keys and values in the caches are random, as no time depends on them. \
Each attention in a process of its own, taking turns; medians of {args.rounds} rounds, in each of which every N is run.

## Bytes of the cache, in MB

{grid(held, 1e-6, "{:,.2f}")}
Fewer bytes than {BASELINE}: {crossing(held)}.
"""
    for setting, rows in seconds.items():
        text += f"""
## Milliseconds a token, allocator {setting.replace("_", " ")}

{grid(rows, 1e3, "{:,.1f}")}
Faster than {BASELINE}: {crossing(rows)}.
"""
    return text


def figure(seconds: Rows, held: Rows):
    """Time and bytes against context."""
    drawn, panels = style.subplots(1, 2, width=11, height=4.2)
    for axes, rows, unit in zip(panels, (seconds, held), (1e3, 1e-6), strict=True):
        for name, row in rows.items():
            axes.plot(list(row), [x * unit for x in row.values()], label=name, **style.look(name))
    style.message(drawn, f"Contexts at which a token takes less time than with exact attention: {crossing(seconds)}")
    style.log_axes(panels[0], 2, xlabel="tokens of context", ylabel="milliseconds a token")
    style.log_axes(panels[1], 2, xlabel="tokens of context", ylabel="cache, MB")
    for axes in panels:
        style.label_ends(axes)
    return drawn

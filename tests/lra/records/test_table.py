"""Tables made from synthetic records: what shares a column, what is missing, failed, marked or averaged."""

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from lra.options import UsageError
from lra.records import measured
from lra.records.compact import column_names
from lra.records.markup import Bold, Bullets, Grid, Heading, Text, html_fragment, latex, markdown, refresh_block
from lra.records.record import SCHEMA
from lra.records.significance import compare_all
from lra.records.table import blocks, build, render, to_csv, write
from tests.lra.builders import FIVE, answer, grid, only, put


def test_empty_results_folder_says_so_instead_of_a_table(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        text = render(folder, "long")
        assert text.startswith("No results yet")
        assert "| attention |" not in text
        assert to_csv(build(folder)).count("\n") == 1


def test_one_seed_shows_its_count_and_wilson_interval(tmp_path):
    put(tmp_path)
    assert only(grid(render(tmp_path, "long"))["softmax"]) == "34.0 (1) [32.5, 35.5]"


def test_three_seeds_show_mean_sample_sd_count_and_interval(tmp_path):
    for seed, correct in enumerate((1328, 1360, 1392)):  # 33.2, 34.0, 34.8
        put(tmp_path, seed=seed, correct=correct)
    # Cochran and Cox: a 0.74 and 0.76 (Wilson), b 0.8 / sqrt 3 = 0.46, t* 2.62 and 2.60
    assert only(grid(render(tmp_path, "long"))["softmax"]) == "34.0 ± 0.8 (3) [31.7, 36.3]"


def test_substitute_data_never_shares_a_column_with_the_real_set(tmp_path):
    put(tmp_path, "image", dataset="CIFAR-10", data="real", correct=1000)
    put(tmp_path, "image", dataset="digits", substitute=True, data="digits", correct=3000)
    put(tmp_path, "image", "performer", dataset="digits", substitute=True, data="digits", correct=2000)
    table = grid(render(tmp_path, "long"))
    real, digits = table["softmax"]
    assert (real, digits) == ("image<br>CIFAR-10<br>100 tokens", "image<br>substitute: digits<br>100 tokens")
    assert [c.split()[0] for c in table["softmax"].values()] == ["25.0", "75.0"]
    assert [c.split()[0] for c in table["performer"].values()] == ["–", "50.0"]


def test_fp32_and_bf16_stand_in_columns_of_their_own_and_fp32_is_averaged(tmp_path):
    for task in FIVE:
        put(tmp_path, task, correct=1000)
    put(tmp_path, correct=3000, precision="bf16")
    row = grid(render(tmp_path, "long"))["softmax"]
    assert [row[f"listops<br>100 tokens{way}"].split()[0] for way in ("", "<br>bf16")] == ["25.0", "75.0"]
    (table,) = build(tmp_path)
    assert len(table.averaged) == 5 and not any(column.execution for column in table.averaged)
    assert list(column_names(table).values())[:2] == ["listops", "listops (bf16)"]


def test_substitute_of_the_same_name_still_has_its_own_column(tmp_path):
    put(tmp_path, "retrieval", dataset="AAN", data="same")
    put(tmp_path, "retrieval", dataset="AAN", data="same", substitute=True, source="embedded")
    headers = list(grid(render(tmp_path, "long"))["softmax"])
    assert headers == ["retrieval<br>AAN<br>100 tokens", "retrieval<br>substitute: AAN<br>100 tokens"]


def test_different_splits_of_one_data_set_never_share_a_column(tmp_path):
    put(tmp_path, "text", data="one")
    put(tmp_path, "text", "performer", data="two")
    table = grid(render(tmp_path, "long"))
    assert len(set(table["softmax"])) == 2
    assert sorted(c.split()[0] for c in table["softmax"].values()) == ["34.0", "–"]


def test_same_examples_from_hub_and_disk_are_the_same_data(tmp_path):
    put(tmp_path, "text", seed=0, source="hub")
    put(tmp_path, "text", seed=1, source="local")
    table = grid(render(tmp_path, "long"))
    assert len(table["majority"]) == 1
    (cell,) = table["softmax"].values()
    assert "(2)" in cell


def test_presets_and_tasks_come_in_order_under_labelled_headings(tmp_path):
    for preset in ("paper", "tiny", "smoke"):
        for task in ("zebra", "pathfinder", "apple", "text"):
            put(tmp_path, task, preset=preset, data=preset)
    text = render(tmp_path, "long")
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    assert headings[1] == "### smoke runs: they show that everything runs, not accuracy"
    assert [h.split()[1].rstrip(":") for h in headings] == ["paper", "smoke", "tiny", "Published,"]
    names = [h.split("<br>")[0] for h in grid(text, preset="tiny")["softmax"]]
    assert names == ["text", "pathfinder", "apple", "zebra"]
    assert "### paper" not in render(tmp_path, "long", ["tiny"])


def test_rows_are_floors_then_constant_then_softmax_then_by_name(tmp_path):
    for attention in ("performer", "softmax", "linformer", "constant"):
        put(tmp_path, attention=attention, floors={"majority": 0.169, "root operator": 0.254, "digits": 0.2})
    table = grid(render(tmp_path, "long"))
    assert list(table) == ["majority", "shortcut", "constant", "softmax", "linformer", "performer"]
    assert only(table["majority"]) == "16.9 [15.8, 18.1]"
    assert only(table["shortcut"]) == "25.4 root operator [24.1, 26.8]"


def test_runs_with_overrides_have_their_own_row(tmp_path):
    put(tmp_path, attention="performer")
    wide = {"num_features": 256}
    put(tmp_path, attention="performer", overrides={"attention.num_features": "256"}, config=wide)
    put(tmp_path, attention="performer", val_rule="legacy", seed=1)
    table = grid(render(tmp_path, "long"))
    plain, *changed = list(table)[2:]
    assert plain == "performer"
    assert changed == ["performer [attention.num_features=256]", "performer [val-rule=legacy]"]
    assert only(table["performer"]).startswith("34.0 (1) ")


def test_configurations_that_differ_without_overrides_do_not_share_a_cell(tmp_path):
    put(tmp_path, attention="performer", config={"num_features": 64, "eps": 0})
    put(tmp_path, attention="performer", config={"num_features": 32, "eps": 0})
    put(tmp_path, lr=1e-3)
    put(tmp_path, lr=1e-4)
    rows = list(grid(render(tmp_path, "long")))[2:]
    assert rows[:2] == ["softmax [train.lr=0.0001]", "softmax [train.lr=0.001]"]
    assert rows[2:] == ["performer [attention.num_features=32]", "performer [attention.num_features=64]"]


def test_missing_cells_and_missing_seeds_are_shown(tmp_path):
    for seed in range(3):
        put(tmp_path, seed=seed)
    put(tmp_path, "text")
    put(tmp_path, attention="performer")
    put(tmp_path, attention="performer", seed=2)
    listops, text = grid(render(tmp_path, "long"))["performer"].values()
    assert listops.startswith("34.0 ± 0.0 (2/3 seeds) [")
    assert text == "–"


def test_more_seeds_of_a_changed_run_do_not_make_the_default_rows_incomplete(tmp_path):
    put(tmp_path)
    for seed in range(2):
        put(tmp_path, seed=seed, overrides={"train.lr": "1e-4"})
    table = grid(render(tmp_path, "long"))
    assert only(table["softmax"]).startswith("34.0 (1) ")
    assert only(table["softmax [train.lr=1e-4]"]).startswith("34.0 ± 0.0 (2) ")


def test_failed_seeds_are_shown_with_their_reason(tmp_path):
    for seed in range(3):
        put(tmp_path, seed=seed, failed="loss is not finite at step 37" if seed == 1 else None)
        put(tmp_path, attention="linformer", seed=seed, failed="a | b")
    table = grid(render(tmp_path, "long"))
    done, failed = only(table["softmax"]).split("<br>")
    assert done.startswith("34.0 ± 0.0 (2/3 seeds) [")
    assert failed == "failed 1/3: loss is not finite at step 37"
    assert only(table["linformer"]) == "failed 3/3: a \\| b"


def test_rows_with_different_seeds_are_remarked(tmp_path):
    put(tmp_path, seed=0)
    put(tmp_path, attention="performer", seed=0)
    assert "same seeds" not in render(tmp_path, "long")
    put(tmp_path, seed=1)
    put(tmp_path, attention="performer", seed=2)
    assert "* listops, 100 tokens: the rows were not run with the same seeds." in render(tmp_path, "long")


def test_averages_exist_only_over_complete_rows(tmp_path):
    for k, task in enumerate(FIVE):
        put(tmp_path, task, correct=400 * (k + 1))  # 10, 20, 30, 40, 50
        if task != "image":
            put(tmp_path, task, "performer")
        put(tmp_path, task, "linformer", failed="no" if task == "text" else None)
    table = grid(render(tmp_path, "long"))
    assert table["softmax"]["average"] == "30.0 [29.4, 30.6]"
    assert table["performer"]["average"] == table["linformer"]["average"] == "–"
    assert table["majority"]["average"].startswith("16.9 [")
    assert table["shortcut"]["average"] == "–"


def test_a_row_that_lacks_a_seed_has_no_average(tmp_path):
    for task in FIVE:
        for seed in (0, 1):
            put(tmp_path, task, seed=seed)
            if (task, seed) != ("text", 1):
                put(tmp_path, task, "performer", seed=seed)
    table = grid(render(tmp_path, "long"))
    assert table["softmax"]["average"].startswith("34.0 [")
    assert table["performer"]["average"] == "–"


def test_no_average_column_without_all_five_tasks(tmp_path):
    for task in FIVE[:4]:
        put(tmp_path, task)
    assert not any("average" in header for header in grid(render(tmp_path, "long"))["softmax"])


def test_average_takes_real_data_first_and_names_its_substitutes(tmp_path):
    for task in FIVE:
        put(tmp_path, task, substitute=task == "retrieval", correct=2000)
    put(tmp_path, "image", dataset="digits", data="digits", substitute=True, correct=4000)
    text = render(tmp_path, "long")
    row = grid(text)["softmax"]
    assert row["average<br>of 5 columns,<br>1 with substitutes"].startswith("50.0 [")
    assert "image, CIFAR-10, 100 tokens; pathfinder, 100 tokens." in text


def test_a_column_of_another_task_is_outside_the_average_and_says_so(tmp_path):
    for task in (*FIVE, "recall"):
        put(tmp_path, task, correct=3600 if task == "recall" else 2000)
    row = grid(render(tmp_path, "long"))["softmax"]
    assert [name for name in row if "outside" in name] == ["recall<br>100 tokens<br>outside the LRA average"]
    assert row["average"].startswith("50.0 [")


def test_dagger_marks_runs_outside_the_closed_protocol(tmp_path):
    put(tmp_path, attention="linformer", params=1.11)
    put(tmp_path, attention="performer", params=1.10)
    put(tmp_path, attention="skyformer", protocol="open")
    text = render(tmp_path, "long")
    marked = [name for name, cells in grid(text).items() if "†" in only(cells)]
    assert marked == ["linformer", "skyformer"]
    assert only(grid(text, 1)["linformer"]).startswith("1.11 † / ")


def share(k, n=2000):
    """Answers of which the first k are right."""
    return np.arange(n) < k


def test_a_column_whose_attention_is_not_shown_to_matter_says_so_with_the_gap(tmp_path):
    for task, k in (("text", 1030), ("listops", 1200)):
        answer(put(tmp_path, task, attention="constant"), share(1000))
        answer(put(tmp_path, task), share(k) & ~share(20))
    (remark,) = [line for line in render(tmp_path, "long").splitlines() if "measure attention" in line]
    assert remark == (
        "* text, IMDb, 100 tokens: constant is not told apart from softmax (softmax − constant: 0.5 points, "
        "[-0.2, 1.2], p 0.2 by Holm), so this column is not shown to measure attention at this size. "
        "One seed each: this compares two runs, not two methods."
    )


def test_where_another_attention_beats_constant_the_fault_is_said_to_be_softmaxs(tmp_path):
    for attention, k in (("constant", 1000), ("softmax", 1002), ("linformer", 1300)):
        answer(put(tmp_path, attention=attention), share(k))
    text = render(tmp_path, "long")
    assert "to measure attention" not in text
    assert "softmax is not shown to use attention here (above constant: linformer)" in text


def test_seeds_that_scatter_are_not_told_apart_where_one_seed_would_be(tmp_path):
    for seed, k in enumerate((1000, 1700)):
        answer(put(tmp_path, attention="constant", seed=seed), share(1000 + seed))
        answer(put(tmp_path, seed=seed), share(k))
    assert "constant is not told apart from softmax" in render(tmp_path, "long")


def test_nothing_is_said_of_averaging_without_predictions(tmp_path):
    put(tmp_path, attention="constant")
    put(tmp_path)
    (remark,) = [line for line in render(tmp_path, "long").splitlines() if "softmax − constant" in line]
    assert "0.0 points, [-2.1, 2.1]; not tested, because" in remark


def test_where_examples_share_documents_intervals_and_tests_hold_their_design_effect(tmp_path):
    for task, dataset in (("retrieval", "Python imports (substitute for AAN)"), ("text", "IMDb")):
        for attention, k in (("constant", 1000), ("softmax", 1030)):
            answer(put(tmp_path, task, attention=attention, dataset=dataset), share(k))
    (table,) = build(tmp_path)
    text, retrieval = table.columns
    gaps = {column.task: comparison.gap for (_, column, _), comparison in compare_all(table).items()}
    accuracies = {column.task: table.cell("softmax", column).estimate for column in (text, retrieval)}
    for wide, narrow in ((found["retrieval"], found["text"]) for found in (gaps, accuracies)):
        assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(1.49**0.5, rel=0.01)
    (remark,) = [line for line in render(tmp_path, "long").splitlines() if "share documents" in line]
    assert remark.startswith("* retrieval") and "1.49 times the binomial" in remark
    assert "retrieval: examples share documents" in " ".join(render(tmp_path, "compact").split())


def test_softmax_that_does_not_clear_the_highest_floor_is_remarked(tmp_path):
    put(tmp_path, floors={"majority": 0.169, "root operator": 0.33})
    put(tmp_path, "text", floors={"majority": 0.169, "bag of bytes": 0.32})
    (remark,) = (line for line in render(tmp_path, "long").splitlines() if "does not clear" in line)
    assert remark == (
        "* listops, 100 tokens: softmax, [32.5, 35.5], does not clear the highest floor, "
        "root operator at 33.0 (a floor keeps no answers: no paired test)."
    )


def test_costs_are_ratios_to_softmax_on_the_same_machine(tmp_path):
    put(tmp_path, peak=200, seed=0, speed=1.0)
    put(tmp_path, peak=400, seed=1)
    put(tmp_path, peak=1000, overrides={"train.lr": "1"}, lr=1.0)
    put(tmp_path, attention="performer", peak=250, overrides={"train.lr": "1"}, lr=1.0)
    for seed in range(3):
        put(tmp_path, attention="performer", seed=seed, speed=1.7, peak=150, params=1.02)
    put(tmp_path, attention="linformer", speed=2.0, peak=150, threads=8)
    put(tmp_path, attention="constant")
    costs = {name: only(cells) for name, cells in grid(render(tmp_path, "long"), 1).items()}
    assert costs["softmax"] == "1.00 / 1.00 / 1.00"
    assert costs["performer [train.lr=1]"] == "1.00 / – / 0.25"  # against softmax at that setting
    assert costs["performer"] == "1.02 / 1.70 / 0.50"
    assert costs["linformer"] == "1.00 / 2.00 / –"  # its memory was measured elsewhere
    assert costs["constant"] == "1.00 / – / –"


def test_runs_with_uncommitted_changes_have_a_footnote(tmp_path):
    put(tmp_path)
    assert "uncommitted" not in render(tmp_path, "long")
    put(tmp_path, attention="performer", dirty=True)
    note = "* 1 of 2 runs were made with uncommitted changes in the code: listops/performer."
    assert note in render(tmp_path, "long")


def test_published_numbers_stand_once_in_their_own_block_after_the_tables(tmp_path):
    for preset in ("smoke", "small"):
        put(tmp_path, preset=preset, attention="performer", data=preset)
    sources, (ours, theirs) = measured.PUBLISHED, render(tmp_path, "long").split("### Published, not rerun")
    assert "18.01" not in ours
    assert "| Performer | 18.01 | 65.40 | 53.82 | 42.77 | 77.05 | 51.41 |" in theirs
    assert "deterministic ReLU features" in theirs
    assert all(p["citation"] in theirs and p["caveat"] in theirs for p in (*sources["accuracy"], sources["speed"]))


def test_published_averages_match_those_the_original_paper_prints():
    rows = measured.PUBLISHED["accuracy"][0]["rows"]
    printed = {"Local attention": 46.06, "Linear Transformer": 50.55, "Reformer": 50.67, "Linformer": 51.36,
               "Performer": 51.41, "Synthesizer": 52.88}  # fmt: skip
    for name, average in printed.items():
        assert sum(rows[name]) / 5 == pytest.approx(average, abs=0.006), name


def test_regenerating_from_the_same_records_gives_the_same_bytes(tmp_path):
    arguments = [(t, a, s) for t in FIVE for a in ("softmax", "constant", "performer") for s in (0, 1)]
    for task, attention, seed in arguments:
        put(tmp_path / "one", task, attention, seed, correct=1300 + 7 * seed)
    for task, attention, seed in reversed(arguments):
        put(tmp_path / "two", task, attention, seed, correct=1300 + 7 * seed)
    first, second = (build(tmp_path / name) for name in ("one", "two"))
    assert blocks(first) == blocks(second) == blocks(build(tmp_path / "one"))
    assert to_csv(first) == to_csv(second)


def test_names_from_records_cannot_break_the_table_or_the_page(tmp_path):
    name = "a|b\n<!-- results:end --> **c** [d](e)"
    put(tmp_path, "text", "performer", dataset=name, overrides={"train.lr": "1|0\n"}, failed="<img> | no")
    text = render(tmp_path, "long")
    table = grid(text)
    (header,) = table["majority"]
    assert "a\\|b &lt;!-- results:end --&gt; \\*\\*c\\*\\* [d\\](e)" in header
    assert "performer [train.lr=1\\|0]" in table
    assert "<!--" not in text and "<img>" not in text and "**" not in text


def test_csv_holds_raw_counts_and_one_line_per_record(tmp_path):
    put(tmp_path, attention="performer", speed=1.7, peak=123, overrides={"train.lr": "1e-3"}, dataset='a,"b"')
    put(tmp_path, seed=1, failed="=HYPERLINK(1)", dataset="=1+1")
    failed, done = csv.DictReader(io.StringIO(to_csv(build(tmp_path))))
    assert (done["dataset"], done["overrides"], done["seed"]) == ('a,"b"', "train.lr=1e-3", "0")
    assert (done["n_correct"], done["n_test"], done["accuracy"]) == ("1360", "4000", "0.340000")
    assert (done["wilson_low"], done["wilson_high"]) == ("0.325480", "0.354827")
    assert (done["speed_ratio"], done["peak_bytes"], done["status"]) == ("1.7", "123", "ok")
    assert (failed["n_correct"], failed["accuracy"], failed["n_test"]) == ("", "", "4000")
    assert failed["dataset"] == "'=1+1"  # not a formula
    assert failed["status"] == "failed: =HYPERLINK(1)"


def test_block_replaces_what_stands_between_the_markers_and_nothing_else():
    text = "# Title\n<!-- results:begin -->\nold\n<!-- results:end -->\nend\n"
    fresh = refresh_block(text, "results", "new \\1\n")
    assert fresh == "# Title\n<!-- results:begin -->\nnew \\1\n<!-- results:end -->\nend\n"
    assert refresh_block(fresh, "results", "new \\1\n") == fresh


def test_writing_keeps_a_readme_around_its_block_and_refuses_one_without_markers(tmp_path):
    put(tmp_path)
    text = render(tmp_path, "long")
    readme, fresh = tmp_path / "README.md", tmp_path / "results" / "TABLE.md"
    readme.write_text("# Title\n")
    with pytest.raises(UsageError, match="README.md: .*<!-- results:begin -->"):
        write(readme, text)
    assert readme.read_text() == "# Title\n"
    readme.write_text("# Title\n<!-- results:begin -->\n<!-- results:end -->\nend\n")
    for path, before, after in ((readme, "# Title\n", "end\n"), (fresh, "", "")):
        write(path, "old")
        write(path, text)
        block = f"<!-- results:begin -->\n{text.strip()}\n<!-- results:end -->\n"
        assert path.read_text() == before + block + after


def test_csv_is_written_as_it_is(tmp_path):
    put(tmp_path)
    path = tmp_path / "table.csv"
    write(path, render(tmp_path, "csv"))
    assert path.read_text() == to_csv(build(tmp_path))


ASCII = "".join(map(chr, range(32, 127)))
HOSTILE = f"{ASCII} \\input{{x}} ^^5c % \n <script>alert(1)</script> ± é − ☃ \x07 [a](b) ![c](d) $$"
DOCUMENT = [
    Heading(HOSTILE),
    Text(HOSTILE),
    Bullets((HOSTILE, "plain")),
    Grid(("name", "a\nb"), ((HOSTILE, Bold("1.0 [0.5, 1.5]")), *(("x", str(i)) for i in range(70)))),
]


def test_tables_come_in_every_format_with_the_same_cells(tmp_path):
    for seed in (0, 1):
        put(tmp_path, seed=seed, speed=1.5, floors={"majority": 0.2, "bag": 0.3})
    for form, interval in (("long", "[32.5, 35.5]"), ("tex", "{[}32.5, 35.5{]}")):
        text = render(tmp_path, form)
        for cell in ("softmax", "34.0", interval, "30.0 bag", "majority", "published", "18.01"):
            assert cell in text, (form, cell)
    assert render(tmp_path, "csv").splitlines()[0].startswith("task,dataset")


def test_html_holds_nothing_of_a_name_but_text():
    reader = Tags()
    reader.feed(html_fragment(DOCUMENT))
    assert reader.found <= set("h3 p ul li div table thead tr th td br strong".split())
    assert "alert(1)" in html_fragment(DOCUMENT)


class Tags(HTMLParser):
    """The names of the elements of a page."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attrs):
        """Also notes the names of attributes that run code."""
        self.found |= {tag, *(name for name, _ in attrs if name.startswith("on"))}


def test_latex_escapes_what_would_be_a_command_and_closes_what_it_opens():
    text = latex(DOCUMENT)
    assert text.isascii() and r"\input" not in text and "^^" not in text
    for name in ("document", "tabular", "itemize", "lrbox"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") > 0
    rules = [text.count(rf"\{rule}") for rule in ("toprule", "midrule", "bottomrule")]
    assert rules == [3, 3, 3]  # 71 rows on three pages
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    grids = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert all(len(re.findall(r"(?<!\\)&", line)) == 1 and line.endswith(r"\\") for line in grids)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here: its structure is tested above")
def test_latex_compiles(tmp_path):
    put(tmp_path, "text", "performer", dataset=HOSTILE, overrides={"train.lr": "1|0\n"}, failed="<img> | no")
    for name, text in (("hostile", latex(DOCUMENT)), ("table", render(tmp_path, "tex"))):
        (tmp_path / f"{name}.tex").write_text(text)
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "-no-shell-escape", f"{name}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:]
        assert (tmp_path / f"{name}.pdf").stat().st_size > 5000


def test_brackets_are_escaped_only_where_they_would_be_a_link():
    assert markdown([Text("[1, 2] [a](b) [c][d] [e]: f")]) == r"[1, 2] [a\](b) [c\][d] [e\]: f" + "\n"


def test_bold_cells_are_bold_in_every_language():
    grid = [Grid(("a", "b"), (("x", Bold("1\n2")),))]
    assert "**1**<br>**2**" in markdown(grid)
    assert "<strong>1</strong><br><strong>2</strong>" in html_fragment(grid)
    assert r"\shortstack[r]{\textbf{1}\\\textbf{2}}" in latex(grid)


@pytest.mark.parametrize(
    "text",
    ["", "<!-- results:begin -->", "<!-- results:end --> <!-- results:begin -->",
     "<!-- results:begin --><!-- results:begin --><!-- results:end -->"],
)  # fmt: skip
def test_block_without_its_markers_is_an_error(text):
    with pytest.raises(UsageError, match="<!-- results:begin -->"):
        refresh_block(text, "results", "new")


def broken(results):
    """Lines that a build reports, one for each file it left out."""
    lines = []
    tables = build(results, report=lines.append)
    return [len(t.entries) for t in tables], lines


def test_a_half_written_record_is_reported_and_the_rest_is_built(tmp_path):
    put(tmp_path, seed=1)
    path = put(tmp_path)
    path.write_text(path.read_text()[:200])
    sizes, (line,) = broken(tmp_path)
    assert sizes == [1] and "seed0.json is not a JSON record" in line


def test_records_of_another_schema_are_reported_and_the_rest_is_built(tmp_path):
    put(tmp_path, seed=1)
    path = put(tmp_path)
    path.write_text(path.read_text().replace(SCHEMA, "lra-record/9"))
    sizes, (line,) = broken(tmp_path)
    assert sizes == [1] and f"is not a record of schema '{SCHEMA}': found 'lra-record/9'" in line


@pytest.mark.parametrize(("old", "new"), [('"n_correct": 1360', '"n_correct": 4001'), ('"preset"', '"pre"')])
def test_a_record_that_makes_no_sense_is_reported_and_the_rest_is_built(tmp_path, old, new):
    put(tmp_path, seed=1)
    path = put(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    sizes, (line,) = broken(tmp_path)
    assert sizes == [1] and "seed0.json is not a usable record" in line


def test_of_a_run_recorded_twice_neither_copy_is_shown(tmp_path):
    put(tmp_path, seed=1)
    path = put(tmp_path)
    copy = path.parent.with_name("copy") / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    sizes, (line,) = broken(tmp_path)
    assert sizes == [1] and "record the same run" in line and str(path) in line and str(copy) in line


def test_an_unknown_preset_is_a_usage_error_with_the_nearest(tmp_path):
    put(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'small'"):
        build(tmp_path, ["smal"])

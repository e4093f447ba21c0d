"""The leaderboard page: what it holds, and what it does in a real browser."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

import lra.leaderboard.levels
import lra.leaderboard.page
from lra.__main__ import main
from lra.leaderboard.levels import Reproduction, Verdict
from lra.records.markup import Bullets, Grid, Heading, Text, html_fragment, markdown
from lra.records.record import SCHEMA
from lra.records.stats import Estimate
from tests.conftest import ROOT
from tests.lra.builders import FIVE, LINEAR, QUADRATIC, answer, bench, put
from tests.lra.figures.builders import HOSTILE, give_curve


def built(results, *words, code=0):
    """Build the page; returns its text."""
    assert main(["leaderboard", "build", f"--results={results}", *words]) == code
    return (results / "index.html").read_text()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Five tasks by three methods and two seeds, a smoke run, an open one, a failed one, a hostile one."""
    folder = tmp_path_factory.mktemp("page")
    accuracy = {"softmax": 2000, "constant": 1600, "performer": 1900}
    for n, task in enumerate(FIVE):
        for attention, correct in accuracy.items():
            for seed in (0, 1):
                speed = {"softmax": 1.0, "constant": 2.5, "performer": 1.5}[attention]
                path = put(folder, task, attention, seed, correct + 40 * n + seed, speed=speed, peak=1000)
                give_curve(path)
    put(folder, "listops", preset="smoke", data="smoke", correct=900)
    put(folder, "listops", "wide", protocol="open", params=1.5, correct=3000, config={"num_features": 1})
    put(folder, "listops", "broken", failed="loss is not finite at step 7", config={"num_features": 2})
    path = put(folder, "listops", "evil", dataset=f"z{HOSTILE}", correct=100, data="hostile", floors={HOSTILE: 0.1})
    record = json.loads(path.read_text())
    record["model"]["attention"] = record["command"] = record["cost"]["gpu"] = HOSTILE
    path.write_text(json.dumps(record))
    bench(folder, [*LINEAR, *QUADRATIC])
    return folder


def verdicts(places, level=1):
    """softmax V2, performer V2 and V1, wide V0 with a reason, a V4 that is disputed, the others unverified."""
    results = places.results
    levels = {"softmax": (0, 1, 2), "performer": (0, 1)}
    found = {}
    for path in (results / "records").glob("*/*/*/seed*.json"):
        place = path.relative_to(results)
        found[place] = Verdict(levels.get(place.parts[2], ()))
        if place.parts[2] == "performer" and path.stem == "seed1":
            found[place] = Verdict((0, 1, 2), reason="")
        if place.parts[2] == "wide":
            found[place] = Verdict((0,), False, f"outside code {HOSTILE}")
        if place.parts[1:3] == ("text", "constant"):
            gap = Estimate(0.03, 0.01, 0.05)
            found[place] = Verdict((0, 1), False, "", Reproduction("else", 3, "disputed", gap, 0.01))
    return found


@pytest.fixture(scope="module", autouse=True)
def known():
    """What `judge` answers in this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lra.leaderboard.page, "judge", verdicts)
        yield patch


@pytest.fixture(scope="module")
def page(results, known):
    """The page of `results`, as text."""
    return built(results)


def test_every_cell_is_a_row_with_its_accuracy_interval_ratios_and_commands(page):
    assert page.count("<tr data-preset=") == (5 * 3 + 4) + 7, "and a floor for each of seven columns"
    row = next(r for r in page.split("<tr data-preset=")[1:] if 'data-task="image"' in r and ">performer<" in r)
    assert "<strong>50.5</strong> ± 0.0" in row and "2 of 2" in row and ">1.50<" in row and ">1.00<" in row
    for seed in (0, 1):
        assert f"<code>python -m lra train image --attention performer --seed {seed}</code>" in row
    assert re.search(r'href="records/image/performer/[0-9a-f]{16}/seed0.json"', row)
    assert "loss is not finite at step 7" in page


def test_badge_is_that_of_the_least_verified_run_with_its_reason(page):
    badges = {}
    for row in page.split("<tr data-preset=")[1:]:
        name = re.search('class="name">([^<]*)<', row)[1]
        task = re.search('data-task="([^"]*)"', row)[1]
        if 'class="floor"' not in row:
            badges[task, name] = re.search('title="([^"]*)">([^<]*)</span></td>', row).groups()
    assert badges["image", "softmax"][1] == "V2" and badges["image", "performer"][1] == "V1"
    assert badges["image", "constant"][1] == "unverified"
    assert badges["listops", "wide"][1] == "V0" and "outside code" in badges["listops", "wide"][0]
    assert badges["text", "constant"][1] == "V1 disputed" and "disputed by else" in badges["text", "constant"][0]


def test_a_rejected_record_has_no_row_and_no_badge_and_is_listed_with_the_reason(tmp_path):
    put(tmp_path)  # no whole record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lra.leaderboard.page, "judge", lra.leaderboard.levels.judge)
        page = built(tmp_path, code=1)
    assert "Left out of every table, average and figure" in page and "seed0.json: rejected: " in page
    assert "<tr data-preset=" not in page and 'class="badge"' not in page


def test_page_names_no_place_but_its_own_records(page):
    assert not re.findall(r"https?://(?!www\.w3\.org/)", page)  # names of SVG, asked for by nobody
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert all(link.startswith(("records/", "data:", "#")) for link in links)


def test_names_from_records_are_text(page):
    assert page.count("<script>") == 1 and "<img" not in page
    assert "&lt;script&gt;hacked=1" in page and "{{7*7}}" in page and "\u202e" not in page


def rows_of(page, task, preset="small"):
    """The rows of a task, as text, in the order of the page."""
    rows = page.split("<tr data-preset=")[1:]
    return [r for r in rows if r.startswith(f'"{preset}"') and f'data-task="{task}"' in r]


def test_rows_are_ranked_within_their_task_and_floors_stand_between_them_without_a_rank(page):
    rows = rows_of(page, "text")
    assert [re.search('class="name">([^<]*)<', r)[1] for r in rows] == [
        "softmax", "performer", "constant", "floor: majority",
    ]  # fmt: skip
    assert [re.search('data-v="([^"]*)"', r)[1] for r in rows] == ["1", "2", "3", ""]
    assert "<strong>16.9</strong>" in rows[-1] and "badge" not in rows[-1]


def test_strips_of_a_task_share_an_axis_with_the_floor_and_softmax(page):
    strips = [re.search("<svg class=.strip.*?</svg>", r, re.DOTALL)[0] for r in rows_of(page, "image")]
    for part in ('class="axis" d="([^"]*)"', 'class="floors" d="([^"]*)"', 'class="softmax" d="([^"]*)"'):
        assert len({re.search(part, strip)[1] for strip in strips}) == 1, part
    assert {tuple(re.findall(r">(\d+)</text>", strip)) for strip in strips} == {("17", "55")}  # percent
    mean, softmax = (re.search(f"{name}M([0-9.]+) ", strips[0])[1] for name in ('"', 'softmax" d="'))
    assert re.search(f'd="M{softmax} 4v8"', strips[0]), "softmax is first, and its mean is at its line"


def test_warnings_and_ways_to_figures_and_tables_come_before_the_rows_and_two_builds_are_the_same_bytes(tmp_path):
    for attention in ("softmax", "constant"):
        for seed in range(3):
            path = put(tmp_path, attention=attention, seed=seed)
            answer(path, np.arange(4000) < 1300 + seed)
            give_curve(path)
    page = built(tmp_path)
    assert 0 < page.index("constant ties softmax") < page.index('id="board"')
    for name in ("leaderboard", "figures", "tables"):
        assert page.index(f'href="#{name}"') < page.index('id="board"') and f'id="{name}"' in page
    assert 'href="#gemma"' not in page, "nothing of Gemma was measured"
    assert "<option selected>small</option>" in page and 'title="sort by speed"' in page
    before = {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    assert len(before) >= 4 and built(tmp_path) == page
    assert {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()} == before


def test_gemma_is_on_the_page_and_its_files_are_text_and_images(tmp_path):
    put(tmp_path)
    folder = tmp_path / "gemma"
    (folder / "figures").mkdir(parents=True)
    grid = Grid(("attention", "accuracy"), ((f"{HOSTILE} | \\ *x*", "12.3\n[1, 2]"), ("softmax", "")))
    blocks = [Text("What `this` is."), Heading("270m, *layers*"), grid, Bullets(("one", "<b>two"))]
    (folder / "swap.md").write_text(markdown(blocks))
    (folder / "figures" / "swap.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>")
    page = built(tmp_path)
    assert html_fragment(blocks) in page and 'href="#gemma"' in page
    assert page.count("<script>") == 1 and page.count('<img src="data:image/svg+xml;base64,') == 1


def test_figures_are_inline_and_no_two_elements_share_a_name(page, results):
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert all(target in names for target in re.findall(r"url\(#([^)]+)\)", page))
    found = sorted(p.name for p in (results / "figures").glob("*.svg"))
    kinds = ("accuracy", "bubble", "curves")
    assert {f"small-{kind}.svg" for kind in kinds} | {"lengths.svg"} <= set(found)
    assert page.count("<figure>") == len(found) and all(p.with_suffix(".png").exists() for p in
                                                        (results / "figures").glob("*.svg"))  # fmt: skip


def test_page_without_records_says_so(tmp_path, capsys):
    page = built(tmp_path)
    assert "No results yet" in page and "<script>" not in page and "Published, not rerun" in page
    assert "nothing to draw it from" in capsys.readouterr().out


def test_half_written_record_another_schema_and_a_copy_are_named_and_the_rest_is_built(tmp_path, capsys):
    put(tmp_path)
    half, other = put(tmp_path, seed=1), put(tmp_path, "text")
    half.write_text(half.read_text()[:300])
    other.write_text(other.read_text().replace(SCHEMA, "lra-record/7"))
    page = built(tmp_path, code=1)
    assert page.count("<tr data-preset=") == 2, "one row and its floor"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == 2 and str(half) in lines[0] and str(other) in lines[1]
    assert str(tmp_path) not in page
    assert half.relative_to(tmp_path).as_posix() in page and "lra-record/7" in page


def test_a_name_of_a_record_never_becomes_a_path(tmp_path):
    put(tmp_path / "results", preset="../../escaped")
    built(tmp_path / "results")
    assert not list(tmp_path.rglob("*escaped*"))


def test_damaged_files_of_others_are_one_line(tmp_path, error_line):
    put(tmp_path)
    path = bench(tmp_path, [{"name": "a"}])
    assert str(path) in error_line("leaderboard", "build", "--results", tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_serve_shows_the_page_on_loopback_alone_and_ends_on_interrupt(results, page, error_line, tmp_path):
    assert "leaderboard build" in error_line("leaderboard", "serve", "--results", tmp_path)
    command = [sys.executable, "-m", "lra", "leaderboard", "serve", "--results", str(results), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = re.match(r"http://127\.0\.0\.1:\d+/index\.html", server.stdout.readline())[0]
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(url, timeout=20) as answer:
                assert answer.read().decode() == page
            with pytest.raises(urllib.error.HTTPError) as outside:
                opener.open(url.replace("index.html", "../../../../../../etc/passwd"), timeout=20)
            outside.value.close()
            assert outside.value.code == 404
        finally:
            server.terminate()  # the same way as Ctrl-C; a background job may ignore SIGINT
            try:
                code = server.wait(20)
            finally:
                server.kill()
        assert code == 0


# In a browser

SHOWN = "return [...document.querySelectorAll('#board tbody tr')].filter(r => !r.hidden)"
NAMES = SHOWN + ".map(r => r.cells[1].textContent.trim())"
ACCURACIES = SHOWN + ".map(r => r.cells[6].dataset.v === '' ? null : Number(r.cells[6].dataset.v))"


@pytest.fixture(scope="module")
def browser(results, page, chromium):
    """A window with the page, which asked for nothing and said nothing while it was loaded."""
    with chromium() as window:
        window.open((results / "index.html").as_uri())
        yield window
        assert window.console() == []
        asked = [url for url in window.requests() if not url.startswith("data:")]
        assert set(asked) == {(results / "index.html").as_uri()}


@pytest.fixture
def fresh(browser, results):
    """The page as it is after loading."""
    browser.open((results / "index.html").as_uri())
    return browser


def head(n):
    """The button that sorts by the nth column."""
    return f"#board thead th:nth-child({n}) button"


def test_a_click_sorts_by_accuracy_best_first_then_worst_first_failed_runs_last(fresh):
    for order in (-1, 1):
        fresh.click(head(7))
        *values, last = fresh.run(ACCURACIES)
        assert last is None and len(values) == 23 and values == sorted(values, key=lambda v: order * v)
        state = "return document.querySelector('[aria-sort]').getAttribute('aria-sort')"
        assert fresh.run(state) == ("descending" if order < 0 else "ascending")
    fresh.click(head(2))
    names = [n.lower() for n in fresh.run(NAMES)]
    assert names == sorted(names) and fresh.run("return document.querySelectorAll('[aria-sort]').length") == 1


def test_a_click_sorts_by_badge_most_verified_first(fresh):
    fresh.click(head(12))
    levels = fresh.run(SHOWN + ".filter(r => r.className !== 'floor').map(r => Number(r.cells[11].dataset.v))")
    assert levels == sorted(levels, reverse=True) and levels[0] == 2 and levels[-1] == -1
    badges = SHOWN + ".filter(r => r.className !== 'floor').map(r => r.cells[11].textContent.trim())"
    shown = fresh.run(badges)
    assert shown[:5] == ["V2"] * 5 and shown[-1] == "unverified"
    colour = "return getComputedStyle(document.querySelector('.badge[data-ok]')).color"
    assert fresh.run(colour) == "rgb(26, 127, 71)"


def test_filters_narrow_the_rows_and_say_how_many_are_left(fresh):
    count = "return document.getElementById('count').textContent"
    assert fresh.run(count) == "24 of 26 rows", "smoke runs are apart"
    fresh.type("select[name=task]", "text")
    assert fresh.run(NAMES) == ["softmax", "performer", "constant", "floor: majority"]
    assert fresh.run(count) == "4 of 26 rows"
    fresh.type("input[name=search]", "PERF")
    assert fresh.run(NAMES) == ["performer"]
    fresh.open(fresh.run("return location.href"))
    fresh.type("select[name=protocol]", "open")
    assert [name for name in fresh.run(NAMES) if not name.startswith("floor: ")] == ["wide"]
    fresh.open(fresh.run("return location.href"))
    fresh.type("select[name=preset]", "smoke")
    assert fresh.run(NAMES) == ["softmax", "floor: majority"]
    devices = "return [...document.querySelector('select[name=device]').options].map(o => o.text)"
    assert [d.split(">")[0] for d in fresh.run(devices)] == ["all", "</td", "cpu"]


def test_nothing_hostile_ran_and_its_name_is_read_as_it_is(fresh):
    assert fresh.run("return typeof hacked") == "undefined"
    assert fresh.run("return document.images.length") == 0
    assert any(name.startswith("</td></script><script>hacked=1") for name in fresh.run(NAMES))
    fresh.run("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 1'}))")
    assert fresh.run("return typeof hacked") == "undefined"  # the policy lets the page's own script run alone
    (refused,) = fresh.console()
    assert "Content Security Policy" in refused["message"]


def test_command_of_a_row_is_shown_on_a_click(fresh):
    visible = "return document.querySelector('#board tbody tr details code').checkVisibility()"
    assert not fresh.run(visible)
    fresh.click("#board tbody tr details summary")
    assert fresh.run(visible)


@pytest.mark.parametrize("width", [910, 1250])
def test_a_window_narrower_than_the_board_cuts_nothing_off(results, page, width, chromium):
    with chromium(width, 900) as window:
        window.open((results / "index.html").as_uri())
        assert window.run("return document.documentElement.scrollWidth <= innerWidth")


def test_page_is_readable_on_a_phone_and_in_the_dark(results, page, tmp_path, chromium):
    with chromium(500, 900, dark=True) as phone:  # Chromium's narrowest window
        phone.open((results / "index.html").as_uri())
        assert phone.run("return document.documentElement.scrollWidth <= innerWidth")
        assert phone.run("return getComputedStyle(document.querySelector('#board tbody tr')).display") == "grid"
        assert phone.run("return getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)"
        ink = "return getComputedStyle(document.querySelector('figure svg text')).fill"
        assert phone.run(ink) == "rgb(230, 233, 237)"
        phone.screenshot(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").stat().st_size > 10_000
        assert phone.console() == []


def synthetic(results, n):
    """n records of 5 tasks, in plain files: put() would wait for the disk at each."""
    path = put(results, correct=1000, speed=1.0, peak=1000)
    give_curve(path)
    text = path.read_text()
    path.unlink()
    for i in range(n):
        task, attention, seed = FIVE[i % 5], f"method{i // 5 % 200:03d}", i // 1000
        one = text.replace('"listops"', f'"{task}"').replace('"softmax"', f'"{attention}"')
        one = one.replace('"seed": 0', f'"seed": {seed}').replace('"n_correct": 1000', f'"n_correct": {1000 + i % 997}')
        folder = results / "records" / task / attention / "0123456789abcdef"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"seed{seed}.json").write_text(one)


@pytest.fixture(scope="module")
def large(tmp_path_factory, known):
    """A page of two thousand records, and the seconds of this process (other jobs do not count) to build it."""
    folder = tmp_path_factory.mktemp("large")
    synthetic(folder, 2000)
    start = time.process_time()
    page = built(folder)
    return folder / "index.html", page, time.process_time() - start


def test_page_of_two_thousand_records_is_built_in_ten_seconds(large):
    _, page, seconds = large
    assert seconds < 10
    assert page.count("<tr data-preset=") == 1000 + 5 and page.count("<code>") >= 2000


def test_page_of_two_thousand_records_stays_usable(large, chromium):
    path, *_ = large
    with chromium() as window:
        window.open(path.as_uri())
        sort = "document.querySelectorAll('#board th button')[6].click()"
        assert window.run(f"const start = performance.now(); {sort}; return performance.now() - start") < 10_000
        window.type("input[name=search]", "method007")
        assert len(window.run(NAMES)) == 5 and window.console() == []

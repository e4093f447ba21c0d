"""The leaderboard page: what it holds, and what it does in a real browser."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import lra.leaderboard.page
import lra.leaderboard.submit
from lra.__main__ import main
from lra.leaderboard.submit import Reproduction, Verdict
from lra.records.record import SCHEMA
from lra.records.stats import Estimate
from tests.conftest import ROOT
from tests.lra.builders import FIVE, LINEAR, QUADRATIC, bench, put
from tests.lra.leaderboard.browser import ABSENT, CHROMIUM, DRIVER, Browser

HOSTILE = "</td></script><script>hacked=1</script><img src=x onerror=hacked=1>\"'>{{7*7}}\u202e&#60;"
CURVE = [[step, split, 1.0, step, 1000] for step in (100, 200, 300) for split in ("train", "val")]


def built(results, *words, code=0):
    """Build the page; returns its text."""
    assert main(["leaderboard", "build", f"--results={results}", *words]) == code
    return (results / "index.html").read_text()


def give_curve(path):
    """Add a learning curve to a record."""
    record = json.loads(path.read_text())
    record["result"]["curve"] = CURVE
    path.write_text(json.dumps(record))


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
    path = put(
        folder, "listops", "evil", dataset=f"z{HOSTILE}", correct=100, data="hostile", floors={HOSTILE: 0.1}
    )
    record = json.loads(path.read_text())
    record["model"]["attention"] = record["command"] = record["cost"]["gpu"] = HOSTILE
    path.write_text(json.dumps(record))
    bench(folder, [*LINEAR, *QUADRATIC])
    return folder


def verdicts(results):
    """softmax V2, performer V2 and V1, wide rejected, a V4 that is disputed, the others never verified."""
    levels = {"softmax": (0, 1, 2), "performer": (0, 1)}
    found = {}
    for path in (results / "records").glob("*/*/*/seed*.json"):
        place = path.relative_to(results)
        found[place] = Verdict(levels.get(place.parts[2], ()))
        if place.parts[2] == "performer" and path.stem == "seed1":
            found[place] = Verdict((0, 1, 2), reason="")
        if place.parts[2] == "wide":
            found[place] = Verdict((), True, f"n_correct was changed {HOSTILE}")
        if place.parts[1:3] == ("text", "constant"):
            gap = Estimate(0.03, 0.01, 0.05)
            found[place] = Verdict((0, 1), False, "", Reproduction("else", 3, "disputed", gap, 0.01))
    return found


@pytest.fixture(scope="module", autouse=True)
def known():
    """What `verified` answers in this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lra.leaderboard.page, "verified", verdicts)
        yield patch


@pytest.fixture(scope="module")
def page(results, known):
    """The page of `results`, as text."""
    return built(results)


def test_every_cell_is_a_row_with_its_accuracy_interval_ratios_and_commands(page):
    assert page.count("<tr data-preset=") == 5 * 3 + 4
    row = next(
        r for r in page.split("<tr data-preset=")[1:] if 'data-task="image"' in r and ">performer<" in r
    )
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
        badges[task, name] = re.search('title="([^"]*)">([^<]*)</span></td>', row).groups()
    assert badges["image", "softmax"][1] == "V2" and badges["image", "performer"][1] == "V1"
    assert (
        badges["image", "constant"][1] == "unverified" and "never verified" in badges["image", "constant"][0]
    )
    assert (
        badges["listops", "wide"][1] == "rejected" and "n_correct was changed" in badges["listops", "wide"][0]
    )
    assert (
        badges["text", "constant"][1] == "V1 disputed" and "disputed by else" in badges["text", "constant"][0]
    )


def test_badges_of_a_folder_are_those_of_its_verification(tmp_path, known):
    put(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lra.leaderboard.page, "verified", lra.leaderboard.submit.verified)
        assert ">unverified</span>" in built(tmp_path)
        assert main(["leaderboard", "verify", f"--results={tmp_path}"]) == 1  # put() writes no whole record
        page = built(tmp_path)
    assert ">rejected</span>" in page and json.loads((tmp_path / "verification.json").read_text())["records"]


def test_page_names_no_place_but_its_own_records(page):
    assert not re.findall(r"https?://(?!www\.w3\.org/)", page)  # names of SVG, asked for by nobody
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert all(link.startswith(("records/", "data:,", "#")) for link in links)


def test_names_from_records_are_text(page):
    assert page.count("<script>") == 1 and "<img" not in page
    assert "&lt;script&gt;hacked=1" in page and "{{7*7}}" in page and "\u202e" not in page


def test_figures_are_inline_and_no_two_elements_share_a_name(page, results):
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert all(target in names for target in re.findall(r"url\(#([^)]+)\)", page))
    found = sorted(p.name for p in (results / "figures").glob("*.svg"))
    kinds = ("accuracy", "bubble", "curves")
    assert {f"small-{kind}.svg" for kind in kinds} | {"lengths.svg"} <= set(found)
    assert page.count("<figure>") == len(found) and all(p.with_suffix(".png").exists() for p in
                                                        (results / "figures").glob("*.svg"))  # fmt: skip


def test_two_builds_are_the_same_bytes(results, page):
    before = {p.name: p.read_bytes() for p in (results / "figures").iterdir()}
    assert built(results) == page
    assert {p.name: p.read_bytes() for p in (results / "figures").iterdir()} == before


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
    assert page.count("<tr data-preset=") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == 2 and str(half) in lines[0] and str(other) in lines[1]
    assert str(tmp_path) not in page
    assert half.relative_to(tmp_path).as_posix() in page and "lra-record/7" in page


def test_a_name_of_a_record_never_becomes_a_path(tmp_path):
    put(tmp_path / "results", preset="../../escaped")
    built(tmp_path / "results")
    assert not list(tmp_path.rglob("*escaped*"))


def test_damaged_files_of_others_are_one_line(tmp_path, error_line, monkeypatch):
    monkeypatch.setattr(lra.leaderboard.page, "verified", lra.leaderboard.submit.verified)
    put(tmp_path)
    path = bench(tmp_path, [{"name": "a"}])
    assert str(path) in error_line("leaderboard", "build", "--results", tmp_path)
    path.unlink()
    (tmp_path / "verification.json").write_text("[")
    assert "verification.json is damaged" in error_line("leaderboard", "build", "--results", tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_serve_shows_the_page_on_loopback_alone_and_ends_on_interrupt(results, page, error_line, tmp_path):
    assert "leaderboard build" in error_line("leaderboard", "serve", "--results", tmp_path)
    command = [sys.executable, "-m", "lra", "leaderboard", "serve", "--results", str(results), "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
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

needs_browser = pytest.mark.skipif(not (DRIVER and CHROMIUM), reason=ABSENT)
SHOWN = "return [...document.querySelectorAll('#board tbody tr')].filter(r => !r.hidden)"
NAMES = SHOWN + ".map(r => r.cells[0].textContent.trim())"
ACCURACIES = SHOWN + ".map(r => r.cells[5].dataset.v === '' ? null : Number(r.cells[5].dataset.v))"


@pytest.fixture(scope="module")
def browser(results, page):
    """A window with the page, which asked for nothing and said nothing while it was loaded."""
    with Browser() as window:
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


@needs_browser
def test_a_click_sorts_by_accuracy_best_first_then_worst_first_failed_runs_last(fresh):
    for order in (-1, 1):
        fresh.click(head(6))
        *values, last = fresh.run(ACCURACIES)
        assert last is None and len(values) == 18 and values == sorted(values, key=lambda v: order * v)
        state = "return document.querySelector('[aria-sort]').getAttribute('aria-sort')"
        assert fresh.run(state) == ("descending" if order < 0 else "ascending")
    fresh.click(head(1))
    names = [n.lower() for n in fresh.run(NAMES)]
    assert names == sorted(names) and fresh.run("return document.querySelectorAll('[aria-sort]').length") == 1


@needs_browser
def test_a_click_sorts_by_badge_most_verified_first(fresh):
    fresh.click(head(11))
    levels = fresh.run(SHOWN + ".map(r => Number(r.cells[10].dataset.v))")
    assert levels == sorted(levels, reverse=True) and levels[0] == 2 and levels[-1] == -2
    badges = SHOWN + ".map(r => r.cells[10].textContent.trim())"
    shown = fresh.run(badges)
    assert shown[:5] == ["V2"] * 5 and shown[-1] == "rejected"
    colour = "return getComputedStyle(document.querySelector('.badge[data-ok]')).color"
    assert fresh.run(colour) == "rgb(26, 127, 71)"


@needs_browser
def test_filters_narrow_the_rows_and_say_how_many_are_left(fresh):
    count = "return document.getElementById('count').textContent"
    assert fresh.run(count) == "19 of 19 rows"
    fresh.type("select[name=task]", "text")
    assert fresh.run(NAMES) == ["constant", "softmax", "performer"] and fresh.run(count) == "3 of 19 rows"
    fresh.type("input[name=search]", "PERF")
    assert fresh.run(NAMES) == ["performer"]
    fresh.open(fresh.run("return location.href"))
    fresh.type("select[name=protocol]", "open")
    assert fresh.run(NAMES) == ["wide"]
    fresh.open(fresh.run("return location.href"))
    fresh.type("select[name=preset]", "smoke")
    assert fresh.run(NAMES) == ["softmax"]
    devices = "return [...document.querySelector('select[name=device]').options].map(o => o.text)"
    assert [d.split(">")[0] for d in fresh.run(devices)] == ["all", "</td", "cpu"]


@needs_browser
def test_nothing_hostile_ran_and_its_name_is_read_as_it_is(fresh):
    assert fresh.run("return typeof hacked") == "undefined"
    assert fresh.run("return document.images.length") == 0
    assert any(name.startswith("</td></script><script>hacked=1") for name in fresh.run(NAMES))
    fresh.run("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 1'}))")
    assert fresh.run("return typeof hacked") == "undefined"  # the policy lets the page's own script run alone
    (refused,) = fresh.console()
    assert "Content Security Policy" in refused["message"]


@needs_browser
def test_command_of_a_row_is_shown_on_a_click(fresh):
    visible = "return document.querySelector('#board tbody tr details code').checkVisibility()"
    assert not fresh.run(visible)
    fresh.click("#board tbody tr details summary")
    assert fresh.run(visible)


@needs_browser
@pytest.mark.parametrize("width", [910, 1250])
def test_a_window_narrower_than_the_board_cuts_nothing_off(results, page, width):
    with Browser(width, 900) as window:
        window.open((results / "index.html").as_uri())
        assert window.run("return document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_page_is_readable_on_a_phone_and_in_the_dark(results, page, tmp_path):
    with Browser(500, 900, dark=True) as phone:  # Chromium's narrowest window
        phone.open((results / "index.html").as_uri())
        assert phone.run("return document.documentElement.scrollWidth <= innerWidth")
        assert (
            phone.run("return getComputedStyle(document.querySelector('#board tbody tr')).display") == "grid"
        )
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
        one = one.replace('"seed": 0', f'"seed": {seed}').replace(
            '"n_correct": 1000', f'"n_correct": {1000 + i % 997}'
        )
        folder = results / "records" / task / attention / "0123456789abcdef"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"seed{seed}.json").write_text(one)


def test_page_of_five_thousand_records_is_built_in_twenty_seconds_and_stays_usable(tmp_path):
    synthetic(tmp_path, 5000)
    start = time.process_time()  # of this process: other jobs do not count
    page = built(tmp_path)
    assert time.process_time() - start < 20
    assert page.count("<tr data-preset=") == 1000 and page.count("<code>") >= 5000
    if not (DRIVER and CHROMIUM):
        return
    with Browser() as window:
        window.open((tmp_path / "index.html").as_uri())
        took = "const start = performance.now(); arguments[0](); return performance.now() - start"
        sort = took.replace("arguments[0]()", "document.querySelectorAll('#board th button')[5].click()")
        assert window.run(sort) < 1000  # milliseconds
        window.type("input[name=search]", "method007")
        assert len(window.run(NAMES)) == 5 and window.console() == []

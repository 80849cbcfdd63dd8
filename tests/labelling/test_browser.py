"""The ranking page in a real browser. Needs `pip install playwright axe-playwright-python` and Debian's chromium."""

import json
import os
import re
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from tests.labelling.labelling_server import HOSTILE, add_labeler, server, write_samples

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need chromium: apt-get install chromium")

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
# A folder to keep screenshots in, to look at or for the documentation.
SCREENSHOTS = os.environ.get("LABELLING_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    samples = write_samples(folder / "samples.jsonl", prompts=4)
    with server(folder / "labels.db", "--samples", samples, "--overlap", "100") as running:
        running.database = folder / "labels.db"
        yield running


@pytest.fixture
def open_page(browser, request):
    """Opens a page logged in as a new labeler. Afterwards nothing may have left the machine, broken the content
    security policy or failed in the page's scripts."""
    contexts, foreign, violations, errors = [], [], [], []

    def watch(page, url):
        page.set_default_timeout(10_000)
        page.on("request", lambda r: None if r.url.startswith(url) else foreign.append(r.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: violations.append(m.text) if "Content Security Policy" in m.text else None)

    def open_page(running, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.on("page", lambda page: watch(page, running.url))
        page = context.new_page()
        page.goto(running.url)
        page.fill("#token", add_labeler(running.database, f"{request.node.name} {len(contexts)}"))
        page.click("text=Log in")
        page.wait_for_selector("#cards .state:not(:empty)")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert (foreign, violations, errors) == ([], [], [])


def screenshot(page, name):
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def letters(page):
    """The ranking on the screen: letters in order, `=` before one that is tied with the one above."""
    cards = page.eval_on_selector_all(
        "#cards > li", "cards => cards.map(card => [card.dataset.letter, 'tied' in card.dataset])"
    )
    return "".join("=" * tied + letter for letter, tied in cards)


def ranks(page):
    return page.locator(".rank").all_inner_texts()


def card(page, letter):
    return page.locator(f"[data-letter={letter}]")


def give_reasons(page):
    for letter in "ABCD":
        card(page, letter).locator("[name=justification]").fill(f"reason for {letter}")


def submit(page):
    """Presses the button and waits for the next page."""
    prompt = page.locator("#task").get_attribute("data-prompt")
    page.click("[data-do=submit]")
    page.wait_for_selector(f"#task:not([data-prompt={prompt!r}]), main:not(:has(#task))")


def wait_saved(page):
    page.locator("#status", has_text="Saved at").wait_for()


def wait_until(condition, seconds=10):
    """For what no element of the page shows, such as a row in the database."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def last_event(database):
    with sqlite3.connect(database) as db:
        db.row_factory = sqlite3.Row
        return dict(db.execute("SELECT * FROM event ORDER BY id DESC LIMIT 1").fetchone())


def stored_letters(page, event):
    shown = page.locator("#task").get_attribute("data-shown").split()
    tiers = [["ABCDEFGHI"[shown.index(id)] for id in tier] for tier in json.loads(event["tiers"])]
    return "".join("=".join(tier) for tier in tiers)


def drag(page, letter, onto, below=False):
    """Drags a card to where another one is, and drops it once the page has made room there."""

    def place():
        return letters(page).replace("=", "").index(letter)

    wanted = letters(page).replace("=", "").index(onto)
    for _ in range(5):  # on a busy machine a press or a move is now and then not taken for a drag
        box, target = card(page, letter).locator(".handle").bounding_box(), card(page, onto).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 8, y, steps=2)
        y = target["y"] + target["height"] * (0.9 if below else 0.1)
        page.wait_for_timeout(50)
        page.mouse.move(target["x"] + 60, y, steps=8)
        for step in range(40):
            if place() == wanted:
                break
            page.wait_for_timeout(50)  # the library's animation
            page.mouse.move(target["x"] + 60 + step % 2, y)
        page.mouse.up()
        page.locator(".sortable-chosen").wait_for(state="detached")
        if place() == wanted:
            return


def test_drag_tie_and_submit(job, open_page):
    page = open_page(job, viewport={"width": 1000, "height": 1300})
    page.locator(".guidelines summary").click()
    page.locator(".guidelines:not([open])").wait_for()
    drag(page, "D", onto="A")
    assert letters(page) == "DABC" and ranks(page) == ["1", "2", "3", "4"]
    drag(page, "A", onto="C", below=True)
    assert letters(page) == "DBCA"
    card(page, "C").locator("[data-do=tie]").click()
    assert letters(page) == "DB=CA" and ranks(page) == ["1", "2", "2", "4"]
    assert card(page, "B").locator(".state").inner_text() == "rank 2 of 4, tied with C"
    drag(page, "A", onto="C")
    assert letters(page) == "DB=A=C", "put between two tied responses, it joins the tie"
    drag(page, "B", onto="C", below=True)
    assert letters(page) == "DA=CB", "the first of a tie leaves it, the others stay tied"
    card(page, "D").locator("[name=rating]").select_option("6")
    card(page, "B").locator("[value=did_not_answer]").check()
    screenshot(page, "page")

    page.click("[data-do=submit]")
    assert "give a reason for D, A, C, B" in page.locator("#alert").inner_text()
    assert page.evaluate("document.activeElement.name") == "justification", "the first empty reason has the focus"
    screenshot(page, "reasons")
    give_reasons(page)
    order_before = page.locator("#task").get_attribute("data-shown").split()
    submit(page)
    event = last_event(job.database)
    assert event["kind"] == "submit" and "1 ranked, 3 left" in page.locator("header").inner_text()
    tiers = [["ABCD"[order_before.index(id)] for id in tier] for tier in json.loads(event["tiers"])]
    assert tiers == [["D"], ["A", "C"], ["B"]], "stored as it stood on the screen"
    with sqlite3.connect(job.database) as db:
        stored = db.execute(
            "SELECT response_id, justification, rating, flags FROM review WHERE event_id = ?", (event["id"],)
        )
        reviews = {"ABCD"[order_before.index(id)]: rest for id, *rest in stored}
    assert reviews["D"] == ["reason for D", 6, "[]"]
    assert reviews["B"] == ["reason for B", None, '["did_not_answer"]']


def test_keyboard_alone(job, open_page):
    page = open_page(job)
    press = page.keyboard.press

    def focused():
        return page.evaluate("document.activeElement.dataset.letter ?? document.activeElement.name")

    press("ArrowDown")
    assert focused() == "A"
    press("Alt+ArrowDown")
    assert letters(page) == "BACD" and focused() == "A"
    assert page.locator("#live").inner_text() == "Response A: rank 2 of 4"
    press("4")
    assert letters(page) == "BCDA" and focused() == "A"
    press("ArrowUp")
    press("=")
    assert letters(page) == "BC=DA" and focused() == "D"
    assert page.locator("#live").inner_text() == "Response D: rank 2 of 4, tied with C"
    press("=")
    press("1")
    assert letters(page) == "DBCA" and focused() == "D"
    press("=")
    assert letters(page) == "DBCA" and "none above it" in page.locator("#live").inner_text()
    for letter in "DBCA":
        assert focused() == letter
        press("Enter")
        assert focused() == "justification"
        page.keyboard.type("because 1 = 2")
        if letter == "B":
            press("Alt+ArrowUp")
            assert letters(page) == "BDCA" and focused() == "justification", "a card can be moved while writing"
            press("Alt+ArrowDown")
        press("Escape")
        press("ArrowDown")
    assert letters(page) == "DBCA", "digits and = typed into a reason are text"
    prompt = page.locator("#task").get_attribute("data-prompt")
    press("Control+Enter")
    press("Control+Enter")
    page.wait_for_selector(f"#task:not([data-prompt={prompt!r}])")
    event = last_event(job.database)
    assert event["kind"] == "submit" and event["active_seconds"] >= 0, "a key pressed twice submits once"


def test_an_unchanged_order_is_asked_about(job, open_page):
    page = open_page(job)
    give_reasons(page)
    page.click("[data-do=submit]")
    assert "the order is as it was shown" in page.locator("#alert").inner_text()
    submit(page)
    assert "1 ranked" in page.locator("header").inner_text()


def assert_draft(page, order, reasons, comment):
    """What a page that was just opened shows. The order comes from the server, and so must everything else: a browser
    that fills in the fields of the page before would hide what was lost."""
    page.wait_for_selector("#cards .state:not(:empty)")
    assert letters(page) == order
    shown = {letter: card(page, letter).locator("[name=justification]").input_value() for letter in reasons}
    assert (shown, page.input_value("#comment")) == (reasons, comment)


def test_reload_restores_the_draft(job, open_page):
    page = open_page(job)
    card(page, "C").locator("[data-do=up]").click()
    card(page, "B").locator("[data-do=tie]").click()
    give_reasons(page)
    card(page, "A").locator("[name=rating]").select_option("2")
    card(page, "A").locator("[value=harmful]").check()
    page.fill("#comment", "left half done")
    reasons = {letter: f"reason for {letter}" for letter in "ABCD"}
    wait_saved(page)
    assert stored_letters(page, last_event(job.database)) == letters(page) == "AC=BD"
    elsewhere = page.context.new_page()  # it has no fields to fill in by itself
    elsewhere.goto(job.url)
    assert_draft(elsewhere, "AC=BD", reasons, "left half done")
    elsewhere.close()
    page.reload()
    assert_draft(page, "AC=BD", reasons, "left half done")
    assert card(page, "A").locator("[name=rating]").input_value() == "2"
    assert card(page, "A").locator("[value=harmful]").is_checked()

    page.fill("#comment", "closed at once")
    page.goto(job.url + "/answers")  # within the moment that drafts wait for more to come
    wait_until(lambda: last_event(job.database)["comment"] == "closed at once")
    page.goto(job.url)
    assert_draft(page, "AC=BD", reasons, "closed at once")


def test_undo_edit_skip_and_flag(job, open_page):
    page = open_page(job)
    card(page, "B").locator("[data-do=up]").click()
    give_reasons(page)
    submit(page)
    page.click("text=Undo last ranking")
    page.wait_for_selector(".state:not(:empty)")
    assert letters(page) == "BACD" and card(page, "D").locator("textarea").input_value() == "reason for D"
    submit(page)
    page.click("text=Your answers")
    page.click(".answers a")
    assert "You have ranked this one" in page.locator(".note").inner_text()
    card(page, "D").locator("[data-do=up]").click()
    submit(page)
    assert last_event(job.database)["kind"] == "edit"
    page.click("[data-do=flag]")
    assert "say what is wrong" in page.locator("#alert").inner_text()
    page.fill("#comment", "holds a phone number")
    prompt = page.locator("#task").get_attribute("data-prompt")
    page.click("[data-do=flag]")
    page.wait_for_selector(f"#task:not([data-prompt={prompt!r}])")
    assert last_event(job.database)["comment"] == "holds a phone number"
    prompt = page.locator("#task").get_attribute("data-prompt")
    page.click("[data-do=skip]")
    page.wait_for_selector(f"#task:not([data-prompt={prompt!r}])")
    assert "1 ranked, 1 left, 1 skipped, 1 flagged" in page.locator("header").inner_text()


def test_two_labelers_see_different_orders_and_two_tabs_do_not_mix(job, open_page):
    ann, bob = open_page(job), open_page(job)
    shown = [page.locator("#task").get_attribute("data-shown") for page in (ann, bob)]
    assert shown[0] != shown[1] and sorted(shown[0].split()) == sorted(shown[1].split())
    other_tab = ann.context.new_page()
    other_tab.goto(job.url)
    card(ann, "A").locator("[data-do=down]").click()
    wait_saved(ann)
    card(other_tab, "D").locator("[data-do=up]").click()
    other_tab.wait_for_selector("#alert:not(:empty)")
    assert "another tab" in other_tab.locator("#alert").inner_text()
    assert stored_letters(ann, last_event(job.database)) == letters(ann) == "BACD"


def test_a_dead_server_is_said_at_once_and_the_draft_is_saved_when_it_is_back(tmp_path, open_page):
    database = tmp_path / "labels.db"
    samples = write_samples(tmp_path / "samples.jsonl", prompts=2)
    with server(database, "--samples", samples) as running:
        running.database = database
        page = open_page(running)
        running.kill()
        card(page, "B").locator("[data-do=up]").click()
        page.wait_for_selector("#alert:not(:empty)")
        assert "NOT saved" in page.locator("#alert").inner_text()
        screenshot(page, "not_saved")
        with server(database, "--port", running.url.rsplit(":", 1)[1]):
            wait_saved(page)
            assert page.locator("#alert").inner_text() == ""
            page.reload()
            page.wait_for_selector(".state:not(:empty)")
            assert letters(page) == "BACD"


def test_on_a_phone(job, open_page):
    page = open_page(job, **PHONE)
    page.locator(".guidelines summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "phone")
    card(page, "D").locator("[data-do=up]").tap()
    assert letters(page) == "ABDC"
    wait_saved(page)

    # A finger that rests on the handle picks the card up; one that moves at once scrolls.
    page.evaluate("window.scrollTo(0, 0)")
    touch = page.context.new_cdp_session(page)

    def send(kind, *points):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    start, target = card(page, "A").locator(".handle").bounding_box(), card(page, "B").bounding_box()
    x, y = start["x"] + 8, start["y"] + 8
    send("touchStart", (x, y))
    page.wait_for_timeout(300)
    for step in range(1, 9):
        send("touchMove", (x, y + (target["y"] + target["height"] * 0.9 - y) * step / 8))
    page.wait_for_timeout(200)
    send("touchEnd")
    assert letters(page) == "BADC"
    heights = page.eval_on_selector_all(
        "button, select, .flags label", "all => all.filter(e => e.offsetParent).map(e => e.offsetHeight)"
    )
    assert min(heights) >= 24, "big enough for a finger"


def test_hostile_text_stays_text(tmp_path, open_page):
    long = "many words " * 600 + "x" * 3000
    responses = [{"text": text} for text in [*HOSTILE, long]]
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "".join(HOSTILE), "responses": responses}))
    with server(tmp_path / "labels.db", "--samples", tmp_path / "samples.jsonl") as running:
        running.database = tmp_path / "labels.db"
        page = open_page(running, viewport={"width": 390, "height": 844})
        texts = page.eval_on_selector_all(".card .text", "texts => texts.map(text => text.textContent)")
        assert sorted(texts) == sorted([*HOSTILE, long])
        assert (
            page.title() == "Rank responses" and page.locator("#cards img, #cards a, #cards svg, main h1").count() == 1
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.click(".more:visible")
        assert page.locator(".more:visible").inner_text() == "Show less"
        for area in page.locator("[name=justification]").all():
            area.fill(HOSTILE[0])
        page.click("[data-do=submit]")
        submit(page)
        page.click("text=Your answers")
        assert page.title() == "Your answers" and page.locator(".answers img").count() == 0


def test_accessibility(job, open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = open_page(job)
    found = {}

    def check(name):
        for violation in axe.Axe().run(page).response["violations"]:
            found[f"{name}: {violation['id']}"] = [node["html"][:200] for node in violation["nodes"]]

    check("ranking")
    card(page, "B").locator("[data-do=tie]").click()
    page.click("[data-do=submit]")
    check("ranking with an error")
    page.emulate_media(color_scheme="dark")
    check("dark")
    page.goto(job.url + "/answers")
    check("answers")
    page.goto(job.url + "/nowhere")
    page.context.clear_cookies()
    page.goto(job.url)
    check("login")
    assert found == {}
    name = re.compile("Response A rank 1 of 4")
    page = open_page(job)
    assert page.get_by_role("listitem", name=name).count() == 1, "a card is announced with its rank"
    assert page.locator("[role=alert], [role=status], [aria-live=polite]").count() == 3

"""The ranking page in a real browser: mouse, keys, touch, what is stored, and what is not allowed to happen."""

import json
import re
import sqlite3
from itertools import count

import pytest

from tests.labelling.browsing import (
    PHONE,
    act,
    assert_draft,
    card,
    drag,
    give_reasons,
    last_event,
    letters,
    ranks,
    screenshot,
    stored_letters,
    submit,
    wait_saved,
    wait_until,
)
from tests.labelling.labelling_server import HOSTILE, server, write_samples


def test_drag_tie_and_submit(browser_job, open_page):
    page = open_page(browser_job, viewport={"width": 1000, "height": 1300})
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
    event = last_event(browser_job.database)
    assert event["kind"] == "submit" and "1 ranked, 3 left" in page.locator("header").inner_text()
    tiers = [["ABCD"[order_before.index(id)] for id in tier] for tier in json.loads(event["tiers"])]
    assert tiers == [["D"], ["A", "C"], ["B"]], "stored as it stood on the screen"
    with sqlite3.connect(browser_job.database) as db:
        stored = db.execute(
            "SELECT response_id, justification, rating, flags FROM review WHERE event_id = ?", (event["id"],)
        )
        reviews = {"ABCD"[order_before.index(id)]: rest for id, *rest in stored}
    assert reviews["D"] == ["reason for D", 6, "[]"]
    assert reviews["B"] == ["reason for B", None, '["did_not_answer"]']


def test_keyboard_alone(browser_job, open_page):
    page = open_page(browser_job)
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
        page.evaluate(
            "document.activeElement.dispatchEvent("
            "new KeyboardEvent('keydown', {key: 'Escape', bubbles: true, isComposing: true}))"
        )
        assert focused() == "justification", "an input method's Escape is its own"
        press("Escape")
        press("ArrowDown")
    assert letters(page) == "DBCA", "digits and = typed into a reason are text"
    prompt = page.locator("#task").get_attribute("data-prompt")
    press("Control+Enter")
    press("Control+Enter")
    page.wait_for_selector(f"#task:not([data-prompt={prompt!r}])")
    event = last_event(browser_job.database)
    assert event["kind"] == "submit" and event["active_seconds"] >= 0, "a key pressed twice submits once"


def test_an_unchanged_order_is_asked_about(browser_job, open_page):
    page = open_page(browser_job)
    give_reasons(page)
    page.click("[data-do=submit]")
    assert "the order is as it was shown" in page.locator("#alert").inner_text()
    submit(page)
    assert "1 ranked" in page.locator("header").inner_text()


def test_reload_restores_the_draft(browser_job, open_page):
    page = open_page(browser_job)
    card(page, "C").locator("[data-do=up]").click()
    card(page, "B").locator("[data-do=tie]").click()
    give_reasons(page)
    card(page, "A").locator("[name=rating]").select_option("2")
    card(page, "A").locator("[value=harmful]").check()
    page.fill("#comment", "left half done")
    reasons = {letter: f"reason for {letter}" for letter in "ABCD"}
    wait_saved(page)
    assert stored_letters(page, last_event(browser_job.database)) == letters(page) == "AC=BD"
    elsewhere = page.context.new_page()  # it has no fields to fill in by itself
    elsewhere.goto(browser_job.url)
    assert_draft(elsewhere, "AC=BD", reasons, "left half done")
    elsewhere.close()
    page.reload()
    assert_draft(page, "AC=BD", reasons, "left half done")
    assert card(page, "A").locator("[name=rating]").input_value() == "2"
    assert card(page, "A").locator("[value=harmful]").is_checked()

    page.fill("#comment", "closed at once")
    page.goto(browser_job.url + "/answers")  # within the moment that drafts wait for more to come
    wait_until(lambda: last_event(browser_job.database)["comment"] == "closed at once")
    page.goto(browser_job.url)
    assert_draft(page, "AC=BD", reasons, "closed at once")


def test_undo_edit_skip_and_flag(browser_job, open_page):
    page = open_page(browser_job)
    card(page, "B").locator("[data-do=up]").click()
    give_reasons(page)
    submit(page)
    page.click("text=Undo last ranking")
    page.wait_for_url("**/task/*")
    page.wait_for_selector("#task:enabled")
    assert letters(page) == "BACD" and card(page, "D").locator("textarea").input_value() == "reason for D"
    submit(page)
    page.click("text=Your answers")
    page.click(".answers a")
    assert "You have ranked this one" in page.locator(".note").inner_text()
    card(page, "D").locator("[data-do=up]").click()
    submit(page)
    assert last_event(browser_job.database)["kind"] == "edit"
    page.click("[data-do=flag]")
    assert "say what is wrong" in page.locator("#alert").inner_text()
    page.fill("#comment", "holds a phone number")
    act(page, "flag")
    assert last_event(browser_job.database)["comment"] == "holds a phone number"
    act(page, "skip")
    assert "1 ranked, 1 left, 1 skipped, 1 flagged" in page.locator("header").inner_text()


def test_two_labelers_see_different_orders_and_two_tabs_do_not_mix(browser_job, open_page):
    ann, bob = open_page(browser_job), open_page(browser_job)
    shown = [page.locator("#task").get_attribute("data-shown") for page in (ann, bob)]
    assert shown[0] != shown[1] and sorted(shown[0].split()) == sorted(shown[1].split())
    other_tab = ann.context.new_page()
    other_tab.goto(browser_job.url)
    card(ann, "A").locator("[data-do=down]").click()
    wait_saved(ann)
    card(other_tab, "D").locator("[data-do=up]").click()
    other_tab.wait_for_selector("#alert p:not(:empty)")
    assert "another tab" in other_tab.locator("#alert").inner_text()
    assert stored_letters(ann, last_event(browser_job.database)) == letters(ann) == "BACD"


def test_a_dead_server_is_said_at_once_and_the_draft_is_saved_when_it_is_back(tmp_path, open_page):
    database = tmp_path / "labels.db"
    samples = write_samples(tmp_path / "samples.jsonl", prompts=2)
    with server(database, "--samples", samples) as running:
        running.database = database
        page = open_page(running)
        running.kill()
        card(page, "B").locator("[data-do=up]").click()
        page.wait_for_selector("#alert p:not(:empty)")
        assert "NOT saved" in page.locator("#alert").inner_text()
        screenshot(page, "not_saved")
        with server(database, "--port", running.url.rsplit(":", 1)[1]):
            wait_saved(page)
            assert page.locator("#alert").inner_text() == ""
            page.reload()
            page.wait_for_selector("#task:enabled")
            assert letters(page) == "BACD"


def test_on_a_phone(browser_job, open_page):
    page = open_page(browser_job, **PHONE)
    page.locator(".guidelines summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "phone")
    card(page, "D").locator("[data-do=up]").tap()
    assert letters(page) == "ABDC"
    wait_saved(page)

    # A finger that rests on the handle picks the card up; one that moves at once scrolls.
    card(page, "A").locator("[name=justification]").fill("typed just before")
    page.evaluate("window.scrollTo(0, 0)")
    touch = page.context.new_cdp_session(page)

    def send(kind, *points):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    start, target = card(page, "A").locator(".handle").bounding_box(), card(page, "B").bounding_box()
    x, y = start["x"] + 8, start["y"] + 8
    send("touchStart", (x, y))
    page.wait_for_selector(".sortable-chosen")
    end = target["y"] + target["height"] * 0.9
    for step in range(1, 9):
        send("touchMove", (x, y + (end - y) * step / 8))
    steps = count()

    def has_made_room():
        send("touchMove", (x, end + next(steps) % 2))
        return letters(page) == "BADC"

    wait_until(has_made_room)
    wait_saved(page)
    assert page.locator("#alert").inner_text() == "", "what a finger holds was counted twice, and the draft refused"
    send("touchEnd")
    page.locator(".sortable-chosen").wait_for(state="detached")
    assert letters(page) == "BADC" and ranks(page) == ["1", "2", "3", "4"]
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
        heights = page.eval_on_selector_all(".card .body", "all => all.map(e => [e.clientHeight, e.scrollHeight])")
        assert any(shown < whole for shown, whole in heights), "a long text scrolls in its card"
        assert all(shown < 844 for shown, _ in heights)
        scrolled = page.locator(".body[tabindex]")
        sign = scrolled.evaluate("body => getComputedStyle(body, '::after').content")
        assert "scroll to read all" in sign, "without a scrollbar a text that is cut off would look whole"
        scrolled.click()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.name") == "justification", "the card's keys work there"
        for area in page.locator("[name=justification]").all():
            area.fill(HOSTILE[0])
        page.click("[data-do=submit]")
        submit(page)
        page.click("text=Your answers")
        page.wait_for_selector(".answers")
        assert page.title() == "Your answers" and page.locator(".answers img").count() == 0


def test_accessibility(browser_job, open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = open_page(browser_job)
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
    page.goto(browser_job.url + "/answers")
    check("answers")
    page.goto(browser_job.url + "/nowhere")
    page.context.clear_cookies()
    page.goto(browser_job.url)
    check("login")
    assert found == {}
    name = re.compile("Response A rank 1 of 4")
    page = open_page(browser_job)
    assert page.get_by_role("listitem", name=name).count() == 1, "a card is announced with its rank"
    assert page.locator("[role=alert], [role=status], [aria-live=polite]").count() == 3

"""What people do on the ranking page: wait, reload, go back, open a second tab, lose the network, use the keyboard
only, write long texts in their own script. After each, what is on the screen and what is stored must be the same."""

import json
import sqlite3

import pytest

from tests.labelling.browsing import (
    act,
    assert_draft,
    card,
    drag,
    give_reasons,
    last_event,
    letters,
    screenshot,
    submit,
    wait_saved,
    wait_until,
)
from tests.labelling.labelling_server import add_labeler, cli, server, write_samples


def read(page):
    """Looks at the page for a while: the clock runs only while there are signs of somebody."""
    page.mouse.move(200, 200)
    page.wait_for_timeout(1000)
    page.mouse.move(210, 210)


def reason(page, letter):
    return card(page, letter).locator("[name=justification]")


def alert(page):
    return page.locator("#alert").inner_text()


def stored_reasons(page, database):
    """By letter, of the last event, if it is of the task on the page."""
    shown = page.locator("#task").get_attribute("data-shown").split()
    with sqlite3.connect(database) as db:
        query = "SELECT response_id, justification FROM review WHERE event_id = (SELECT max(id) FROM event)"
        return {"ABCDEFGHIJ"[shown.index(id)]: text for id, text in db.execute(query) if id in shown}


def network(page, latency_ms):
    """Makes every request of the page so much slower."""
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    conditions = {"offline": False, "latency": latency_ms, "downloadThroughput": -1, "uploadThroughput": -1}
    session.send("Network.emulateNetworkConditions", conditions)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "way", ["F5", pytest.param("home link", marks=SLOW), pytest.param("back from their answers", marks=SLOW)]
)
def test_after_coming_back_the_first_edit_is_saved(browser_job, open_page, way):
    page = open_page(browser_job)
    for turn in range(2):
        read(page)
        if way == "F5":
            page.reload()
        elif way == "home link":
            page.click(".home")
        else:
            page.click("text=Your answers")
            page.wait_for_url("**/answers")
            page.go_back()
        page.wait_for_selector("#task:enabled")
        reason(page, "B").fill(f"turn {turn}")
        wait_saved(page)
        assert alert(page) == ""
        assert stored_reasons(page, browser_job.database)["B"] == f"turn {turn}"
    page.reload()
    assert_draft(page, "ABCD", {"B": "turn 1"}, "")
    give_reasons(page)
    card(page, "B").locator("[data-do=up]").click()
    submit(page)
    assert last_event(browser_job.database)["kind"] == "submit"


def test_reading_is_counted_with_the_next_change(browser_job, open_page):
    page = open_page(browser_job)
    first = page.locator("#task").get_attribute("data-prompt")
    read(page)
    page.goto("about:blank")
    again = page.context.new_page()
    again.goto(browser_job.url)
    again.wait_for_selector("#task:enabled")
    assert again.locator("#status").inner_text() == "", "there is no draft to restore"
    act(again, "skip")  # the first task: its time is in there, and that of the second is kept beside another's
    read(again)
    again.goto(f"{browser_job.url}/task/{first}")
    again.wait_for_selector("#task:enabled")
    again.goto(browser_job.url)
    again.wait_for_selector("#task:enabled")
    reason(again, "A").fill("read")
    wait_saved(again)
    assert last_event(browser_job.database)["active_seconds"] >= 1


def test_the_night_that_a_computer_slept_is_no_work(browser_job, open_page):
    """Its first sign in the morning came before its timers ran, and eight hours were counted."""
    page = open_page(browser_job)
    kept = page.evaluate(
        """() => {
            const now = performance.now.bind(performance);
            performance.now = () => now() + 8 * 3600e3;
            document.dispatchEvent(new Event("pointermove"));
            window.dispatchEvent(new Event("pagehide"));
            return Object.values(localStorage).join();
        }"""
    )
    assert float(kept) < 3600


def test_what_is_missing_stays_on_the_screen_while_drafts_are_saved(browser_job, open_page):
    page = open_page(browser_job)
    page.click("[data-do=submit]")
    assert alert(page) == "Not submitted: give a reason for A, B, C, D."
    for letter, missing in (("A", "B, C, D"), ("C", "B, D"), ("B", "D")):
        reason(page, letter).fill(f"reason for {letter}")
        wait_saved(page)
        assert alert(page) == f"Not submitted: give a reason for {missing}."
    reason(page, "D").fill("\u200b \u00a0")  # nothing that anybody could read
    wait_saved(page)
    assert alert(page) == "Not submitted: give a reason for D."
    reason(page, "D").fill("reason for D")
    wait_saved(page)
    assert alert(page) == ""
    page.click("[data-do=flag]")
    card(page, "B").locator("[data-do=up]").click()
    wait_saved(page)
    assert alert(page) == "Not flagged: say what is wrong with the prompt, then flag it again."
    page.fill("#comment", "a reason to flag")
    assert alert(page) == ""
    submit(page)


def hold(page, path):
    """Keeps requests to `path` waiting, as a slow network does; returns what lets them go."""
    held = []
    page.route(path, lambda route: held.append(route))

    def let_go():
        for route in held:  # those too that come while the first are let go
            route.continue_()
        page.unroute(path)

    return let_go


def press_at(page, locator, clicks=1):
    """Presses where something is, whether it can be pressed or not."""
    box = page.locator(locator).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, click_count=clicks)


def test_nothing_can_be_pressed_before_it_works(browser_job, open_page):
    """A press or a letter that came before the page's script was lost, with no sign of it."""
    page = open_page(browser_job)
    let_go = hold(page, "**/static/saving.js")
    page.reload(wait_until="commit")
    page.wait_for_selector("[data-do=skip]")
    # Before it has its style, things stand elsewhere.
    page.wait_for_function("getComputedStyle(document.querySelector('.actions')).position === 'sticky'")
    for control in page.locator("#task button, #task textarea, #task select, #task input").all():
        assert control.is_disabled()
    press_at(page, "[data-do=skip]")
    let_go()
    act(page, "skip")
    assert last_event(browser_job.database)["kind"] == "skip"


def test_what_is_submitted_cannot_be_changed_or_undone_on_its_way(browser_job, open_page):
    """A letter typed after Submit replaced the submission by a draft; Undo took back the ranking before it."""
    page = open_page(browser_job)
    card(page, "B").locator("[data-do=up]").click()
    give_reasons(page)
    submit(page)
    before = last_event(browser_job.database)
    prompt = page.locator("#task").get_attribute("data-prompt")
    let_go = hold(page, "**/api/answer")
    with page.expect_request("**/api/answer"):
        page.fill("#comment", "a draft that is on its way")
    card(page, "B").locator("[data-do=up]").click()
    give_reasons(page)
    page.click("[data-do=submit]")
    press_at(page, "#comment")
    page.keyboard.type("too late")
    press_at(page, "text=Undo last ranking")
    page.wait_for_timeout(900)  # longer than drafts wait
    assert page.input_value("#comment") == "a draft that is on its way"
    let_go()
    page.wait_for_selector(f"#task:enabled:not([data-prompt={prompt!r}])")
    event = last_event(browser_job.database)
    assert (event["kind"], event["prompt_id"]) == ("submit", prompt) and before["prompt_id"] != prompt
    assert page.locator("header").inner_text().count("2 ranked") == 1


@pytest.mark.parametrize("leave", ["Undo last ranking", "Log out"])
def test_what_was_changed_is_there_before_undo_or_log_out(browser_job, open_page, leave):
    """Both act at once, and what was typed before was refused: the task had changed, or the session had ended."""
    page = open_page(browser_job)
    card(page, "B").locator("[data-do=up]").click()
    give_reasons(page)
    submit(page)
    page.click("text=Your answers")
    page.click(".answers a")
    typed = f"typed before {leave}"
    let_go = hold(page, "**/api/answer")
    with page.expect_request("**/api/answer"):
        reason(page, "D").fill(typed)
        page.click(f"text={leave}")
    page.wait_for_timeout(300)
    let_go()
    if leave == "Log out":
        page.wait_for_selector("#token")
    else:
        page.wait_for_selector("header:has-text('0 ranked')")
        assert_draft(page, "BACD", {"A": "reason for A", "D": typed}, "")
        assert alert(page) == ""
    with sqlite3.connect(browser_job.database) as db:
        assert db.execute("SELECT 1 FROM review WHERE justification = ?", (typed,)).fetchone()


def test_two_presses_in_one_do_one_thing(browser_job, open_page):
    """A double click skipped two tasks, or answered a question that nobody had read; so did a key held down."""
    page = open_page(browser_job)
    act(page, "skip")
    second = page.locator("#task").get_attribute("data-prompt")
    page.locator("[data-do=skip]").hover()
    page.mouse.down(click_count=2)  # the second half of a double click, of which the first half skipped the last task
    page.mouse.up(click_count=2)
    give_reasons(page)
    page.locator("[data-do=submit]").dblclick()
    assert alert(page).startswith("One question")
    page.reload()
    page.wait_for_selector("#task:enabled")
    page.keyboard.down("Control")
    for _ in range(3):
        page.keyboard.down("Enter")
    page.keyboard.up("Control")
    assert alert(page).startswith("One question")
    assert page.locator("#task").get_attribute("data-prompt") == second
    assert "0 ranked, 3 left, 1 skipped" in page.locator("header").inner_text()


def test_a_question_is_no_alarm(browser_job, open_page):
    page = open_page(browser_job)
    colour = "getComputedStyle(document.getElementById('problem')).color"
    page.click("[data-do=submit]")
    alarm = page.evaluate(colour)
    give_reasons(page)
    page.click("[data-do=submit]")
    assert alert(page).startswith("One question: the order is as it was shown")
    assert page.evaluate(colour) == page.evaluate("getComputedStyle(document.body).color") != alarm
    screenshot(page, "question")
    wait_saved(page)
    assert alert(page).startswith("One question"), "a draft that is saved is no answer to it"
    card(page, "B").locator("[data-do=up]").click()
    assert alert(page) == ""
    submit(page)


@SLOW
def test_typed_and_reloaded_at_once_on_a_slow_network(browser_job, open_page):
    page = open_page(browser_job)
    network(page, 1500)
    reason(page, "A").fill("typed and left")
    card(page, "D").locator("[data-do=up]").click()
    page.reload()
    page.wait_for_selector("#task:enabled")
    wait_until(lambda: stored_reasons(page, browser_job.database).get("A") == "typed and left")
    assert_draft(page, "ABDC", {"A": "typed and left"}, "")
    reason(page, "B").fill("and then this")
    wait_saved(page)
    assert alert(page) == "" and stored_reasons(page, browser_job.database)["B"] == "and then this"


@SLOW
def test_submitted_and_reloaded_at_once_on_a_slow_network(browser_job, open_page):
    page = open_page(browser_job)
    prompt = page.locator("#task").get_attribute("data-prompt")
    card(page, "B").locator("[data-do=up]").click()
    give_reasons(page)
    wait_saved(page)
    network(page, 1500)
    page.click("[data-do=submit]")
    page.wait_for_timeout(100)
    page.reload()
    page.wait_for_selector(f"#task:enabled:not([data-prompt={prompt!r}])")
    with sqlite3.connect(browser_job.database) as db:
        kinds = db.execute("SELECT kind FROM event WHERE prompt_id = ? ORDER BY id DESC LIMIT 1", (prompt,)).fetchone()
    assert kinds == ("submit",)
    card(page, "B").locator("[data-do=up]").click()
    wait_saved(page)
    assert alert(page) == ""


@SLOW
def test_the_network_goes_and_comes_back(browser_job, open_page):
    page = open_page(browser_job)
    page.context.set_offline(True)
    reason(page, "A").fill("written in a tunnel")
    page.locator("#alert", has_text="NOT saved: the server does not answer").wait_for()
    reason(page, "B").fill("and this too")
    page.context.set_offline(False)
    wait_saved(page)
    assert alert(page) == ""
    assert {"A": "written in a tunnel", "B": "and this too"}.items() <= stored_reasons(
        page, browser_job.database
    ).items()

    page.context.set_offline(True)
    reason(page, "C").fill("and reloaded")
    page.locator("#alert", has_text="NOT saved").wait_for()
    page.context.set_offline(False)
    page.once("dialog", lambda dialog: dialog.accept())  # "Leave site?", as it is not saved yet
    page.reload()
    page.wait_for_selector("#task:enabled")
    wait_until(lambda: stored_reasons(page, browser_job.database).get("C") == "and reloaded")
    assert_draft(page, "ABCD", {"A": "written in a tunnel", "B": "and this too", "C": "and reloaded"}, "")


def test_what_another_task_had_not_saved_yet_is_saved_whole(browser_job, open_page):
    """Two drafts that wait for the network: the second builds on the first, not on the task that is open then."""
    page = open_page(browser_job)
    first = page.locator("#task").get_attribute("data-prompt")
    give_reasons(page)
    card(page, "B").locator("[data-do=up]").click()
    submit(page)
    page.wait_for_load_state("networkidle")
    page.context.set_offline(True)
    reason(page, "A").fill("one")
    page.locator("#alert", has_text="NOT saved: the server does not answer").wait_for()
    reason(page, "B").fill("two")
    waiting = "JSON.parse(Object.values(sessionStorage).find(kept => kept.startsWith('[{'))).length"
    wait_until(lambda: page.evaluate(waiting) == 2)
    page.context.set_offline(False)
    page.once("dialog", lambda dialog: dialog.accept())
    page.goto(f"{browser_job.url}/task/{first}")
    page.wait_for_selector("#task:enabled")
    page.goto(browser_job.url)
    assert_draft(page, "ABCD", {"A": "one", "B": "two"}, "")


def test_two_tabs_that_only_read_do_not_disturb_each_other(browser_job, open_page):
    first = open_page(browser_job)
    second = first.context.new_page()
    second.goto(browser_job.url)
    read(first)
    first.close(run_before_unload=True)
    reason(second, "A").fill("mine")
    wait_saved(second)
    assert alert(second) == ""


def test_what_one_person_wrote_is_never_stored_as_another_ones(browser_job, open_page):
    """Two people at one computer, with one task each of the same prompt."""
    ann = open_page(browser_job)
    cookies = ann.context.cookies()
    bob = ann.context.new_page()
    ann.context.clear_cookies()
    bob.goto(browser_job.url)
    bob.fill("#token", add_labeler(browser_job.database, "bob at ann's computer"))
    bob.click("text=Log in")
    bob.wait_for_selector("#task:enabled")
    reason(ann, "A").fill("written by ann")
    ann.locator("#alert", has_text="NOT saved: bob at ann's computer is logged in now").wait_for()
    ann.context.add_cookies(cookies)
    wait_saved(ann)
    with sqlite3.connect(browser_job.database) as db:
        query = "SELECT l.name FROM event AS e JOIN labeler AS l ON l.id = e.labeler_id ORDER BY e.id DESC LIMIT 1"
        assert db.execute(query).fetchone()[0].startswith("test_what_one_person_wrote")


def test_what_is_refused_stays_refused_until_the_page_is_reloaded(browser_job, open_page):
    """Two tabs that both write: the later one must not win, nor go quiet."""
    first = open_page(browser_job)
    second = first.context.new_page()
    second.goto(browser_job.url)
    give_reasons(first)
    wait_saved(first)
    reason(second, "A").fill("the other tab")
    second.locator("#alert", has_text="changed in another tab").wait_for()
    give_reasons(second)
    second.click("[data-do=submit]")
    second.wait_for_timeout(900)
    assert "changed in another tab" in alert(second), "it does not look as if it had been submitted"
    second.reload()
    assert_draft(second, "ABCD", {letter: f"reason for {letter}" for letter in "ABCD"}, "")
    card(second, "B").locator("[data-do=up]").click()
    submit(second)
    assert last_event(browser_job.database)["kind"] == "submit"


def test_going_back_after_a_submit_shows_what_is_to_be_done_now(browser_job, open_page):
    page = open_page(browser_job)
    card(page, "B").locator("[data-do=up]").click()
    give_reasons(page)
    submit(page)
    prompt = page.locator("#task").get_attribute("data-prompt")
    page.go_back()
    page.wait_for_selector(f"#task:enabled[data-prompt={prompt!r}]")
    reason(page, "A").fill("after going back")
    wait_saved(page)
    assert alert(page) == "" and last_event(browser_job.database)["prompt_id"] == prompt


@SLOW
def test_after_a_long_pause_work_goes_on(browser_job, open_page):
    """Longer than the server keeps a connection open, and than a minute by the page's own clock."""
    page = open_page(browser_job)
    page.clock.install()
    page.reload()  # so that the page's clock is this one from its first reading
    page.wait_for_selector("#task:enabled")
    reason(page, "A").fill("before")
    page.clock.run_for(1000)
    wait_saved(page)
    before = page.locator("#time").inner_text()
    page.wait_for_timeout(6000)
    page.clock.run_for(30 * 60_000)
    minutes, _ = map(int, page.locator("#time").inner_text().split(":"))
    assert minutes <= 1, f"a pause is no work: {before} has become {minutes} minutes"
    reason(page, "A").fill("after")
    page.clock.run_for(1000)
    wait_until(lambda: stored_reasons(page, browser_job.database).get("A") == "after")
    assert alert(page) == ""


LONG = {
    "Chinese": "這個回答說明了原因，而且沒有多餘的話。",
    "Arabic": "هذا الجواب يشرح السبب بوضوح ولا يطيل. ",
    "Hindi": "यह उत्तर कारण बताता है और छोटा है। ",
    "emoji": "👩‍👩‍👧‍👦🇩🇪👍🏽",
}


# The field takes 4000 UTF-16 units; a script may not be cut within a character.
MAX_UNITS = dict.fromkeys(LONG, 4000) | {"emoji": 1900}


@pytest.mark.parametrize(
    "script", ["Chinese", *(pytest.param(name, marks=SLOW) for name in LONG if name != "Chinese")]
)
def test_long_reasons_in_any_script(tmp_path, open_page, script):
    """As long as the page lets people write: more than 64 kB, which is all that browsers send from a closed page."""
    samples = write_samples(tmp_path / "samples.jsonl", prompts=2, responses=10)
    with server(tmp_path / "labels.db", "--samples", samples) as running:
        running.database = tmp_path / "labels.db"
        page = open_page(running)
        texts = {}
        for letter in "ABCDEFGHIJ":
            field = reason(page, letter)
            field.fill((letter + LONG[script] * 2000)[: MAX_UNITS[script]])
            texts[letter] = field.input_value()
        assert sum(len(text.encode()) for text in texts.values()) > 66_000
        wait_saved(page)
        assert alert(page) == "" and stored_reasons(page, running.database) == texts
        page.reload()
        assert_draft(page, "ABCDEFGHIJ", texts, "")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        card(page, "B").locator("[data-do=up]").click()
        submit(page)
        cli("export", "--database", running.database, "--output", tmp_path / "rankings.jsonl")
    exported = json.loads((tmp_path / "rankings.jsonl").read_text())
    assert sorted(r["justification"] for r in exported["responses"]) == sorted(text.strip() for text in texts.values())


def test_from_login_to_logout_with_the_keyboard_alone(tmp_path, open_page, browser):
    samples = write_samples(tmp_path / "samples.jsonl", prompts=1, responses=3)
    token = add_labeler(tmp_path / "labels.db", "ann")
    with server(tmp_path / "labels.db", "--samples", samples) as running:
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.url)
        press, write = page.keyboard.press, page.keyboard.type

        def tab_to(text):
            for _ in range(40):
                if page.evaluate("document.activeElement.textContent.trim()").startswith(text):
                    return
                press("Tab")
            raise AssertionError(f"Tab never comes to {text!r}")

        page.wait_for_selector("#token:focus")
        write(token.upper())  # a token may be typed in capitals
        press("Enter")
        page.wait_for_selector("#task:enabled")
        press("ArrowRight")
        for turn in range(3):
            press("Enter")
            write(f"reason {turn}")
            press("Escape")
            press("ArrowDown")
        press("Alt+ArrowUp")
        order = letters(page)
        press("Control+Enter")
        page.wait_for_selector("text=All done")
        tab_to("Undo last ranking")
        press("Enter")
        page.wait_for_selector("#task:enabled")
        assert letters(page) == order == "ACB"
        press("ArrowDown")
        press("=")
        tab_to("Submit")
        press("Enter")
        page.wait_for_selector("text=All done")
        tab_to("Log out")
        press("Enter")
        page.wait_for_selector("#token")
        context.close()


def test_markdown_is_shown_formatted_and_as_written(tmp_path, open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    markdown = (
        "# Steps\n\nUse **two**:\n\n```python\nx = [1, 2]\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n- one\n- two <b>raw</b>"
    )
    plain = "Two lines\nand [a link](http://tracker.example/x)"
    row = {"prompt": "q", "responses": [{"text": markdown}, {"text": plain}]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row))
    with server(tmp_path / "labels.db", "--samples", tmp_path / "samples.jsonl", "--overlap", "2") as running:
        running.database = tmp_path / "labels.db"
        for options in ({"viewport": {"width": 1600, "height": 900}}, {"viewport": {"width": 390, "height": 844}}):
            page = open_page(running, **options)
            formatted = page.locator(".card", has=page.locator(".formatted"))
            assert formatted.count() == 1
            assert formatted.locator("h4").inner_text() == "Steps" and formatted.locator("td").count() == 2
            assert "raw</b>" in formatted.locator("li").last.inner_text()
            assert formatted.locator(".text").is_hidden()
            other = page.locator(".card").filter(has_not=page.locator(".formatted"))
            assert other.locator(".text").inner_text() == plain and page.locator("main a").count() == 0
            formatted.get_by_role("button", name="As written").click()
            assert formatted.locator(".text").inner_text() == markdown and formatted.locator("h4").is_hidden()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            formatted.get_by_role("button", name="As written").click()
            assert [v["id"] for v in axe.Axe().run(page).response["violations"]] == []


def test_wide_screens_keep_the_prompt_in_sight(tmp_path, open_page):
    samples = write_samples(tmp_path / "samples.jsonl", prompts=1, responses=9)
    with server(tmp_path / "labels.db", "--samples", samples) as running:
        running.database = tmp_path / "labels.db"
        page = open_page(running, viewport={"width": 1600, "height": 900})
        page.locator(".guidelines summary").click()
        tops = page.eval_on_selector_all("#cards > li", "all => all.map(card => card.getBoundingClientRect().top)")
        assert tops[0] == tops[1] < tops[2], "side by side"
        drag(page, "D", onto="A")
        assert letters(page) == "DABCEFGHI", "from the second row to the front"
        card(page, "B").locator("[data-do=tie]").click()
        sign = "getComputedStyle(document.querySelector('[data-letter=B]'), '::before').content"
        assert page.evaluate(sign) == '"="', "ties are seen where cards stand beside each other"
        assert page.locator(".body[tabindex]").count() == 0
        page.set_viewport_size({"width": 1600, "height": 40})
        page.wait_for_selector(".body[tabindex='0']")  # there is not room for its text any more: keys scroll it
        page.set_viewport_size({"width": 1600, "height": 900})
        page.locator("#comment").scroll_into_view_if_needed()
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        assert page.evaluate("scrollY") > 300
        box = page.locator(".prompt").bounding_box()
        assert 0 <= box["y"] < 100 and box["x"] + box["width"] <= page.locator("#cards").bounding_box()["x"]
        assert page.locator(".actions").bounding_box()["y"] < 900


def test_three_responses_stand_in_one_row_where_they_fit(tmp_path, open_page):
    samples = write_samples(tmp_path / "samples.jsonl", prompts=1, responses=3)
    with server(tmp_path / "labels.db", "--samples", samples) as running:
        running.database = tmp_path / "labels.db"
        page = open_page(running, viewport={"width": 1440, "height": 900})
        tops = page.eval_on_selector_all("#cards > li", "all => all.map(card => card.getBoundingClientRect().top)")
        assert len(set(tops)) == 1

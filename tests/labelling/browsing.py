"""What people do on the ranking page, and what they see there."""

import json
import os
import sqlite3
import time
from pathlib import Path

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
# A folder to keep screenshots in, to look at or for the documentation.
SCREENSHOTS = os.environ.get("LABELLING_SCREENSHOTS")


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
    act(page, "submit", "h1:has-text('All done')")


def act(page, action, otherwise="none"):
    """Presses a button that ends the task, and waits until the next one can be worked on, or for `otherwise`."""
    prompt = page.locator("#task").get_attribute("data-prompt")
    page.click(f"[data-do={action}]")
    page.wait_for_selector(f"#task:enabled:not([data-prompt={prompt!r}]), {otherwise}")


def wait_saved(page):
    page.locator("#status", has_text="Draft saved at").wait_for()


def wait_until(condition, seconds=60):
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


def assert_draft(page, order, reasons, comment):
    """What a page that was just opened shows. The order comes from the server, and so must everything else: a browser
    that fills in the fields of the page before would hide what was lost."""
    page.wait_for_selector("#task:enabled")
    wait_until(lambda: letters(page) == order)
    shown = {letter: card(page, letter).locator("[name=justification]").input_value() for letter in reasons}
    assert (shown, page.input_value("#comment")) == (reasons, comment)


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

"""A real browser and a server for it. Needs `pip install playwright axe-playwright-python` and Debian's chromium."""

import shutil

import pytest

from tests.labelling.labelling_server import add_labeler, server, write_samples

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")  # its event loop would run on in the tests of other modules
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the browser tests need playwright: pip install playwright"
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the browser tests need chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser_job(tmp_path_factory):
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
        page.set_default_timeout(60_000)  # a busy machine is slow
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
        page.wait_for_selector("#task:enabled")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert (foreign, violations, errors) == ([], [], [])

"""Pages in a real browser: starting it, waiting, keys, and what a page that everyone can read has."""

import importlib.util
import json
import shutil
import time

import pytest

CONTRASTS = """const parts = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const paper = node => {
        for (; node; node = node.parentElement) {
            const colour = parts(getComputedStyle(node).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll('body *')].filter(node => node.checkVisibility() && !node.closest(':disabled') &&
        [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())).map(node => {
            const [a, b] = [light(parts(getComputedStyle(node).color)), light(paper(node))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML];
        })"""
UNNAMED = """return [...document.querySelectorAll('button, select, input, [role=listbox], [role=option]')].filter(node =>
    !(node.labels && node.labels.length) && !node.getAttribute('aria-label') && !node.textContent.trim())
    .map(node => node.outerHTML)"""


def start_browser(downloads):
    """Headless Chromium that saves files into a folder; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    driver = shutil.which("chromedriver")
    if not (program and driver and importlib.util.find_spec("selenium")):
        pytest.skip("no browser: needs chromium, chromedriver (apt-get install chromium chromium-driver) and selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1440,900",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    driver.downloads = downloads
    return driver


def until(condition, seconds: float = 20.0):
    """Waits until a condition holds; returns the seconds it took."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds, "waited in vain"
        time.sleep(0.01)
    return time.perf_counter() - start


def press(browser, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def requests_outside(browser, folder) -> tuple[int, list[str]]:
    """The number of different addresses that pages asked for since the last call, and those outside a folder."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    return len(urls), [url for url in urls if not url.startswith((folder.as_uri() + "/", "data:"))]


def check_contrasts(browser) -> None:
    """Every text of the page has a contrast of 4.5 or more, in the light and in the dark scheme."""
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        time.sleep(0.2)  # colours change over a tenth of a second
        contrasts = browser.execute_script(CONTRASTS)
        assert len(contrasts) > 20 and not [(f"{ratio:.2f}", text) for ratio, text in contrasts if ratio < 4.5]

"""Pictures of the playground over a server that runs: empty, and with an answer, in the light and the dark colours.

In: the server's URL; the models should be a trained pair. Out: three PNGs.

    python -m tests.serving.draw_playground --url http://127.0.0.1:8000 --output docs/pictures
"""

from __future__ import annotations

import argparse
import base64
import io
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.serving.browsers import MISSING, show_colours, start_chromium

_ANSWERS_S = 600  # a machine may be busy
_COLOURS = 256  # of the palette: a page has few, and their blends at the edges of letters
PROMPT = "import pandas as pd\n\ndf = pd.DataFrame({'name': ['a', 'b'], 'age': [1, 2]})\n# sort df by age\ndf ="


def save(browser: webdriver.Chrome, path: Path) -> None:
    """The whole page, as a small file."""
    browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")  # the form stays in sight
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    picture.quantize(_COLOURS).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", default="3")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = start_chromium(Path(folder), (1100, 700))
        if browser is None:
            raise SystemExit(MISSING)
        try:
            draw(browser, given.url, given.prompt, given.seed, given.output)
        finally:
            browser.quit()


def draw(browser: webdriver.Chrome, url: str, prompt: str, seed: str, output: Path) -> None:
    """`playground.png`, `playground-answer.png` and `playground-dark.png`, below `output`."""
    wait = WebDriverWait(browser, _ANSWERS_S)
    show_colours(browser, "light")
    browser.get(url)
    wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#model option"))
    save(browser, output / "playground.png")
    field = browser.find_element(By.ID, "prompt")
    field.clear()
    field.send_keys(prompt)
    browser.find_element(By.ID, "seed").send_keys(seed)
    browser.find_element(By.ID, "run").click()
    status = browser.find_element(By.ID, "status")
    wait.until(lambda _: status.text == "Done." or status.get_attribute("class") == "bad")
    if status.text != "Done.":
        raise SystemExit(status.text)
    save(browser, output / "playground-answer.png")
    show_colours(browser, "dark")
    save(browser, output / "playground-dark.png")


if __name__ == "__main__":
    main()

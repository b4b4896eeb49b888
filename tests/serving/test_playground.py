"""The page at `/` in a real browser: a prompt in, the sketches and the answer out, while they are drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from cert_ray.errors import RequestError
from cert_ray.serving.api_keys import read_key_file
from cert_ray.serving.http import create_app
from tests.serving.browsers import MISSING, show_colours, start_chromium
from tests.serving.front_doors import ScriptedBackend, listening

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves its connections to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser = start_chromium(tmp_path_factory.mktemp("chromium"))
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{MISSING}, and CI=true")
        pytest.skip(MISSING)
    yield browser
    browser.quit()


class Page:
    """The open page."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.find("#model option, #status.bad"))

    def find(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition: object, seconds: float = 30) -> None:
        WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: condition())  # type: ignore[operator]

    def wait_for_status(self, text: str) -> None:
        self.wait(lambda: text in self.one("#status").text)

    def type(self, *keys: str) -> None:
        """Press keys where the focus is."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def tab_to(self, element_id: str) -> None:
        """Go there by the tabulator alone."""
        for _ in range(40):
            self.type(Keys.TAB)
            focused = self.browser.switch_to.active_element
            style = self.browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", focused)
            assert style == "solid" or focused.tag_name == "body"  # where the page's end leads to its beginning
            if focused.get_attribute("id") == element_id:
                return
        raise AssertionError(f"no number of tabulators leads to {element_id}")

    def barriers(self) -> list[str]:
        """What axe-core finds against WCAG 2.1 at AA, in both of the system's colours."""
        found = []
        for colours in ("dark", "light"):
            show_colours(self.browser, colours)
            told = Axe().run(self.browser, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
            assert len(told["passes"]) > 10  # it looked
            found += [
                f"{colours}: {rule['id']}: {node['html']}: {node['failureSummary']}"
                for rule in told["violations"]
                for node in rule["nodes"]
            ]
        return found

    def problems(self) -> list[str]:
        """What the browser complains of: errors of the script, files refused by the policy."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_prompt_gives_sketches_with_votes_and_an_answer_with_marked_details(browser: webdriver.Chrome) -> None:
    backend = ScriptedBackend(hold=True)
    with listening(create_app(backend)) as url:
        page = Page(browser, url)
        assert page.problems() == []
        prompt = page.one("#prompt")
        prompt.clear()
        prompt.send_keys("import pandas as pd\nx")
        page.one("#n").clear()
        page.one("#n").send_keys("3")
        prompt.send_keys(Keys.CONTROL, Keys.ENTER)
        # The sketches are there before the answer is.
        page.wait_for_status("The sketch is chosen")
        assert [sketch.text for sketch in page.find("#sketches .sketch")] == ["x = number", "x = df"]
        assert [votes.text for votes in page.find("#sketches .votes")] == ["3 of 4", "1 of 4"]
        assert [hole.text for hole in page.find("#sketches .hole")] == ["number"]
        assert page.find("#answers li") == []
        backend.release.set()
        page.wait_for_status("Done.")
        assert [answer.text for answer in page.find("#answers pre")] == ["x = 0", "x = 1", "x = 2"]
        route = "Route: the generator filled in the sketch. Filled-in details are marked."
        assert page.one("#answers-note").text == route
        assert [row.text for row in page.find("#timing th")][:2] == ["Stage: sketch", "Stage: generate"]
        assert page.problems() == []
    _, prompts, sampling = backend.asked[0]
    assert (prompts, sampling.n, sampling.temperature) == (["import pandas as pd\nx"], 3, 0.6)


def test_details_are_told_from_the_sketch(browser: webdriver.Chrome) -> None:
    with listening(create_app(ScriptedBackend())) as url:
        Page(browser, url)
        marked = """
            const page = await import("/playground.js");
            return page.filledParts(arguments[0], arguments[1]);
        """
        sketch = {
            "text": "df.sort(string, n=number)",
            "placeholders": [
                {"start": 8, "end": 14, "kind": "string"},
                {"start": 18, "end": 24, "kind": "number"},
            ],
        }

        def parts(answer: str) -> list[str] | None:
            found = browser.execute_script(marked, answer, sketch)
            return None if found is None else [answer[start:end] for start, end in found]

        assert parts(" df.sort('a (', n=12)") == ["'a ('", "12"]
        assert parts('df.sort("\\"b", n=1_0)\n') == ['"\\"b"', "1_0"]
        assert parts("df.sort(by, n=12)") is None
        assert parts("df.head()") is None


def test_stopping_ends_the_work_and_the_page_goes_on(browser: webdriver.Chrome) -> None:
    backend = ScriptedBackend(hold=True)
    with listening(create_app(backend)) as url:
        page = Page(browser, url)
        page.find("#examples button")[1].click()
        page.wait_for_status("The sketch is chosen")
        page.one("#prompt").send_keys(Keys.ESCAPE)
        page.wait_for_status("Stopped.")
        assert backend.ended.wait(10)
        backend.release.set()
        page.one("#run").click()
        page.wait_for_status("Done.")


def test_refusals_are_shown_and_a_key_is_asked_for_where_one_is_wanted(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("somebody the-key-of-somebody\n")
    with listening(create_app(ScriptedBackend(), keys=read_key_file(str(tmp_path / "keys")))) as url:
        page = Page(browser, url)
        page.wait_for_status("No valid API key")
        assert "CERT_RAY_API_KEY" in page.one("#curl").text
        page.one("#key").send_keys("the-key-of-somebody", Keys.TAB)
        page.wait(lambda: page.find("#model option"))
        page.one("#run").click()
        page.wait_for_status("Done.")
        assert "the-key-of-somebody" not in page.one("#curl").text + page.one("#python").text
    busy = RequestError(503, "The server is busy: try again.", None, "overloaded", retry_after_s=5)
    with listening(create_app(ScriptedBackend(busy))) as url:
        page = Page(browser, url)
        page.one("#run").click()
        page.wait_for_status("The server is busy: try again. (again in 5 s)")


def test_the_code_shown_is_the_request(browser: webdriver.Chrome) -> None:
    backend = ScriptedBackend(served={"pandas": "pandas", "numpy": "numpy"})
    with listening(create_app(backend, any_library="cert")) as url:
        page = Page(browser, url)
        Select(page.one("#model")).select_by_value("numpy")
        page.one("#prompt").clear()
        page.one("#prompt").send_keys("s = 'it''s \u00e4'\n")
        page.one("#seed").send_keys("9")
        scope: dict[str, object] = {}
        exec(compile(page.one("#python").text.replace("print(", "shown = ("), "shown", "exec"), scope)
    model, prompts, sampling = backend.asked[-1]
    assert (model, prompts, sampling.n, sampling.seed) == ("numpy", ["s = 'it''s \u00e4'\n"], 8, 9)
    assert scope["shown"] == " = 0"


def test_no_barrier_is_found_empty_in_work_with_an_answer_or_with_an_error(browser: webdriver.Chrome) -> None:
    backend = ScriptedBackend(hold=True)
    with listening(create_app(backend)) as url:
        page = Page(browser, url)
        assert page.barriers() == []
        page.one("#run").click()
        page.wait_for_status("The sketch is chosen")
        assert page.barriers() == []
        backend.release.set()
        page.wait_for_status("Done.")
        assert page.find("#sketches .hole, #answers mark")
        assert page.barriers() == []
    with listening(create_app(ScriptedBackend(RequestError(503, "The server is busy.", None, "overloaded")))) as url:
        page = Page(browser, url)
        page.one("#run").click()
        page.wait_for_status("The server is busy.")
        assert page.one("#status").get_attribute("class") == "bad"
        assert page.barriers() == []


def test_the_keyboard_alone_asks_stops_and_reads_the_votes(browser: webdriver.Chrome) -> None:
    backend = ScriptedBackend(hold=True)
    with listening(create_app(backend)) as url:
        page = Page(browser, url)
        page.tab_to("prompt")
        page.type(Keys.CONTROL, "a", Keys.NULL, "x")
        page.tab_to("run")
        page.type(Keys.ENTER)
        page.wait_for_status("The sketch is chosen")
        # What a screen reader is told: the status by itself, the votes as names of what it meets below their heading.
        assert page.one("#status").aria_role == "status"
        assert [bar.accessible_name for bar in page.find("#sketches progress")] == ["3 of 4 votes", "1 of 4 votes"]
        assert page.one("#results section").accessible_name == "Sketches"
        page.type(Keys.TAB)  # the focus had stayed where it was
        assert page.browser.switch_to.active_element.get_attribute("id") == "stop"
        page.type(Keys.ENTER)
        page.wait_for_status("Stopped.")
        assert page.browser.switch_to.active_element.get_attribute("id") == "stop"
        assert backend.ended.wait(10)
        backend.release.set()
        page.tab_to("prompt")
        page.type(Keys.CONTROL, Keys.ENTER)
        page.wait_for_status("Done.")
        page.tab_to("python")
    assert [prompts for _, prompts, _ in backend.asked] == [["x"]] * 2

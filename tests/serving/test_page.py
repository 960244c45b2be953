"""The page and reports in a real browser: asked, read, stopped, refused, by keyboard, on a phone.

Needs chromium with its driver and selenium: `make test-browser`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import structs

from kit.bundles import BuildTiny
from kit.files import lines
from kit.hand_bundle import edit_json, write_hand_bundle
from kit.http_server import MODEL, ScriptedEngines, failed, local, piece, serving, step
from kit.message_specs import EVERY_KIND
from kit.specs import MIXTURE
from recmas_runtime.cli.main import main
from recmas_runtime.running.run_trace import RECORDS_NAME
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.page.routes import page_routes
from recmas_runtime.serve.protocol import AgentInfo

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

pytestmark = pytest.mark.browser

HOSTILE = '<img src="x" onerror="document.title=1"><script>document.title=2</script> '
LONG_S = 20
DESK = (1280, 900)
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "serve-page.png"
ON_SMOLLM2 = """
recmas: 1
name: sequential
rounds: 3
latent_steps: 8
backbones:
  smol: {source: builtin:smollm2-135m-instruct}
agents:
  planner:
    backbone: smol
    inner: {init: latentmas}
    prompt:
      first: "Question: {{ question }}  Which steps lead to the answer?"
      then: "Question: {{ question }}  So far: {{ latent.solver }}  Which steps are better?"
  critic:
    backbone: smol
    inner: {init: latentmas}
    prompt: "Question: {{ question }}  A plan: {{ latent.planner }}  What is wrong with it?"
  solver:
    backbone: smol
    inner: {init: latentmas}
    prompt: "Question: {{ question }}  Notes: {{ latent.critic }}  Answer in one sentence."
links:
  planner -> critic: {}
  critic -> solver: {}
  solver -> planner: {feedback: true}
answer: {agent: solver, max_new_tokens: 48}
"""
PHONE = (360, 740)
OVERFLOWING = """
const wide = [...document.body.querySelectorAll("*")].filter((element) => {
  if (element.closest(".scrolled, .unseen, .skip, .graph")) return false;
  const { left, right, width } = element.getBoundingClientRect();
  return width > 0 && (right > innerWidth + 0.5 || left < -0.5);
});
const page = document.documentElement;
return [page.scrollWidth > innerWidth, wide.map((element) => element.outerHTML.slice(0, 200))];
"""
# Texts whose contrast to what is behind them is less than 4.5, as WCAG asks of small text.
FAINT = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (color) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const over = ([r, g, b, a], [x, y, z]) =>
  [[r, x], [g, y], [b, z]].map(([top, below]) => (top * a + below * (255 - a)) / 255);
const behind = (element) => {
  if (element === null) return [255, 255, 255];
  return over(rgba(getComputedStyle(element).backgroundColor), behind(element.parentElement));
};
const light = (color) => {
  const [r, g, b] = color.map((part) => {
    const c = part / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const faint = [];
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
  if (element.closest("button:disabled, .unseen, .skip, svg, noscript")) continue;
  const [a, b] = [
    light(over(rgba(getComputedStyle(element).color), behind(element))),
    light(behind(element)),
  ];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) faint.push([walker.currentNode.data, contrast]);
}
return faint;
"""


class Page:
    """A page in a browser, as who uses it sees it."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str, size: tuple[int, int] = DESK, scheme: str = "light") -> None:
        """Open an address in a window of a size, with the colours that its user prefers."""
        self.driver.get("about:blank")  # also where only the part behind # would change
        self.command("Network.clearBrowserCache")
        self.resize(size)
        self.prefer(scheme)
        self.driver.get(url)

    def resize(self, size: tuple[int, int]) -> None:
        width, height = size
        view = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.command("Emulation.setDeviceMetricsOverride", **view, mobile=width < 500)

    def prefer(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", features=[feature])

    def command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """Return an element's text as it is written, spaces and all."""
        return str(self.one(selector).get_attribute("textContent"))

    def wait(self, until: Callable[[], object]) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, LONG_S, poll_frequency=0.05).until(lambda _: until())

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def control(self, key: str) -> None:
        """Press a key while Control is held."""
        from selenium.webdriver import ActionChains, Keys

        chain = ActionChains(self.driver).key_down(Keys.CONTROL)
        chain.send_keys(key).key_up(Keys.CONTROL).perform()

    def is_ready(self) -> bool:
        return self.one("#send").is_enabled() and bool(self.all("#graph svg"))

    def choose(self, model: str) -> None:
        """Choose a system of those that are loaded."""
        from selenium.webdriver.support.select import Select

        self.wait(self.is_ready)
        Select(self.one("#model")).select_by_value(model)

    def ask(self, question: str) -> None:
        """Write a question and send it."""
        self.wait(self.is_ready)
        field = self.one("#field-question")
        field.clear()
        field.send_keys(question)
        self.one("#send").click()

    def wait_for_answer(self) -> None:
        self.wait(lambda: self.text("#status") == "The answer is whole.")

    def focused(self) -> str:
        """Return the id of the element that has the focus, or else its name and text."""
        element = self.driver.switch_to.active_element
        return element.get_attribute("id") or f"{element.tag_name} {element.text}"

    def console(self) -> list[str]:
        """Return what the console has got since it was last read."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def check_layout(self) -> None:
        """Check that nothing sticks out, and that all text stands out."""
        assert self.driver.execute_script(OVERFLOWING) == [False, []]
        assert self.driver.execute_script(FAINT) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    if os.geteuid() == 0:  # chromium's own sandbox refuses root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        yield chrome


@pytest.fixture
def page(browser: Chrome) -> Iterator[Page]:
    """A browser without keys, whose console must stay empty."""
    page = Page(browser)
    page.console()
    yield page
    assert page.console() == []


@pytest.fixture(scope="module")
def systems(hand_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles by the names that they are served under."""
    root = tmp_path_factory.mktemp("systems")
    endless = shutil.copytree(hand_bundle, root / "endless")
    edit_json(endless / "manifest.json", "backbones/one/max_positions", 2**20)
    hostile = write_hand_bundle(root / "hostile", says=HOSTILE)
    return {"by-hand": hand_bundle, "endless": endless, "hostile": hostile}


@contextmanager
def served(systems: dict[str, Path], **settings: Any) -> Iterator[str]:
    """Serve bundles with the page, by their names; gives the address."""
    with serving(local(systems), HttpSettings(**settings), page=page_routes()) as server:
        yield f"{server.url}/"


@pytest.fixture(scope="module")
def address(systems: dict[str, Path]) -> Iterator[str]:
    with served(systems) as address:
        yield address


@pytest.fixture(scope="module")
def built_address(build_tiny: BuildTiny) -> Iterator[str]:
    """Systems as the compiler makes them: agents side by side, and links of every kind."""
    built = {"mixture": build_tiny(MIXTURE), "tiny": build_tiny(EVERY_KIND)}
    with served({name: each.bundle for name, each in built.items()}) as address:
        yield address


def test_a_question_is_asked_and_its_trace_opened(page: Page, address: str) -> None:
    page.open(address)
    page.ask("4")
    page.wait_for_answer()
    assert page.text("#answer") == "e"
    assert page.text("#progress").startswith("round 2 of 2, 11 steps, ")
    assert "latent steps" in page.text("#facts")
    # Each agent ran in both rounds.
    assert [len(agent.find_elements("css selector", ".pip.past")) for agent in agents(page)] == [
        2,
        2,
    ]
    assert not page.all(".running, .sending")
    page.one("#trace summary").click()
    page.wait(lambda: page.all("#trace .card table"))
    rounds = [heading.text for heading in page.all("#trace .round h3")]
    assert rounds == ["Round 1", "Round 2"]
    cards = [card.text for card in page.all("#trace .round .agent-name")]
    assert cards == ["planner", "solver", "planner", "solver"]
    first = page.one("#trace .card .vectors tbody tr")
    step, norm, *_ = (cell.text for cell in first.find_elements("css selector", "th, td"))
    assert step == "1"
    assert float(norm) > 0
    tokens = [token.text for token in first.find_elements("css selector", ".tokens bdi")]
    assert (len(tokens), tokens[0]) == (5, "e")
    # In the second round, beside the first; the tables have that column there only.
    heads = [
        [cell.text for cell in table.find_elements("css selector", "thead th")]
        for table in page.all("#trace .card .vectors")
    ]
    assert "Before" not in heads[0]
    assert "Before" in heads[-1] or "Before" in heads[-2]
    page.one("#trace input[value=fed_back]").click()
    page.wait(lambda: page.text("#trace .tokens .value") == "1.000")
    page.check_layout()
    page.one("#trace .steps summary").click()
    page.wait(lambda: len(page.all("#trace .steps tbody tr")) == 11)


def agents(page: Page) -> list[WebElement]:
    return page.all("#graph .agent")


def test_agents_light_up_and_a_run_is_stopped(page: Page, address: str) -> None:
    page.open(address)
    page.choose("endless")
    page.wait(lambda: int(page.one("#max-tokens").get_attribute("max") or 0) > 30000)
    page.one("#settings summary").click()
    tokens = page.one("#max-tokens")
    tokens.clear()
    tokens.send_keys("30000")
    page.ask("Z")
    page.wait(lambda: "YZYZ" in page.text("#answer"))
    (running,) = page.all("#graph .running .name")
    assert running.text == "solver"
    assert "solver writes the answer" in page.text("#progress")
    assert page.focused() == "stop"
    page.one("#stop").click()
    page.wait(lambda: page.text("#status") == "Stopped.")
    assert page.focused() == "send"
    assert page.text("#facts") == "You stopped this answer."
    before = page.text("#answer")
    assert not page.all(".running")
    assert not page.one("#stop").is_displayed()
    # The next question has room at once, and nothing of the last one comes with it.
    page.one("#max-tokens").clear()
    page.one("#max-tokens").send_keys("2")
    page.ask("Z")
    page.wait_for_answer()
    assert page.text("#answer") == "YZ"
    assert len(before) > len("YZ")
    assert "cut off at the most tokens" in page.text("#facts")


def test_what_models_write_stays_text(page: Page, address: str) -> None:
    page.open(address)
    page.choose("hostile")
    page.ask(f"{HOSTILE}7")
    page.wait_for_answer()
    assert page.text("#answer") == HOSTILE
    page.one("#trace summary").click()
    page.wait(lambda: page.all("#trace .tokens"))
    tokens = {token.get_attribute("textContent") for token in page.all("#trace .tokens bdi")}
    assert HOSTILE.removesuffix(" ") + "\u2423" in tokens
    assert not page.all("img, main script")
    assert page.driver.title == "by-hand - recmas"
    page.check_layout()


def test_an_error_is_told_in_words(page: Page, address: str) -> None:
    page.open(address)
    page.ask("long " * 200)
    page.wait(lambda: page.all("#error .error"))
    assert page.text("#error strong") == "The question cannot be answered as it is"
    assert page.text("#error code") == "RM501"
    assert "128" in page.text("#error p")
    assert page.one("#send").is_displayed()
    page.check_layout()
    # Chromium tells of each response that is no success; nothing else is there.
    (entry,) = page.console()
    assert "status of 400" in entry
    page.ask("4")
    page.wait_for_answer()
    assert not page.all("#error .error")


def test_a_failure_within_an_answer(page: Page) -> None:
    """Engines that break halfway, which real ones do not on demand."""
    critic = AgentInfo(name="critic", backbone="one", latent_steps=2)
    model = structs.replace(MODEL, agents=(critic,), answer_agent="critic")
    script = (step("think", 1), step("decode", 3), piece("So far"), 0.5)

    async def start() -> ScriptedEngines:
        engines = ScriptedEngines((*script, failed("failed", "RM507", "the engine broke")))
        engines.models = {model.name: model}
        return engines

    with serving(start, page=page_routes()) as server:
        page.open(f"{server.url}/")
        page.ask("4")
        page.wait(lambda: page.all("#graph .running") and page.text("#answer") == "So far")
        assert [len(agent.find_elements("css selector", ".past")) for agent in agents(page)] == [2]
        page.wait(lambda: page.all("#error .error"))
    assert page.text("#error strong") == "The answer failed"
    assert page.text("#error code") == "RM507"
    assert page.text("#error p") == "the engine broke. Do something else."
    assert page.text("#answer") == "So far"
    assert page.text("#progress").endswith("failed")
    assert not page.all("#graph .running")


def test_the_key_is_asked_for(page: Page, systems: dict[str, Path]) -> None:
    with served({"by-hand": systems["by-hand"]}, api_keys=("a-long-secret",)) as address:
        page.open(address)
        page.wait(lambda: page.one("#key").is_displayed())
        assert page.focused() == "key"
        assert not page.one("#send").is_enabled()
        page.keys("wrong", "\ue007")
        page.wait(lambda: page.all("#error .error"))
        assert page.text("#error strong") == "The key is missing or wrong"
        assert page.text("#error code") == "RM544"
        page.keys("a-long-secret", "\ue007")
        page.ask("4")
        page.wait_for_answer()
        assert page.text("#answer") == "e"
        assert not page.one("#key-form").is_displayed()
        page.driver.refresh()
        page.wait(page.is_ready)
        assert all("status of 401" in entry for entry in page.console())
        page.driver.execute_script("sessionStorage.clear()")


def test_a_service_that_went_away(page: Page, hand_bundle: Path) -> None:
    with served({"by-hand": hand_bundle}) as address:
        page.open(address)
        page.wait(page.is_ready)
    page.ask("4")
    page.wait(lambda: page.all("#error .error"))
    assert page.text("#error strong") == "The service cannot be reached"
    assert all("ERR_CONNECTION_REFUSED" in entry for entry in page.console())


def test_by_keyboard_alone(page: Page, address: str) -> None:
    tab, enter, escape, down = "\ue004", "\ue007", "\ue00c", "\ue015"
    page.open(address)
    page.wait(page.is_ready)
    order = []
    for _ in range(5):
        page.keys(tab)
        order.append(page.focused())
    assert order == [
        "a Skip to the answer", "model", "field-question", "summary Settings", "send",
    ]  # fmt: skip
    page.open(address)
    page.wait(page.is_ready)
    page.keys(tab, tab, tab, "4")
    page.control(enter)
    page.wait_for_answer()
    assert page.focused() == "field-question"
    page.keys(escape, tab, tab, tab)
    assert page.focused().startswith("summary")
    page.keys(enter)
    page.wait(lambda: page.all("#trace .tokens"))
    values = [token.text for token in page.all("#trace .tokens .value")]
    while page.driver.switch_to.active_element.get_attribute("value") != "head":
        page.keys(tab)
    page.keys(down)
    page.wait(lambda: [token.text for token in page.all("#trace .tokens .value")] != values)
    assert page.driver.switch_to.active_element.get_attribute("value") == "fed_back"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("name", ["mixture", "tiny"])
def test_it_fits(
    page: Page, built_address: str, name: str, size: tuple[int, int], scheme: str
) -> None:
    page.open(built_address, size, scheme)
    page.choose(name)
    page.wait(lambda: page.text("#system-title") == name)
    page.check_layout()
    page.one("#settings summary").click()
    for field in page.all("#fields textarea"):
        field.send_keys("A pen costs 3 dollars. What do 4 pens cost?")
    page.one("#send").click()
    page.wait_for_answer()
    page.one("#trace summary").click()
    page.wait(lambda: page.all("#trace details.card"))
    for card in page.all("#trace details.card:not([open]) > summary"):
        card.click()
    page.wait(lambda: page.all("#trace .tokens"))
    page.one("#trace .steps summary").click()
    page.wait(lambda: page.all("#trace .steps tr"))
    page.check_layout()
    assert page.one("#graph svg").rect["width"] <= size[0]
    ground = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 382) == (scheme == "light")


def test_every_kind_of_message_is_shown(page: Page, built_address: str) -> None:
    page.open(built_address)
    page.choose("tiny")
    page.wait(lambda: page.text("#system-title") == "tiny")
    labels = [label.text for label in page.all("#fields label")]
    assert labels == ["Question", "Context", "Facts[0]", "Facts[1]"]
    for field in page.all("#fields textarea"):
        field.send_keys("Read this.")
    kinds = {label.text for label in page.all("#graph .carried text")}
    assert kinds == {"context", "cache rows", "states", "text"}
    # Who thinks: the scribe alone sends thoughts.
    thinking = [a.text.split("\n")[0] for a in agents(page) if "thoughts" in a.text]
    assert thinking == ["scribe"]
    page.one("#send").click()
    page.wait_for_answer()
    page.one("#trace summary").click()
    page.wait(lambda: page.all("#trace .tokens"))
    sent = [heading.text for heading in page.all("#trace h4")]
    assert [text for text in sent if text.startswith("Sent to twin: ") and "cache rows (" in text]
    assert "Wrote" in sent
    assert page.one("#trace blockquote").text
    assert [text for text in sent if text.startswith("Sent to solver: ") and "vectors" in text]


@pytest.mark.smollm2
def test_the_picture_in_the_docs(
    page: Page, build_tiny: BuildTiny, request: pytest.FixtureRequest
) -> None:
    """The page as it looks after a question to the real model; `--update-golden` writes it anew."""
    with served({"sequential": build_tiny(ON_SMOLLM2).bundle}) as address:
        page.open(address, (1100, 1420))
        page.command("Emulation.setScrollbarsHidden", hidden=True)
        page.ask("A pen costs 3 dollars. What do 4 pens cost?")
        page.wait_for_answer()
    page.one("#trace summary").click()
    page.wait(lambda: page.all("#trace .tokens"))
    assert len(page.all("#trace .agent-name")) == 9
    assert page.text("#answer")
    page.check_layout()
    picture = base64.b64decode(page.command("Page.captureScreenshot")["data"])
    page.command("Emulation.setScrollbarsHidden", hidden=False)
    assert len(picture) < 200_000
    if request.config.getoption("--update-golden"):
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_bytes(picture)
    assert PICTURE.is_file()


@pytest.fixture
def report(hand_bundle: Path, tmp_path: Path) -> Path:
    """A report of three records, the second of which says and does hostile things."""
    questions, folder = tmp_path / "q.jsonl", tmp_path / "trace"
    records = ({"id": n, "question": q} for n, q in ((1, "4"), (2, "55"), ("c", "a shoe, 6")))
    questions.write_text(lines(*records))
    files = ["--input", str(questions), "--output", str(tmp_path / "a.jsonl"), "--quiet"]
    wanted = ["--trace", str(folder), "--thoughts", "3"]
    assert main(["run", str(hand_bundle), *files, *wanted]) == 0
    for path in (folder / RECORDS_NAME, tmp_path / "a.jsonl"):
        told = [json.loads(line) for line in path.read_text().splitlines()]
        told[1]["id"] = HOSTILE
        if "answer" in told[1]:
            told[1]["answer"] = told[1]["record"]["question"] = HOSTILE
        else:
            told[1]["steps"][2]["texts"] = [HOSTILE]
            told[1]["thoughts"][0]["head"]["tokens"][0]["text"] = HOSTILE
        path.write_text(lines(*told))
    out = tmp_path / "report.html"
    answers = ["--answers", str(tmp_path / "a.jsonl")]
    assert main(["report", str(folder), "-o", str(out), *answers]) == 0
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_report_opens_from_its_file(
    page: Page, report: Path, size: tuple[int, int], scheme: str
) -> None:
    page.open(report.as_uri(), size, scheme)
    assert page.text("#found") == "3 of 3 records"
    assert page.text("#record-title") == "Record 1"
    assert [agent.text.split("\n")[0] for agent in page.all(".graph .agent .name")] == [
        "planner", "solver",
    ]  # fmt: skip
    assert len(page.all(".graph .feedback")) == 1
    assert len(page.all(".graph .pip.past")) == 4
    page.check_layout()
    page.one("#search").send_keys("SHOE 6")
    assert page.text("#found") == "1 of 3 records"
    (found,) = (link for link in page.all("#records a") if link.is_displayed())
    found.click()
    page.wait(lambda: page.text("#record-title") == "Record c")
    assert page.focused() == "record-title"
    page.check_layout()


def test_a_hostile_report_shows_texts(page: Page, report: Path) -> None:
    page.open(f"{report.as_uri()}#2")
    title = page.driver.title
    assert page.text("#record-title") == f"Record {HOSTILE}"
    assert [text.get_attribute("textContent") for text in page.all("#record > .text")] == [
        HOSTILE, HOSTILE,
    ]  # fmt: skip
    page.wait(lambda: page.all("#record blockquote"))
    assert page.text("#record blockquote") == HOSTILE
    assert page.text("#record .tokens bdi") == HOSTILE.removesuffix(" ") + "\u2423"
    assert not page.all("img, article script")
    assert page.driver.title == title == "Report: trace"

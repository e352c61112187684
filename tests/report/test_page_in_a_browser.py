"""The report's reader in Chromium: a person filters, searches, opens a trajectory and looks at its tokens."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retool_jax.report.page import write_report

driver = pytest.importorskip("playwright.sync_api", reason="no browser is driven: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)

HOSTILE = "</script><img src=x onerror='document.title=1'><script>document.title=2</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with driver.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def read(browser: Any) -> Callable[[Path], tuple[Any, list[str]]]:
    """`read(file)`: the page once its list can be used, and what its console says and what it asks of others."""

    def start(file: Path) -> tuple[Any, list[str]]:
        page, said = browser.new_page(viewport={"width": 1400, "height": 900}), []
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        page.locator("html[data-ready]").wait_for()
        return page, said

    return start


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((folder / "trajectories").iterdir()) for line in path.open()]


def test_a_person_filters_searches_and_reads(make_run, read, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0, curves=False)
    write_report([folder], tmp_path / "page.html")
    records = records_of(folder)
    page, said = read(tmp_path / "page.html")
    status = page.locator("output[name=status]")

    def says(count: int) -> None:
        page.wait_for_function("text => document.forms.filters.status.value === text", arg=f"{count} of 100")

    assert status.inner_text() == "100 of 100"
    page.get_by_label("outcome").select_option(label="wrong")
    wrong = [record for record in records if not record["correct"]]
    says(len(wrong))
    page.get_by_label("tool use").select_option("none")
    says(sum(not record["tool_calls"] for record in wrong))
    page.get_by_role("button", name="Clear").click()
    says(100)
    # A search looks into programs too, and Enter goes from there to what was found.
    looked_for = next(record for record in reversed(records) if record["tool_calls"])
    (call,) = looked_for["tool_calls"]
    page.keyboard.press("/")
    page.keyboard.type(call["code"].splitlines()[0])
    found = [r for r in records if any(call["code"].splitlines()[0] in use["code"] for use in r["tool_calls"])]
    says(len(found))
    page.keyboard.press("Enter")
    detail = page.locator("#detail")
    detail.locator("h3", has_text=found[0]["problem"]).wait_for()
    assert detail.locator(".code pre").text_content() == found[0]["tool_calls"][0]["code"]
    assert detail.locator(".output pre").text_content() == found[0]["tool_calls"][0]["output"]
    assert detail.locator("mark").inner_text() == f"\\boxed{{{found[0]['answer']}}}"
    assert detail.locator(".code pre .n, .code pre .f").count() > 0
    assert detail.locator(".track .decode").count() == 2 and detail.locator(".track .ran").count() == 1
    assert said == []


def test_tokens_show_which_were_drawn_and_how_probable_each_was(make_run, read, tmp_path, tokenizer):
    folder = make_run(tmp_path / "a", "python", 0, curves=False)
    config = json.loads((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(config | {"tokenizer": "miniature"}))
    write_report([folder], tmp_path / "page.html")
    record = records_of(folder)[0]
    page, said = read(tmp_path / "page.html")
    detail = page.locator("#detail")
    page.keyboard.press("t")
    detail.locator("span[data-token]").first.wait_for()
    told = detail.locator("span[data-token]").evaluate_all("nodes => nodes.map(node => node.dataset.token)")
    assert len(told) == len(record["ids"])
    assert [" drawn, p " in text for text in told] == [bool(on) for on in record["sampled"]]
    drawn = [p for p, on in zip(record["logprobs"], record["sampled"], strict=True) if on]
    shown = [float(text.partition("(log p ")[2].rstrip(")")) for text in told if " drawn, p " in text]
    assert shown == pytest.approx(drawn, rel=0.1, abs=0.01)
    assert detail.locator(".heat").count() == 0
    page.keyboard.press("l")
    detail.locator(".heat").wait_for()
    page.keyboard.press("t")
    detail.locator(".reasoning").first.wait_for()
    assert said == []


def test_what_a_run_wrote_is_read_and_does_nothing(make_run, read, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0, output=HOSTILE, curves=False)
    for path in (folder / "trajectories").iterdir():
        records = [json.loads(line) for line in path.open()]
        for record in records:
            record |= dict.fromkeys(("id", "problem", "answer", "end"), HOSTILE)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report([folder], tmp_path / "page.html")
    page, said = read(tmp_path / "page.html")
    title = page.title()
    page.keyboard.press("j")
    page.keyboard.press("t")
    page.locator("#detail span[data-token], #detail .muted").first.wait_for()
    page.keyboard.press("t")
    page.locator("#detail h3").wait_for()
    assert page.locator("#detail h3").inner_text() == HOSTILE
    assert page.locator("#reader img, #reader script").count() == 0
    assert (page.title(), said) == (title, [])

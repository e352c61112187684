"""The page at `/` in Chromium: a person asks, watches, stops and opens details."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from .conftest import WAIT_S, Client, python

driver = pytest.importorskip("playwright.async_api", reason="no browser is driven: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)

HOSTILE = "</pre><img src=x onerror='document.title=1'><script>document.title=2</script>"


@pytest.fixture
def browse() -> Callable[[Client], Any]:
    """`async with browse(client) as (page, said)`: a page in Chromium, and its console's output."""

    @asynccontextmanager
    async def start(client: Client) -> AsyncIterator[tuple[Any, list[str]]]:
        async with driver.async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page, said = await browser.new_page(), []
            page.set_default_timeout(1000 * WAIT_S)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            await page.goto(f"http://127.0.0.1:{client.port}")
            yield page, said
            await browser.close()

    return start


def test_a_person_asks_sees_code_output_and_answer_and_opens_the_details(serve, scripted, browse):
    program = f'print("""{HOSTILE}""")'
    turns = ["<think>\nHm.\n</think>\n\n" + python(program), f"It is {HOSTILE} \\boxed{{{{6}}}}.<|im_end|>"]
    engine = scripted({7: [*turns, "Yes.<|im_end|>"]})

    async def main() -> None:
        async with serve(engine, ["python"], token="secret") as client, browse(client) as (page, said):
            await page.locator("#model.down").wait_for()
            assert "401" in said.pop() and "bearer token" in await page.locator("#model").inner_text()
            await page.get_by_label("Bearer token").fill("secret")
            await page.get_by_label("Seed").fill("7")
            await page.locator("#model.up").wait_for()
            answer, question = page.locator(".answer").last, page.get_by_label("Your question")
            await question.fill(HOSTILE)
            await question.press("Enter")
            await answer.locator(".foot", has_text="complete").wait_for()
            assert await page.locator(".asked").inner_text() == HOSTILE
            assert await answer.locator(".block > pre").text_content() == program
            assert await answer.locator(".output pre").inner_text() == HOSTILE
            assert await answer.locator(".thought").count() == 1 and await answer.locator("mark").inner_text() == "{6}"
            assert await answer.locator(".text").last.inner_text() == f"It is {HOSTILE} {{6}}."
            await answer.get_by_role("button", name="Details").click()
            await answer.locator(".segment").first.wait_for()
            (trajectory,) = next(iter(client.server.kept.values())).trajectories
            assert await answer.locator("span[data-index]").count() == len(trajectory.ids)
            await answer.locator(".policy span").first.hover()
            assert "log-prob -0.5000 (60.7 %)" in await answer.locator(".pointed").inner_text()
            await page.get_by_label("Go on from the last answer").check()
            await question.fill("Sure?")
            await question.press("Enter")
            await page.locator(".answer").nth(1).locator(".foot", has_text="complete").wait_for()
            assert await answer.locator(".text").inner_text() == "Yes."
            assert list(client.server.kept.values())[1].trajectories[0].ids[: len(trajectory.ids)] == trajectory.ids
            assert await page.locator("#log img, #log script").count() == 0
            assert (await page.title(), said) == ("ReTool", [])

    asyncio.run(main())


def test_a_person_stops_an_answer_and_is_told_of_a_refusal(serve, scripted, browse):
    engine = scripted({7: [python("while True: pass")]})

    async def main() -> None:
        async with serve(engine, ["python"]) as client, browse(client) as (page, _):
            await page.locator("#model.up").wait_for()
            await page.get_by_role("button", name="Settings").click()
            await page.get_by_label("Seed").fill("7")
            await page.get_by_label("Your question").fill("?")
            await page.get_by_role("button", name="Ask", exact=True).click()
            await page.locator(".block small", has_text="running").wait_for()
            await page.get_by_role("button", name="Stop").click()
            await page.locator(".problem", has_text="Stopped.").wait_for()
            await client.becomes(lambda: client.server.open == 0)
            assert client.server.service.gauges() == {"waiting": 0, "drawing": 0, "calling": 0}
            client.server.closing = True
            await page.get_by_label("Your question").fill("again?")
            await page.keyboard.press("Enter")
            await page.locator(".problem", has_text="the server is closing; send the request again").wait_for()
            assert await page.get_by_label("Your question").input_value() == "again?"

    asyncio.run(main())

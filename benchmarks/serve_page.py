"""Test the server's page in a browser: ask the trained miniature, read code, output and answer, and open the details.

    python benchmarks/serve_page.py [init_from=runs/grpo] [browser=/usr/bin/chromium] [out=docs/serving.png] [shots=]

Starts a server and drives Chromium with playwright, which nothing else in the project needs (`pip install playwright`).
Asks three questions one after another and shows the page light and dark, wide and narrow. `out` is a picture of the
first answer; `shots=FOLDER` keeps a picture of each stage. Prints JSON: the milliseconds from each question to the
first words or code and to the end of the answer, the answers, the messages of the page's console, which must be empty,
and whether all parts were there (`held`). Exits with 1 if not.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import arguments
from playwright.sync_api import Page, sync_playwright

DEFAULTS = {"init_from": "runs/grpo", "browser": "/usr/bin/chromium", "out": "docs/serving.png", "shots": ""}
QUESTIONS = {"Compute 347 * 826.": 347 * 826, "What is the gcd of 462 and 198?": 66, "Add 250 and 300.": 550}
WAIT_MS = 120_000


@contextlib.contextmanager
def served(init_from: str) -> Iterator[str]:
    """Start a server on a free port and yield its address; stop it at the end of the block."""
    command = [sys.executable, "-m", "retool_jax.serve", "config=serve", f"init_from={init_from}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            lines = (re.search(r"^serving .* on (http\S+)/v1$", line) for line in process.stdout)
            if (found := next(filter(None, lines), None)) is None:
                sys.exit("the server ended before it served")
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)


def ask(page: Page, question: str) -> dict[str, object]:
    """Ask as a user does; return the times and the contents of the answer."""
    page.get_by_label("Your question").fill(question)
    began = time.perf_counter()
    page.keyboard.press("Enter")
    answer = page.locator(".answer").last
    answer.locator(".text, .block").first.wait_for(timeout=WAIT_MS)
    first = time.perf_counter()
    page.get_by_role("button", name="Ask", exact=True).wait_for(timeout=WAIT_MS)
    return {
        "question": question,
        "first_ms": round(1000 * (first - began)),
        "answered_ms": round(1000 * (time.perf_counter() - began)),
        "programs": answer.locator(".block > pre").all_inner_texts(),
        "outputs": answer.locator(".output pre").all_inner_texts(),
        "boxed": answer.locator("mark").all_inner_texts(),
        "problems": answer.locator(".problem").all_inner_texts(),
    }


def main(words: list[str]) -> None:
    options = arguments.parse(words, DEFAULTS)
    console: list[str] = []

    def shoot(page: Page, name: str) -> None:
        if options["shots"]:
            page.screenshot(path=Path(options["shots"]) / f"{name}.png")

    with served(options["init_from"]) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options["browser"], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 720}, color_scheme="light")
        page.on("console", lambda message: console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto(address)
        page.locator("#model.up").wait_for(timeout=WAIT_MS)
        shoot(page, "empty")
        answers: list[dict] = []
        for number, question in enumerate(QUESTIONS):
            answers.append(ask(page, question))
            if not number:
                page.set_viewport_size({"width": 940, "height": 1000})
                page.get_by_role("button", name="Details").click()
                page.locator(".segment.policy span").nth(3).hover()
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=options["out"])
                page.set_viewport_size({"width": 1000, "height": 720})
            shoot(page, f"answer-{number}")
        tokens = page.locator(".details span[data-index]").count()
        page.emulate_media(color_scheme="dark")
        shoot(page, "dark")
        page.set_viewport_size({"width": 390, "height": 800})
        shoot(page, "narrow-dark")
        page.emulate_media(color_scheme="light")
        shoot(page, "narrow")
        browser.close()
    right = sum(answer["boxed"] == [str(truth)] for answer, truth in zip(answers, QUESTIONS.values(), strict=True))
    held = answers[0]["boxed"] != [] and answers[0]["outputs"] != [] and tokens > 0 and not console
    numbers = {
        "benchmark": "serve_page",
        "answers": answers,
        "right": right,
        "tokens_shown": tokens,
        "console": console,
    }
    print(json.dumps(numbers | {"held": held}))
    sys.exit(not held)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The page at `/`: its files and its Content-Security-Policy, and a record with the text of each token."""

import asyncio
import re

FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}


def test_the_page_is_three_files_that_a_browser_lets_do_nothing_else(serve, scripted):
    async def main() -> None:
        async with serve(scripted({}), token="secret") as client:
            for path, kind in FILES.items():
                async with client.session.get(path) as response:
                    text, headers = await response.text(), response.headers
                    assert response.status == 200 and response.content_type == kind
                policy = dict(
                    part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";")
                )
                assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
                assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
                assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert not re.search(r"https?:|//\w+\.\w|innerHTML|\sstyle=|\son\w+=|<script>", text), path

    asyncio.run(main())


def test_a_record_says_each_token_where_it_is_asked_to(serve, scripted, tokenizer):
    async def main() -> tuple[dict, dict]:
        async with serve(scripted({7: ["Six.<|im_end|>"]})) as client:
            asked = {"messages": [{"role": "user", "content": "?"}], "seed": 7}
            path = f"/v1/trajectories/{(await client.ask(asked))['id']}"
            return (await client.get(path))["data"][0], (await client.get(f"{path}?tokens=true"))["data"][0]

    plain, told = asyncio.run(main())
    assert told == plain | {"tokens": [tokenizer.decode([index]) for index in plain["ids"]]}
    assert "".join(told["tokens"]) == "".join(segment["text"] for segment in plain["segments"])

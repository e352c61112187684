"""A fake gcloud and kubectl: remembers what was created, records every call, and fails as planned.

`$FAKE_CLOUD` is its folder. `calls.jsonl` has one call per line. `there` maps each existing resource to the words of
the call that created it. `plan` maps patterns (parts of a line with * between them) to lists of answers. Each matching
call takes the next answer; the last one stays. An answer is (stdout, stderr, exit status), or None for the ordinary
answer. A negative status means that the call is carried out but reports a failure. `status` holds the workers' status.

It is started often, so it imports almost nothing; `there` and `plan` are marshalled because that needs no imports.
"""

import marshal
import os
import sys
from _json import encode_basestring_ascii as quoted

HERE = os.environ["FAKE_CLOUD"]
VERBS = ("describe", "create", "delete", "get")
KINDS = ("alpha", "workload-policy", "generic")  # words that do not belong to a name


def read(name: str) -> dict:
    try:
        with open(f"{HERE}/{name}", "rb") as file:
            return marshal.load(file)
    except FileNotFoundError:
        return {}


def write(name: str, content: dict) -> None:
    with open(f"{HERE}/{name}", "wb") as file:
        marshal.dump(content, file)


def matches(pattern: str, line: str) -> bool:
    at = 0
    for part in pattern.split("*"):
        at = line.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


def planned(line: str) -> tuple[str, str, int] | None:
    plan = read("plan")
    for pattern, answers in plan.items():
        if matches(pattern, line):
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            write("plan", plan)
            return answer
    return None


def thing(words: list[str]) -> tuple[str, str] | None:
    """The verb and the resource of a call, such as ("create", "gcloud secrets run-hf-token")."""
    plain = [word for word in words if not word.startswith("-") and word not in KINDS]
    for verb in VERBS:
        if verb in plain[:-1]:
            at = plain.index(verb)
            kind = plain[:at] if words[0] == "gcloud" else [*plain[:at], plain[at + 1]]
            name = plain[at + 1 if words[0] == "gcloud" else at + 2]
            return ("describe" if verb == "get" else verb), " ".join([*kind, name.split("@")[0]])
    return None


def instances(words: list[str], there: dict) -> str:
    group = words[words.index("list-instances") + 1]
    made = there["gcloud compute instance-groups managed " + group]
    size = next(int(word[len("--size=") :]) for word in made if word.startswith("--size="))
    status = "--format=value(instanceStatus)" in words
    return "".join("RUNNING\n" if status else f"{group}-{number}\n" for number in range(size))


def usual(line: str, words: list[str]) -> tuple[str, str, int]:
    """Stdout, stderr and exit status of a call without a planned answer."""
    there = read("there")
    if " auth list" in line:
        return "someone@example.com\n", "", 0
    if " storage cat " in line and "/status/" in line:
        try:
            with open(f"{HERE}/status") as file:
                return file.read(), "", 0
        except FileNotFoundError:
            return "", "ERROR: no objects match", 1
    if "terminalState" in line:
        return "Completed", "", 0
    if " get pods " in line:
        return "pod/run-slice-0-0-x7k2p\n", "", 0
    if "list-instances" in words:
        try:
            return instances(words, there), "", 0
        except KeyError:
            return "", "ERROR: the instance group was not found", 1
    if (found := thing(words)) is None:
        return "", "", 0
    verb, about = found
    if verb == "create":
        there[about] = words
    elif about not in there and "--ignore-not-found" not in words:
        return "", f"ERROR: NOT_FOUND: {about}", 1
    elif verb == "delete":
        there.pop(about, None)
        if " clusters " in about:  # its contents are deleted with it
            there = {name: made for name, made in there.items() if "node-pools" not in name and name[:7] != "kubectl"}
    write("there", there)
    return ("ACTIVE\n" if "--format=value(state.state)" in words else "", "", 0)


def main() -> None:
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    line = " ".join(words)
    call = f'{{"words": [{", ".join(map(quoted, words))}]'
    if " cp - " in line:
        with open(f"{HERE}/archive.tar.gz", "wb") as file:
            file.write(sys.stdin.buffer.read())
    elif "/dev/stdin" in line or line.endswith(("=-", " -f -")):
        call += f', "stdin": {quoted(sys.stdin.read())}'
    with open(f"{HERE}/calls.jsonl", "a") as file:
        file.write(call + "}\n")
    answer = planned(line)
    if answer is None or answer[2] < 0:
        ordinary = usual(line, words)
    out, err, code = answer or ordinary
    sys.stdout.write(out)
    sys.stderr.write(err + "\n" if err else "")
    sys.exit(abs(code))


if __name__ == "__main__":
    main()

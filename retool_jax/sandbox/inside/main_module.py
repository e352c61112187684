"""The `__main__` of a program, with a file from which multiprocessing's children get its functions.

Children of `spawn` and `forkserver` are new interpreters, which run their parent's main file under another name. What
they find here is the program as far as it comes without them: where it starts processes itself, unguarded by
`if __name__ == "__main__"`, they stop, and what it has defined by then is what they were started for.
"""

import linecache
import os
import types

SNIPPET = "<snippet"  # how the names of a program and of a session's cells begin
RUN = """
import contextlib, io
for name, code in sources:
    nothing = io.StringIO()  # what the parent has printed is not printed again
    with contextlib.suppress(BaseException), contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        exec(compile(code, name, "exec", dont_inherit=True), main)
"""
_made: dict[str, str] = {}  # path by content


class Main(types.ModuleType):
    """The module. Its attributes are the program's globals, so it has none of its own."""

    @property
    def __file__(self) -> str:
        """A file in memory that runs all code so far, made when somebody asks for it."""
        sources = [(name, "".join(entry[2])) for name, entry in linecache.cache.items() if name.startswith(SNIPPET)]
        content = f"exec({RUN!r}, {{'sources': {sources!r}, 'main': globals()}})\n"
        path = _made.get(content, "")
        if not os.path.exists(path):
            file = os.memfd_create("main")
            with open(file, "w", encoding="utf-8", closefd=False) as writer:
                writer.write(content)
            path = _made[content] = f"/proc/{os.getpid()}/fd/{file}"
            lines = "\n".join(code for _, code in sources).splitlines(keepends=True)
            linecache.cache[path] = (len(content), None, lines, path)  # for those who look for a class's source
        return path

"""The `__main__` of a program, with a file from which multiprocessing's children get its functions.

Children of `spawn` and `forkserver` are new interpreters, which run their parent's main file under another name. Here
that file runs the program up to the line where it starts processes itself without `if __name__ == "__main__"`. There
the child stops; by then it has defined the functions that it needs.
"""

import linecache
import os
import types

SNIPPET = "<snippet"  # how the names of a program and of a session's cells begin
RUN = """
import contextlib, io
for name, code in sources:
    nothing = io.StringIO()  # the parent has printed this already
    with contextlib.suppress(BaseException), contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        exec(compile(code, name, "exec", dont_inherit=True), main)
"""
_path_of: dict[str, str] = {}  # content -> path


class Main(types.ModuleType):
    """The module. Its attributes are the program's globals, so it must not add any."""

    @property
    def __file__(self) -> str:
        """A file in memory that runs all code so far; made on demand."""
        sources = [(name, "".join(entry[2])) for name, entry in linecache.cache.items() if name.startswith(SNIPPET)]
        content = f"exec({RUN!r}, {{'sources': {sources!r}, 'main': globals()}})\n"
        path = _path_of.get(content, "")
        if not os.path.exists(path):
            file = os.memfd_create("main")
            with open(file, "w", encoding="utf-8", closefd=False) as writer:
                writer.write(content)
            path = _path_of[content] = f"/proc/{os.getpid()}/fd/{file}"
            lines = "\n".join(code for _, code in sources).splitlines(keepends=True)
            linecache.cache[path] = (len(content), None, lines, path)  # for code that looks for a class's source
        return path

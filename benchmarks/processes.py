"""Python code in a process of its own, with its use of resources and its peak of memory that is not that of files."""

import os
import sys
import tempfile

_WRAPPED = """
import os, sys, threading
def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) << 10
peak, ended = [0], threading.Event()
def watch():
    while not ended.wait(0.02):
        peak[0] = max(peak[0], own())
if {watched}:
    threading.Thread(target=watch, daemon=True).start()
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
ended.set()
print("", max(peak[0], own()), file=sys.stderr)
"""


def run(code, *arguments, watched=True, **environment):
    """Run one line of code; returns its output, its resources (user and system seconds, reads) and its peak of memory (bytes).

    Args:
        arguments: of the process, `sys.argv[1:]`.
        watched: watch the memory while it runs; else the memory is that at its end.
        environment: variables to set.
    """
    script = [sys.executable, "-c", _WRAPPED.format(code=code, watched=watched), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        descriptors = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, errors.fileno(), 2)]
        process = os.posix_spawn(sys.executable, script, {**os.environ, **environment}, file_actions=descriptors)
        _, status, used = os.wait4(process, 0)
        for file in (out, errors):
            file.seek(0)
        output, said = out.read(), errors.read()
    if status:
        raise SystemExit(said)
    return output, used, int(said.split()[-1])

"""The process that holds the engines: `python -m recmas_runtime.serve.worker_main DESCRIPTOR`.

The descriptor is a socket to the front end: requests come in, events go out. What libraries print
goes to standard output and error, which the front end logs. The process ends when its front end
does, however that ends.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.serve.engine_host import EngineHost
from recmas_runtime.serve.protocol import MAX_LINE_BYTES, AnyEvent, Failed, Gauges, ProblemInfo
from recmas_runtime.serve.wire import REQUESTS, SETTINGS, to_line

# A step may take long, and nobody waits for it once the front end is gone.
_LAST_STEP_S: Final = 5.0
# Of 1000: where memory runs out, the system should end this process and not the front end.
_FIRST_TO_GO: Final = "500"


def main(descriptor: int) -> int:
    """Run requests until the front end closes its end of the socket."""
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The front end decides when this ends. No SIG_IGN: programs that tools start inherit that.
        signal.signal(number, lambda *_: None)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO, encoding="ascii")
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)  # or programs that tools start would hold the socket open
    lines = channel.makefile("rb")
    settings = SETTINGS.decode(lines.readline())

    def emit(event: AnyEvent | Gauges) -> None:
        try:
            channel.sendall(_line_of(event))
        except OSError:  # the front end is gone
            os._exit(1)

    host = EngineHost(
        emit,
        settings.limits,
        device=settings.device,
        threads=settings.threads,
        cache=settings.cache,
    )
    threading.Thread(target=_read, args=(lines, host), daemon=True).start()
    host.run()
    return 0


def _read(lines: BinaryIO, host: EngineHost) -> None:
    """Hand requests to the engines; a channel that closes, or holds nonsense, ends them."""
    try:
        while line := lines.readline(MAX_LINE_BYTES):
            host.submit(REQUESTS.decode(line))
    finally:
        host.stop()
        last = threading.Timer(_LAST_STEP_S, os._exit, args=(1,))
        last.daemon = True
        last.start()


def _line_of(event: AnyEvent | Gauges) -> bytes:
    try:
        return to_line(event)
    except RecmasError as error:
        if isinstance(event, Gauges):
            raise
        problems = tuple(map(ProblemInfo.of, error.problems))
        return to_line(Failed(id=event.id, reason="failed", problems=problems))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

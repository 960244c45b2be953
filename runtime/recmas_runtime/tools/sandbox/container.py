"""Containers: Docker or Podman, with an image that is on the machine already."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from recmas_runtime.tools.sandbox.packages import THREADS
from recmas_runtime.tools.sandbox.program import (
    MAX_OPEN_FILES,
    MAX_PROCESSES,
    MAX_TMP_BYTES,
    SandboxResult,
    run_python,
)
from recmas_runtime.tools.sandbox.seccomp import MACHINES, oci_profile

IMAGE_VARIABLE: Final = "RECMAS_SANDBOX_IMAGE"
DEFAULT_IMAGE: Final = "python:3.12-slim"
_NOBODY: Final = 65534
_ASK_S: Final = 10.0
_PROXIES: Final = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")


@dataclass(frozen=True, kw_only=True)
class Container:
    """Runs programs in containers of Docker or Podman, one for each; the image has `python3`."""

    name: str
    executable: str
    image: str

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        timeout_s: float,
        memory_mb: int,
        packages: Sequence[str] = (),
    ) -> SandboxResult:
        """Run Python code (see `Sandbox.run`); its packages are those of the image."""
        container = f"recmas-{uuid.uuid4().hex}"
        with tempfile.NamedTemporaryFile("w", encoding="ascii", suffix=".json") as profile:
            json.dump(oci_profile(MACHINES[platform.machine()]), profile)
            profile.flush()
            return run_python(
                [
                    self.executable,
                    "run",
                    *_isolation(container, memory_mb=memory_mb),
                    *(f"--env={name}={value}" for name, value in THREADS.items() if packages),
                    *("--security-opt", f"seccomp={profile.name}"),
                    *("--entrypoint", "python3", self.image),
                ],
                code,
                stdin=stdin,
                user=_NOBODY,
                timeout_s=timeout_s,
                memory_mb=memory_mb,
                max_processes=None,  # it would count those of all containers together
                env=os.environ,  # says where the engine is; containers do not get it
                stop=partial(self._remove, container),
            )

    def missing(self) -> str:
        """Return why this image cannot be run here; empty if it can."""
        try:
            # Only what is there: running untrusted code is no reason to fetch anything.
            found = self._ask("image", "inspect", self.image)
        except (OSError, subprocess.SubprocessError) as error:
            return f"`{self.name} image inspect` failed: {error}"
        if found.returncode == 0:
            return ""
        said = found.stderr.strip().splitlines() or ["no reason given"]
        return f"image {self.image} cannot be used: {said[-1]}"

    def _remove(self, container: str) -> None:
        """End a container at once; killing the client that started it leaves it running."""
        for command in (("kill", container), ("rm", "--force", container)):
            with suppress(OSError, subprocess.SubprocessError):
                self._ask(*command)

    def _ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - the container engine
            [self.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=False,
        )


def _isolation(container: str, *, memory_mb: int) -> list[str]:
    tmp = f"/tmp:rw,noexec,nosuid,nodev,size={MAX_TMP_BYTES},mode=1777"  # noqa: S108
    return [
        *("--rm", "--interactive", "--name", container, "--pull", "never"),
        *("--network", "none", "--ipc", "private", "--hostname", "sandbox"),
        *("--read-only", "--tmpfs", tmp, "--workdir", "/tmp"),  # noqa: S108
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--user", f"{_NOBODY}:{_NOBODY}", "--pids-limit", str(MAX_PROCESSES)),
        *("--memory", f"{memory_mb}m", "--memory-swap", f"{memory_mb}m", "--cpus", "1"),
        *("--ulimit", f"nofile={MAX_OPEN_FILES}:{MAX_OPEN_FILES}"),
        # Podman would ask for a million, which not every machine grants; --pids-limit binds.
        *("--ulimit", "nproc=4096:4096"),
        *("--log-driver", "none"),
        # Engines pass these on, and a proxy's address may hold a password.
        *(f"--env={name}=" for proxy in _PROXIES for name in (proxy, proxy.upper())),
    ]

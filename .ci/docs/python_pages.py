"""The pages of the public Python packages: Sphinx fills them from docstrings."""

from __future__ import annotations

from importlib import import_module

_PACKAGES = {
    "recmas_compiler": "python_compiler.rst",
    "recmas_runtime": "python_runtime.rst",
    "recmas_export": "python_export.rst",
}
_RUNTIME = "recmas_runtime"
# Doors that a package's `__all__` does not name: the builder is found by its entry point.
_DOORS = {"recmas_export": ("recmas_export.build.build",)}


def pages() -> dict[str, str]:
    """Return the page of each package, by name."""
    return {name: _page(package) for package, name in _PACKAGES.items()}


def _page(package: str) -> str:
    module = import_module(package)
    title = f"The package ``{package}``"
    lines = [title, "=" * len(title), "", f".. automodule:: {package}", "   :no-members:", ""]
    names = [f"{package}.{name}" for name in getattr(module, "__all__", ())]
    for path in [*names, *_DOORS.get(package, ())]:
        home, _, name = path.rpartition(".")
        found = getattr(import_module(home), name)
        lines += [name, "-" * len(name), ""]
        if package != _RUNTIME and found.__module__.startswith(_RUNTIME):
            lines += [f"The same as :py:obj:`{_RUNTIME}.{name}`.", ""]
        elif isinstance(found, type):
            lines += [f".. autoclass:: {path}", "   :members:", ""]
        else:
            lines += [f".. autofunction:: {path}", ""]
    return "\n".join(lines) + "\n"

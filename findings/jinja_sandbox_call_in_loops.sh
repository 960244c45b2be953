#!/usr/bin/env bash
# Jinja2 3.1.6: a SandboxedEnvironment that overrides `call`, to watch or to bound what a chat template
# calls, gets other keyword arguments inside a loop or a block than outside of one.
#
# The compiled template passes `_loop_vars` (in loops) and `_block_vars` (in blocks) to
# `environment.call` with every call; the base class takes them out again before the function sees
# them. An override that counts or binds **kwargs works on templates without loops, and a chat
# template is one loop over messages.
#
# Seen: outside {}; in a loop {'_loop_vars': {}}
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet jinja2==3.1.6
"$work/venv/bin/python" - <<'PY'
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment

seen = []


class Watched(ImmutableSandboxedEnvironment):
    def call(self, context, function, *args, **kwargs):
        seen.append(dict(kwargs))
        return super().call(context, function, *args, **kwargs)


environment = Watched()
environment.from_string("{{ 'a'.upper() }}").render()
environment.from_string("{% for m in messages %}{{ m.upper() }}{% endfor %}").render(
    messages=["hello"]
)
outside, inside = seen
print(f"outside {outside}; in a loop {inside}")
if outside or "_loop_vars" not in inside:
    sys.exit("changed: calls look the same in a loop and outside of one")
PY

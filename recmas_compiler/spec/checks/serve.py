"""Conversations that do not fit the prompts."""

from __future__ import annotations

from collections.abc import Iterator

from recmas_compiler.spec.document.problems import did_you_mean, problem_at
from recmas_compiler.spec.schema.declared import Declared
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.plan import ConversationPart, field_place, usual_question


def check_serve(declared: Declared) -> Iterator[Problem]:
    """Fields of `serve` that no prompt shows, that are lists, or that take what another takes."""
    serve, places = declared.document.serve, declared.places
    if serve is None:
        return
    prompts = [prompt for of in declared.prompts.values() for _, prompt in of.fields()]
    if any(prompt.issues for prompt in prompts):
        return  # which may be the fields that seem to be missing
    shown = [part.value for prompt in prompts for part in prompt.parts if part.kind == "field"]
    names = {field_place(value).name for value in shown}
    takers: dict[ConversationPart, str] = {}
    for name, part in serve.taken.items():
        place = places.key(("serve", name))
        entries = [value for value in shown if value != name and field_place(value).name == name]
        if name not in names:
            message = f"no prompt shows a field `{name}`."
            hint = did_you_mean(name, names) or "Write `{{ question }}` in a prompt."
            yield problem_at(place, "RM128", message, hint=hint)
        elif name == "id":
            message = "`id` names a record, and does not come from a conversation."
            yield problem_at(place, "RM128", message, hint="Take another field.")
        elif entries:
            message = (
                f"`{name}` is a list, as a prompt shows `{entries[0]}`, and messages are text."
            )
            hint = f"Take another field, or show `{{{{ {name} }}}}`."
            yield problem_at(place, "RM128", message, hint=hint)
        elif part in takers:
            message = f"`{takers[part]}` and `{name}` both take `{part}`."
            yield problem_at(place, "RM128", message, hint="Keep one of them.")
        takers.setdefault(part, name)
    usual = usual_question(shown)
    if "last_user" not in takers and (usual not in shown or usual in serve.taken):
        message = "no field takes the last user message."
        free = sorted(names & {*shown} - serve.taken.keys() - {"id"})
        hint = f"Add `{free[0]}: last_user`." if free else "Write `{{ question }}` in a prompt."
        yield problem_at(places.key(("serve",)), "RM128", message, hint=hint)

"""The forms of links that the released trainer writes, and the kinds that they are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from recmas_compiler.spec.document.problems import did_you_mean, show
from recmas_runtime.formats.link_kinds import RELEASED_KIND, TRAINER_KIND, LinkKind, LinkRole

# Its names and their short forms. It has others, without a residual or of one layer.
FORMS_BY_ROLE: Final[Mapping[LinkRole, Mapping[str, LinkKind]]] = {
    "inner": {"ln_res_adapter": RELEASED_KIND, "res_adapter": TRAINER_KIND},
    "outer": {"outer_ln_res_adapter": RELEASED_KIND, "outer_res_adapter": TRAINER_KIND},
}
_SHORT: Final[Mapping[str, LinkKind]] = {"2layer_ln_res": RELEASED_KIND, "2layer_res": TRAINER_KIND}


def kind_of_form(form: object, role: LinkRole) -> LinkKind | None:
    """Return the kind of link that the trainer calls so, or None if recmas has none."""
    return {**FORMS_BY_ROLE[role], **_SHORT}.get(form) if isinstance(form, str) else None


def form_of_kind(kind: LinkKind, role: LinkRole) -> str | None:
    """Return what the trainer calls a kind of link, or None if it has none."""
    return next((form for form, known in FORMS_BY_ROLE[role].items() if known == kind), None)


def unknown_form(form: object, role: LinkRole) -> str:
    """Return why a form cannot be used, with those that can."""
    known = FORMS_BY_ROLE[role]
    listed = " or ".join(f"`{name}`" for name in known)
    hint = did_you_mean(str(form), known)
    return f"is of the form {show(form)}, not {listed}{f'. {hint}' if hint else ''}"

"""Ids of program steps: `ROUND/WHO/WHAT`, so that a printed program reads without a legend."""

from __future__ import annotations

from recmas_runtime.formats.ids import outer_link_id


def prefill_id(round_: int, agents: tuple[str, ...]) -> str:
    """Return the id of a Prefill: `r1/planner/prefill`, or `r1/a+b/prefill` for a batch."""
    return f"r{round_}/{'+'.join(agents)}/prefill"


def think_id(round_: int, agents: tuple[str, ...]) -> str:
    """Return the id of a Think: `r1/planner/think`."""
    return f"r{round_}/{'+'.join(agents)}/think"


def send_id(round_: int, source: str, targets: tuple[str, ...]) -> str:
    """Return the id of a Send: `r1/planner->critic/send`, or `r1/planner->critic+solver/send`."""
    return f"r{round_}/{outer_link_id(source, '+'.join(targets))}/send"


def decode_id(round_: int, agent: str) -> str:
    """Return the id of the Decode: `r3/solver/decode`."""
    return f"r{round_}/{agent}/decode"

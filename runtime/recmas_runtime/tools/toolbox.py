"""The tools of one system, and the bounds within which its answer agent may call them."""

from __future__ import annotations

import contextvars
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.plan import PythonPlan, SearchPlan, ToolsPlan
from recmas_runtime.tools.call_scanner import CallScanner
from recmas_runtime.tools.calls import Status, ToolCall, ToolResult, valid_text
from recmas_runtime.tools.sandbox import find_sandbox
from recmas_runtime.tools.search import (
    TAVILY_ENDPOINT,
    LocalSearch,
    Search,
    SearchFailedError,
    TavilySearch,
    passages_text,
    shortened,
)

Outcome = tuple[Status, str]

# A program may stand in a Markdown fence.
_FENCE: Final = re.compile(r"```[a-zA-Z0-9]*\n(.*?)\n?```", re.DOTALL)


class Toolbox:
    """Runs an answer agent's calls. Safe to use from many threads.

    Args:
        corpus: JSON lines; None where the plan has no local search.
        ask: Asks a human and returns the reply; None if nobody is there.
    """

    def __init__(
        self,
        plan: ToolsPlan,
        *,
        corpus: Path | None,
        functions: Mapping[str, Callable[[str], str]] | None = None,
        ask: Callable[[str], str] | None = None,
        tavily_endpoint: str = TAVILY_ENDPOINT,
    ) -> None:
        self._plan = plan
        self._corpus = corpus
        self._functions = dict(functions or {})
        self._ask = ask
        self._tavily_endpoint = tavily_endpoint
        self._search: Search | None = None
        self._search_lock = threading.Lock()
        self._ask_lock = threading.Lock()
        self._tools: dict[str, Callable[[str], Outcome]] = {}
        if plan.search is not None:
            self._tools["search"] = partial(self._run_search, plan.search)
        if plan.python is not None:
            self._tools["python"] = partial(self._run_python, plan.python)
        if plan.ask:
            self._tools["ask"] = self._run_ask
        for name in plan.functions:
            self._tools[name] = partial(self._run_function, name)

    @property
    def names(self) -> tuple[str, ...]:
        """The tools that the answer agent may call."""
        return tuple(self._tools)

    def scanner(self) -> CallScanner:
        """Make a scanner for one answer's text."""
        return CallScanner(self.names)

    def run(self, call: ToolCall, *, num_earlier: int) -> ToolResult:
        """Run one call; its errors are in the result.

        Calls that the same answer has made before are `num_earlier`, limited ones included.
        """
        start = time.perf_counter()
        try:
            status, text = self._outcome(call, num_earlier)
        # Whatever a tool runs into is the result of this call, and no trouble of other records.
        except Exception as error:
            status, text = "error", f"{type(error).__name__}: {error}"
        bounded = shortened(valid_text(text), self._plan.max_result_chars)
        return ToolResult(call, status, bounded, (time.perf_counter() - start) * 1e3)

    def _outcome(self, call: ToolCall, num_earlier: int) -> Outcome:
        if num_earlier >= self._plan.max_calls:
            return "limit", f"no more calls: an answer may make {self._plan.max_calls}"
        if call.problem:
            return "error", call.problem
        if call.name not in self._tools:
            known = ", ".join(f"`{name}`" for name in self.names)
            return "error", f"there is no tool `{call.name}`; the tools are {known}"
        return self._tools[call.name](call.argument)

    def _run_search(self, plan: SearchPlan, query: str) -> Outcome:
        if not query:
            return "error", "the query is empty"
        try:
            with self._search_lock:
                # Made on first use, outside of the call's time: an index is built once.
                self._search = self._search or self._make_search(plan)
        except RecmasError as error:
            problem = error.problems[0]
            return "refused", f"{problem.message}. {problem.hint}"
        return self._in_time(partial(self._find, self._search, query))

    def _find(self, search: Search, query: str) -> Outcome:
        try:
            passages = search.find(query, timeout_s=self._plan.timeout_s)
        except SearchFailedError as error:
            return error.status, str(error)
        except TimeoutError:
            return "timeout", self._too_long()
        return "ok", passages_text(passages, max_chars=self._plan.max_result_chars)

    def _make_search(self, plan: SearchPlan) -> Search:
        if plan.backend == "tavily":
            return TavilySearch(plan.top_k, endpoint=self._tavily_endpoint)
        assert self._corpus is not None, "a plan with a local search comes with its corpus"
        return LocalSearch(self._corpus, top_k=plan.top_k)

    def _run_python(self, plan: PythonPlan, argument: str) -> Outcome:
        fenced = _FENCE.fullmatch(argument)
        code = fenced[1] if fenced else argument
        if not code.strip():
            return "error", "the program is empty"
        sandbox = find_sandbox()
        if sandbox is None:
            return "refused", (
                "this machine has no sandbox, so the program was not run "
                "(`recmas doctor` tells what is missing)"
            )
        try:
            ran = sandbox.run(code, timeout_s=self._plan.timeout_s, memory_mb=plan.memory_mb)
        except OSError as error:
            return "error", f"the sandbox could not be started: {error}"
        text = "\n".join(part for part in (ran.stdout.strip(), ran.stderr_tail.strip()) if part)
        if ran.status == "timeout":
            return "timeout", f"{text}\n{self._too_long()}".strip()
        if ran.status == "ok":
            return "ok", text or "(no output; print what you want to see)"
        return "error", text or f"the program ended with exit code {ran.exit_code}"

    def _run_ask(self, question: str) -> Outcome:
        if self._ask is None:
            return "refused", "nobody is there to answer"
        # One question at a time; and people take the time they take.
        with self._ask_lock:
            return _called(partial(self._ask, question))

    def _run_function(self, name: str, argument: str) -> Outcome:
        if name not in self._functions:
            return "refused", f"the program that runs this system provides no function `{name}`"
        return self._in_time(partial(_called, partial(self._functions[name], argument)))

    def _in_time(self, work: Callable[[], Outcome]) -> Outcome:
        """Return what `work` gives, or a timeout. A thread cannot be stopped: it is left behind."""
        outcomes: list[Outcome] = []

        def run() -> None:
            try:
                outcomes.append(work())
            # Of foreign code, in a thread that nobody else looks after.
            except BaseException as error:
                outcomes.append(("error", f"{type(error).__name__}: {error}"))

        # The context goes along: by it a system knows that one of its own tools is asking.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(run,), daemon=True)
        thread.start()
        thread.join(self._plan.timeout_s)
        is_running = thread.is_alive()
        if outcomes:
            return outcomes[0]
        return ("timeout", self._too_long()) if is_running else ("error", "the tool failed")

    def _too_long(self) -> str:
        return f"stopped: it took longer than {self._plan.timeout_s:g} s"


def _called(function: Callable[[], str]) -> Outcome:
    """Return what a caller's function gives; its exceptions are its result."""
    try:
        text = function()
    except KeyboardInterrupt:
        raise
    # Foreign code: whatever it raises, sys.exit included, must not end the run.
    except BaseException as error:
        return "error", f"{type(error).__name__}: {error}"
    if not isinstance(text, str):
        return "error", f"the function returned {type(text).__name__}, not text"
    return "ok", text

"""Crews of CrewAI: `agents.yaml` and `tasks.yaml` (with `crew.py`), or `crew.jsonc`; flows.

A task is an agent of the spec: who does it becomes the system text, what is asked the prompt. A
task reads the results of all tasks before it, unless `context` says which ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from recmas_compiler.importers.readers.crewai_code import CrewCode, Method, read_code
from recmas_compiler.importers.readers.crewai_flow import read_flow
from recmas_compiler.importers.readers.crewai_members import (
    CREW_FILES,
    REASONS,
    CrewTask,
    Members,
    add_tasks,
    examples_of,
    read_crew,
    read_task,
)
from recmas_compiler.importers.source_files import YAML_SUFFIXES, Node, TeamFiles, refuse
from recmas_compiler.importers.team import LeftOut, Team
from recmas_compiler.importers.texts import field as field_named
from recmas_compiler.spec.document.places import SourcePosition
from recmas_runtime.core.errors import fail
from recmas_runtime.core.text import listed

FILE_NAMES: Final = "crew.jsonc, flow.yaml, or config/agents.yaml with config/tasks.yaml"
_FLOW: Final = ("flow.yaml", "flow.yml")
_CLASSIC: Final = ("config/agents.yaml", "agents.yaml")
# Where they are looked for: in the folder itself, in a project, in a flow's own folders.
_FOLDERS: Final = (("",), ("src/*/",), ("crews/*/", "src/*/crews/*/"))


def read(path: Path) -> Team:
    """Read a crew or a flow from its folder, or from its main file.

    Raises:
        RecmasError: RM100 to RM102, RM160 to RM164 with the place.
    """
    main = _find(path)
    files = TeamFiles(root=path if path.is_dir() else main.parent)
    is_yaml = main.suffix.lower() in YAML_SUFFIXES
    if is_yaml and "schema" in files.open(main).mapping():
        return read_flow(files, main)
    members = Members(files)
    if not is_yaml:
        node = files.open(main, comments=True)
        name, last = node.text_at("name"), read_crew(members, node, main.parent)
        examples = examples_of(node.get("inputs"))
    else:
        name, last = _read_classic(members, main, path)
        examples = {}
    name = name or _project(main.absolute()).name
    return members.team(name=name, form="a crew of CrewAI", answer=last, examples=examples)


def _find(path: Path) -> Path:
    """Return the main file: of a crew in JSON, of a flow, or the `agents.yaml`."""
    if path.is_file():
        return path
    if not path.is_dir():
        hint = f"Give the folder of a crew, with {FILE_NAMES}."
        raise fail("RM160", "there is no such folder", file=str(path), hint=hint)
    for folders in _FOLDERS:
        for names in (CREW_FILES, _FLOW, _CLASSIC):
            found = [
                file
                for folder in folders
                for name in names
                for file in sorted(path.glob(folder + name))
            ]
            if len({_project(file) for file in found}) > 1:
                hint = f"Give one of them: {listed(_project(file) for file in found)}."
                raise fail("RM161", f"there are {len(found)} crews", file=str(path), hint=hint)
            if found:
                return found[0]
    hint = f"It has to hold {FILE_NAMES}."
    raise fail("RM161", "this is no crew of CrewAI", file=str(path), hint=hint)


def _project(main: Path) -> Path:
    return main.parent.parent if main.parent.name == "config" else main.parent


def _read_classic(members: Members, main: Path, given: Path) -> tuple[str, str]:
    """Read the pair of YAML files, and `crew.py` beside them."""
    files = members.files
    base = (
        main.parent.parent
        if main.parent.name == "config" and given != main.parent
        else (main.parent)
    )
    code = _code(files, base)
    agents_file, tasks_file = main, main.with_name("tasks.yaml")
    if code.name:
        start = SourcePosition(file=str(base / "crew.py"), line=1, column=1)
        agents_file = _named(base, code.agents_config, start, main)
        tasks_file = _named(base, code.tasks_config, start, tasks_file)
    if not tasks_file.is_file():
        message = f"there is no {tasks_file.name} beside {agents_file}"
        hint = "A crew has agents.yaml and tasks.yaml."
        raise fail("RM162", message, file=str(tasks_file), hint=hint)
    agents = files.open(agents_file).mapping()
    written = files.open(tasks_file).mapping()
    by_method = {method.config: name for name, method in code.tasks.items()}
    tasks = []
    for name, node in _ordered(files, code, written):
        task = read_task(name, node)
        method = code.tasks.get(by_method.get(name, name))
        tasks.append(task if method is None else _with_code(members, task, method, by_method, code))
    if code.crew is not None and (process := code.crew.keys.pop("process", None)):
        if process.names != ("sequential",):
            files.remark(process.place, "no manager hands out tasks: they run in their order")
            members.leave(process, "tasks run in their order, each behind those before it")
        else:
            files.num_carried_in_code += 1
    alias = {name: m.config for name, m in code.agents.items() if m.config in agents}
    for task in tasks:
        task.agent = alias.get(task.agent or "", task.agent)
    place = files.open(agents_file).place
    last = add_tasks(members, agents, tasks, place, resolve=field_named, code=code)
    _leave_rest(members, code)
    return code.name, last


def _code(files: TeamFiles, base: Path) -> CrewCode:
    """Return what the code of a crew says; nothing if there is none."""
    scripts = [base / "crew.py"] if (base / "crew.py").is_file() else sorted(base.glob("*.py"))
    for script in scripts:
        if script.name == "crew.py" or b"CrewBase" in script.read_bytes()[: 1 << 20]:
            code = read_code(files.read(script), file=files.shown(script))
            files.num_carried_in_code += code.num_carried
            files.left_in_code += code.left
            return code
    return CrewCode()


def _named(base: Path, name: str, place: SourcePosition, otherwise: Path) -> Path:
    """Return a file that the code names; the usual one if the folder is another."""
    path = base / name
    if path.is_file() or not otherwise.is_file():
        if not path.is_file():
            hint = "Check `agents_config` and `tasks_config`."
            raise refuse(place, "RM162", f"there is no file {path}.", hint)
        return path
    return otherwise


def _ordered(files: TeamFiles, code: CrewCode, written: dict[str, Node]) -> list[tuple[str, Node]]:
    """Return the tasks in the order in which they run: that of the code, or of the file."""
    if not code.tasks:
        return list(written.items())
    names = list(code.tasks)
    chosen = code.crew.keys.get("tasks") if code.crew is not None else None
    if chosen is not None and chosen.names != ("tasks",):
        code.crew.keys.pop("tasks")  # type: ignore[union-attr]  # it is there
        for name in chosen.names:
            if name not in code.tasks:
                message = f"`tasks` names `{name}`, which is no method with @task."
                raise refuse(chosen.place, "RM162", message, "Name a task of the class.")
        names = list(dict.fromkeys(chosen.names))
        files.num_carried_in_code += 1
    found: dict[str, Node] = {}
    for name in names:
        method = code.tasks[name]
        if method.config not in written:
            message = f"`{name}` takes `{method.config}`, which is not in tasks.yaml."
            raise refuse(method.place, "RM162", message, "Write the task, or remove the method.")
        found[method.config] = written[method.config]
    for name, node in written.items():
        if name not in found:
            node.leave("the code makes no task of it")
    return list(found.items())


def _with_code(
    members: Members, task: CrewTask, method: Method, by_method: Mapping[str, str], code: CrewCode
) -> CrewTask:
    """Return a task with what its method says beside the file."""
    keys = method.keys
    config = {name: key for key, name in by_method.items()}
    if agent := keys.pop("agent", None):
        task.agent = agent.names[0]
        members.files.num_carried_in_code += 1
    if context := keys.pop("context", None):
        task.context = [config.get(name, name) for name in context.names]
        members.files.num_carried_in_code += 1
    task.places = (*task.places, method.place)
    return task


def _leave_rest(members: Members, code: CrewCode) -> None:
    """List every argument in the code that was not taken."""
    methods = [*code.agents.values(), *code.tasks.values()]
    methods += [code.crew] if code.crew is not None else []
    used = {id(use.node) for use in members.tools}
    for method in methods:
        for key in method.keys.values():
            if id(key) in used:
                continue
            if method is code.crew and key.names == (key.name,):
                members.files.num_carried_in_code += 1  # agents=self.agents
                continue
            reason = REASONS.get(key.name, "it has no meaning here")
            left = LeftOut(key=key.path, place=key.place, reason=reason)
            members.files.left_in_code.append(left)

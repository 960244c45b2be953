"""Prompts that learn by textual gradients: our side of it. The package itself is not needed here;
`test_textgrad_package.py` runs it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

import recmas_compiler as rc
import recmas_runtime as rt
from kit.commands import Ran, run_recmasc
from kit.files import WORDS_PROTOCOL, WriteRecords
from recmas_compiler.evaluation.checks import make_check
from recmas_compiler.evaluation.data.data_file import Question
from recmas_compiler.evaluation.data.protocol import ExactSection
from recmas_compiler.evaluation.evaluate import EvalOptions, OtherSystem, evaluate
from recmas_compiler.spec.schema.declared import parse_prompt
from recmas_compiler.text_gradients import Spent, read_settings
from recmas_compiler.text_gradients.forward import Asker
from recmas_compiler.text_gradients.optimise import _refuse_shared
from recmas_compiler.text_gradients.prompts import (
    keeps_marks,
    parameters_of,
    spec_with_texts,
    template_of,
    with_texts,
)
from recmas_compiler.text_gradients.result import Proposal, StepReport
from recmas_compiler.text_gradients.state import State, load_state, save_state
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.plan import Plan
from recmas_runtime.running.records import Record


@pytest.fixture(scope="module")
def plan(tiny_bundle: Path) -> Plan:
    return open_bundle(tiny_bundle, verify_hashes=False).plan


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    path = tmp_path / "words.yaml"
    path.write_text(WORDS_PROTOCOL)
    return path


def test_whole_prompts_learn_where_that_is_asked_for(plan: Plan) -> None:
    found = {one.name: one.text for one in parameters_of(plan, rewrites="prompt")}
    assert found == {
        "planner.system": "Plan well.",
        "planner.prompt": "{{ question }} Make a plan.",
        "planner.prompt.then": "{{ question }} Seen: {{ latent.solver }} Better plan.",
        "critic.prompt": "{{ question }} Judge {{ latent.planner }}.",
        "solver.prompt": "{{ question }} Use {{ latent.critic }} and answer.",
    }


def test_instructions_are_lines_without_marks(plan: Plan) -> None:
    # Each prompt is one line with a field, so that only the system text is left.
    (only,) = parameters_of(plan, rewrites="instructions")
    assert (only.name, only.text, only.places) == ("planner.system", "Plan well.", ("system",))
    lines = parse_prompt("{{ latent.solver }}\nQ: {{ question }}\n\nThink.\nBriefly.\n").parts
    planner = plan.agents["planner"]
    agents = {
        **plan.agents,
        "planner": structs.replace(planner, first=lines, then=lines, system=()),
    }
    changed = structs.replace(plan, agents=agents)
    (only,) = parameters_of(changed, rewrites="instructions")
    assert (only.name, only.text) == ("planner.prompt", "Think.\nBriefly.")
    assert only.places == ("first", "then")
    new = with_texts(changed, {"planner.prompt": "Count."}, rewrites="instructions")
    assert template_of(new.agents["planner"].then) == (
        "{{ latent.solver }}\nQ: {{ question }}\n\nCount."
    )


def test_nothing_to_learn_is_refused(plan: Plan) -> None:
    planner = structs.replace(plan.agents["planner"], system=())
    bare = structs.replace(plan, agents={**plan.agents, "planner": planner})
    with pytest.raises(RecmasError, match="no prompt has a line without fields") as error:
        parameters_of(bare, rewrites="instructions")
    assert error.value.problems[0].code == "RM508"


@pytest.mark.parametrize(
    "text",
    [
        "Plain.",
        "{{ question }} and {{ facts[0] }}",
        "{{ latent.a-b }}\n{% raw %}{{ x }}{% endraw %}",
    ],
)
def test_templates_come_back(text: str) -> None:
    parts = parse_prompt(text).parts
    assert parse_prompt(template_of(parts)).parts == parts


def test_the_spec_with_other_texts_passes_and_says_them(plan: Plan, tiny_bundle: Path) -> None:
    texts = {one.name: one.text for one in parameters_of(plan, rewrites="prompt")}
    texts["planner.prompt.then"] = "Look: {{ latent.solver }}\nQuestion: {{ question }}"
    texts["solver.prompt"] = "{{ latent.critic }} {{ question }} = ? # no comment: \"'"
    written = spec_with_texts(
        (tiny_bundle / "spec.yaml").read_text(), plan, texts, rewrites="prompt"
    )
    spec = rc.parse_spec(written, base_dir=tiny_bundle)
    prompts = {name: one.prompt for name, one in spec.document.agents.items()}
    assert prompts["planner"].first.strip() == "{{ question }} Make a plan."
    assert prompts["planner"].then.strip() == texts["planner.prompt.then"]
    assert spec.declared.prompts  # all of it parses
    parts = with_texts(plan, texts, rewrites="prompt").agents["solver"].then
    assert template_of(parts) == texts["solver.prompt"]


@pytest.mark.parametrize(
    ("after", "holds"),
    [
        ("Say {{ question }}, {{latent.a}}", True),
        ("Say {{ question }}", False),
        ("{{ question }} {{ latent.a }} {{ latent.a }}", False),
        ("{{ question }} {{ latent.b }}", False),
        ("{{ question }} {{ latent.a }} {% if x %}", False),
        ("{{ question }} {{ latent.a }} {{ x | y }}", False),
        ("[question] [latent.a]", False),
    ],
)
def test_fields_and_slots_stay(after: str, holds: bool) -> None:
    assert keeps_marks("{{ latent.a }} {{ question }}", after) is holds


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "without records to learn from"),
        (["data"], "--textgrad data: this is not KEY=VALUE"),
        (["data=x", "steps=0"], "steps=0: input should be greater than or equal to 1"),
        (["data=x", "pace=2"], "pace=2: extra inputs are not permitted"),
        (["data=x", "url=http://127.0.0.1:1/v1"], "url without model"),
        (["data=x", "model=m"], "model without url"),
    ],
)
def test_settings_are_refused_by_name(given: list[str], said: str) -> None:
    with pytest.raises(RecmasError) as error:
        read_settings(given)
    assert error.value.problems[0].code == "RM506"
    assert said in error.value.problems[0].message


def test_budgets_and_places_may_change_on_resuming() -> None:
    one = read_settings(["data=x", "steps=2", "url=http://a/v1", "model=m"])
    two = read_settings(["data=y", "steps=9", "url=http://b/v1", "model=m", "max_seconds=5"])
    assert one.identity() == two.identity()
    assert one.identity() != read_settings(["data=x", "url=http://a/v1", "model=n"]).identity()


def test_states_come_back_whole(tmp_path: Path) -> None:
    step = StepReport(
        number=1,
        records=("a", "b"),
        num_wrong=1,
        num_failed=0,
        num_cut=0,
        proposals=(Proposal(parameter="p", fate="fields", text="\ud800 x", why="w"),),
        validation=0.5,
        spent=Spent(forward_tokens=1, backward_tokens=2, calls=3, seconds=4.5),
    )
    before = State(
        texts={"p": "t"}, steps=(step,), validation=0.5, other_spent=Spent(forward_tokens=9)
    )
    save_state(tmp_path, before, {"data": "d"})
    assert load_state(tmp_path, {"data": "d"}, resume=True) == before
    assert before.spent == Spent(forward_tokens=10, backward_tokens=2, calls=3, seconds=4.5)
    for identity, resume, code in (({"data": "d"}, False, "RM302"), ({"data": "e"}, True, "RM603")):
        with pytest.raises(RecmasError) as error:
            load_state(tmp_path, identity, resume=resume)
        assert error.value.problems[0].code == code
    for damage in ("", "[]", '{"version": 2}', '{"version": 1, "identity": {}}'):
        (tmp_path / "state.json").write_text(damage)
        with pytest.raises(RecmasError) as error:
            load_state(tmp_path, {"data": "d"}, resume=True)
        assert error.value.problems[0].code == "RM603"
    assert load_state(tmp_path / "none", {}, resume=True) is None


def test_what_is_tested_is_not_learned_from(ask: Callable[..., Question]) -> None:
    def question(number: int, text: str) -> Question:
        return Question(record=Record(id=number, fields={"question": text}), gold={}, line=number)

    _refuse_shared([question(1, "a")], [question(1, "b")], Path("train.jsonl"))
    with pytest.raises(RecmasError, match="has record 2, which is tested on") as error:
        _refuse_shared([question(1, "a"), question(2, "b")], [question(7, "b")], Path("t.jsonl"))
    assert error.value.problems[0].line == 2


def test_every_text_of_a_run_is_known_by_agent_and_round(tiny_bundle: Path) -> None:
    with rt.load(tiny_bundle, threads=1) as base, make_check(ExactSection(kind="exact")) as check:
        system = base.baseline("text@3")
        sampling = structs.replace(system.plan.sampling, max_new_tokens=3)
        asker = Asker(check=check, sampling=sampling, opening="")
        records = [Record(id=i, fields={"question": f"Q{i}"}, index=i) for i in range(2)]
        runs = asker.ask(system, [Question(record=one, gold={"answer": "x"}) for one in records])
        alone = system.run(records[1], sampling=sampling)
    assert [set(run.texts) for run in runs] == [
        {
            (a, r)
            for r in (1, 2, 3)
            for a in ("planner", "critic", "solver")
            if (a, r) != ("solver", 3)
        }
    ] * 2
    assert runs[1].answer == alone.answer
    usage = alone.usage
    assert runs[1].num_tokens == (
        usage.prompt_tokens + usage.handover_tokens + usage.completion_tokens
    )


def test_other_systems_are_asked_beside_and_not_mixed(
    tiny_bundle: Path, write_records: WriteRecords, protocol: Path, tmp_path: Path
) -> None:
    data = write_records([{"question": "Q0", "answer": "x"}, {"question": "Q1", "answer": "y"}])
    given: dict[str, Any] = {
        "bundle": tiny_bundle, "data": data, "protocol": str(protocol), "untrained_bundle": None,
        "overrides": (), "batch": 2, "out": tmp_path / "out", "device": "cpu", "threads": 1,
        "baselines": ("text", "mine"),
    }  # fmt: skip

    def other(digest: str) -> OtherSystem:
        return OtherSystem(digest=digest, of=lambda base: base.baseline("text"))

    made = evaluate(
        EvalOptions(**given, resume=False), progress=Silent(), others={"mine": lambda: other("1")}
    )
    text, mine = made.report.systems
    assert (text.name, mine.name) == ("text", "mine")
    answers = [(tmp_path / f"out/answers-{n}.jsonl").read_text() for n in ("text", "mine")]
    texts = [[json.loads(a)["answer"]["answer"] for a in one.splitlines()] for one in answers]
    assert texts[0] == texts[1]
    with pytest.raises(RecmasError, match="what was made for it was mine 1 and is mine 2"):
        evaluate(
            EvalOptions(**given, resume=True),
            progress=Silent(),
            others={"mine": lambda: other("2")},
        )


def run_eval(arguments: Sequence[object]) -> Ran:
    return run_recmasc("eval", *arguments)


def test_the_command_refuses_before_it_works(
    tiny_bundle: Path, write_records: WriteRecords, protocol: Path, tmp_path: Path
) -> None:
    data = write_records([{"question": "Q0", "answer": "x"}])
    asked = [tiny_bundle, "--data", data, "--protocol", protocol, "--out", tmp_path / "out"]
    lone = run_eval([*asked, "--textgrad", "steps=3"])
    assert lone.exit_code != 0
    assert "--textgrad without --baseline textgrad" in lone.output
    bare = run_eval([*asked, "--baseline", "textgrad"])
    assert "without records to learn from" in bare.output
    wrong = run_eval(
        [*asked, "--baseline", "textgrad", "--baseline", "moat", "--textgrad", f"data={data}"]
    )
    assert "there is no baseline 'moat'" in wrong.output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("textgrad") is not None, reason="the package is installed here"
)
def test_the_missing_package_is_named(
    tiny_bundle: Path, write_records: WriteRecords, protocol: Path, tmp_path: Path
) -> None:
    data = write_records([{"question": "Q0", "answer": "x"}])
    done = run_eval(
        [tiny_bundle, "--data", data, "--protocol", protocol, "--out", tmp_path / "out",
         "--baseline", "textgrad", "--textgrad", f"data={data}"]
    )  # fmt: skip
    assert "RM201" in done.output
    assert "[textgrad]" in done.output

"""Prompt and target as one text: where the target begins, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kit.models import LoadTiny
from kit.systems import declare
from kit.training import changed_agents, examples, on_one, training_graph
from recmas_compiler.lowering.training_graph.calls import Call, CallWriter, TrainExample
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.prompts.render import Slot, Tokens
from recmas_runtime.prompts.tokenizer import Tokenizer

TEXT = "An end."


def write(tiny: LoadTiny, family: str, target: str = TEXT, **changes: object) -> tuple[Call, str]:
    """Return a turn of the solver and the text of its target tokens, control tokens included."""
    backbone = tiny(family)
    graph = changed_agents(on_one("sequential", backbone), **changes)
    example = TrainExample(id="7", index=0, fields={"question": "Why?"}, targets={"solver": target})
    call = CallWriter(graph.system, {"tiny": backbone}).write("solver", "then", "turn", example)
    last = call.items[-1]
    assert isinstance(last, Tokens)
    return call, backbone.tokenizer.decode(last.ids[-call.num_target_tokens :])


@pytest.mark.parametrize(
    ("family", "written"),
    [
        ("llama", "An end.<|eot_id|>"),
        ("qwen2", "An end.<|im_end|>\n"),
        ("gemma3", "An end.<end_of_turn>\n"),
        ("phi3", "An end.<|end|>\n<|endoftext|>"),
    ],
)
def test_a_target_is_what_follows_the_prompt(tiny: LoadTiny, family: str, written: str) -> None:
    call, text = write(tiny, family)
    assert text == written
    assert [item.agent for item in call.items if isinstance(item, Slot)] == ["critic"]


def test_a_target_spells_no_control_token(tiny: LoadTiny) -> None:
    call, text = write(tiny, "llama", "An <|eot_id|> in the text")
    assert text == "An <|eot_id|> in the text<|eot_id|>"
    ids = call.items[-1].ids
    assert ids.count(tiny("llama").tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 2  # two turns


def test_a_token_across_the_boundary_is_of_the_prompt(tiny: LoadTiny) -> None:
    # The prompt ends in the middle of a word that the tokenizer has as one token.
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    backbone = replace(tiny("llama"), chat_template=template)
    graph = on_one("sequential", backbone)
    graph = changed_agents(graph, system=(), then=(PromptPart(kind="text", value="Say th"),))
    example = replace(examples(graph)[0], targets={"solver": "en the plan"})
    call = CallWriter(graph.system, {"tiny": backbone}).write("solver", "then", "turn", example)
    (item,) = call.items
    assert isinstance(item, Tokens)
    assert backbone.tokenizer.decode(item.ids) == "Say then the plan"
    assert backbone.tokenizer.decode(item.ids[-call.num_target_tokens :]) == "n the plan"


def test_words_begin_where_the_token_before_ends(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    tokenizer = Tokenizer(backbone.tokenizer_json, backbone.chat_template)
    text = "the plan \u00e9\u4e2d end"
    placed = tokenizer.encode_placed(text)
    assert tuple(i for i, _ in placed) == tokenizer.encode(text)
    starts = [start for _, start in placed]
    assert starts == sorted(starts)
    # All the bytes of a character are where the character is.
    assert starts.count(text.index("\u4e2d")) == 3


def test_a_template_that_moves_text_is_refused(tiny: LoadTiny) -> None:
    with pytest.raises(RecmasError) as caught:
        write(tiny, "mistral")
    (problem,) = caught.value.problems
    assert problem.code == "RM206"
    assert problem.message.startswith(
        "agent 'solver', record '7': the chat template writes the conversation in another way"
    )
    write(tiny, "mistral", system=())


def test_a_block_of_reasoning_that_past_turns_lack_belongs_to_the_prompt(tiny: LoadTiny) -> None:
    call, text = write(tiny, "qwen3")
    assert text == "An end.<|im_end|>\n"
    last = call.items[-1]
    assert isinstance(last, Tokens)
    decoded = tiny("qwen3").tokenizer.decode(last.ids)
    assert decoded.endswith("<think>\n\n</think>\n\nAn end.<|im_end|>\n")


def test_a_template_that_leaves_out_the_assistant_is_refused(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    graph = on_one("sequential", backbone)
    writer = CallWriter(graph.system, {"tiny": replace(backbone, chat_template=template)})
    with pytest.raises(RecmasError, match="leaves out the assistant's text"):
        writer.write("solver", "then", "turn", examples(graph)[0])


def test_an_agent_without_a_target_needs_rollouts(tiny: LoadTiny) -> None:
    graph = on_one("sequential", tiny("llama"))
    lone = [replace(e, targets={"solver": e.targets["solver"]}) for e in examples(graph)]
    with pytest.raises(RecmasError, match="agent 'planner', record '0': there is no target text"):
        training_graph(graph, {"tiny": tiny("llama")}).prepare(lone)
    rolled = training_graph(graph, {"tiny": tiny("llama")}, mode="rollout")
    assert rolled(rolled.prepare(lone)).mean > 0
    mute = [replace(lone[0], targets={})]
    with pytest.raises(RecmasError, match="agent 'solver', record '0'"):
        rolled.prepare(mute)


def test_a_missing_field_names_the_record(tiny: LoadTiny) -> None:
    graph = on_one("sequential", tiny("llama"))
    trained = training_graph(graph, {"tiny": tiny("llama")})
    with pytest.raises(RecmasError, match="record '1' has no field 'question'"):
        trained.prepare([examples(graph)[0], replace(examples(graph)[1], fields={})])


def test_a_call_is_cut_from_its_end() -> None:
    call = Call(items=(Slot("a"), Tokens((1, 2, 3, 4))), num_target_tokens=3)
    assert call.cut(1) == Call(items=(Slot("a"), Tokens((1, 2))), num_target_tokens=1)
    assert call.cut(5) is call
    assert call.num_positions({"a": 6}) == 10


def test_a_perfect_message_is_what_the_sender_should_think(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    graph = on_one("sequential", backbone)
    writer = CallWriter(graph.system, {"tiny": backbone})
    said = "An <|eot_id|> in the text that is longer"
    example = replace(examples(graph)[0], targets={"planner": said, "critic": "The end."})
    (turn,) = writer.write_ideal("critic", example)
    before, message, after = turn.items
    plain, slot, same = writer.write("critic", "then", "turn", example).items
    assert (before, after) == (plain, same)
    assert slot == Slot("planner")
    assert isinstance(message, Tokens)
    assert len(message.ids) == graph.system.agents["planner"].latent_steps
    assert said.startswith(backbone.tokenizer.decode(message.ids))
    assert (
        not set(message.ids)
        & Tokenizer(backbone.tokenizer_json, backbone.chat_template).control_ids
    )


def test_feedback_speaks_from_the_second_round_on(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    graph = changed_agents(on_one("sequential", backbone), first=None)
    writer = CallWriter(graph.system, {"tiny": backbone})
    first, later = writer.write_ideal("planner", examples(graph)[0])
    assert first.items[1] == Tokens(())
    assert isinstance(later.items[1], Tokens)
    assert len(later.items[1].ids) == graph.system.agents["solver"].latent_steps


def test_a_backbone_of_two_names_is_one(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    second = replace(declare("second", backbone), shared_as="tiny")
    graph = on_one(
        "sequential",
        backbone,
        backbones=[declare("tiny", backbone), second],
        backbone_of={"critic": "second"},
    )
    (turn,) = CallWriter(graph.system, {"tiny": backbone}).write_ideal("critic", examples(graph)[0])
    assert isinstance(turn.items[1], Tokens)


def test_nobody_speaks_without_a_target(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    graph = on_one("sequential", backbone)
    writer = CallWriter(graph.system, {"tiny": backbone})
    alone = replace(examples(graph)[0], targets={"critic": "A better plan."})
    (turn,) = writer.write_ideal("critic", alone)
    assert turn.items[1] == Tokens(())


def test_targets_that_the_template_would_strip_are_trained_whole_and_told_of(
    tiny: LoadTiny,
) -> None:
    backbone = tiny("llama")  # which trims every message
    graph = on_one("sequential", backbone)
    writer = CallWriter(graph.system, {"tiny": backbone})
    first, second = examples(graph)[:2]
    assert writer.write("solver", "then", "turn", first)
    assert writer.warnings() == ()
    spaced = replace(second, targets={"solver": "The end.\n"})
    call = writer.write("solver", "then", "turn", spaced)
    last = call.items[-1]
    assert isinstance(last, Tokens)
    assert backbone.tokenizer.decode(last.ids).endswith("The end.\n<|eot_id|>")
    (warning,) = writer.warnings()
    assert warning.code == "RM755"
    assert "agent 'solver'" in warning.message
    assert f"the target of 1 record, the first is {second.id!r}" in warning.message


def test_a_long_record_is_measured_without_being_written(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    graph = on_one("sequential", backbone)
    writer = CallWriter(graph.system, {"tiny": backbone})
    example = examples(graph)[0]
    assert writer.min_positions("solver", example) <= 40
    longest = len("<|start_header_id|>")
    asked = replace(example, fields={"question": "<|eot_id|>" * 10_000})
    assert writer.min_positions("solver", asked) >= 100_000 // longest
    said = replace(example, targets={"solver": "x" * 100_000})
    assert writer.min_positions("solver", said) >= 100_000 // longest

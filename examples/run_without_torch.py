"""What a deployment does: no torch; recmas with its extra `cpu` is all it needs.

python run_without_torch.py BUNDLE
"""

from __future__ import annotations

import sys

from msgspec import structs

import recmas_runtime as rt


def main(bundle: str) -> None:
    system = rt.load(bundle)
    print(f"{system.plan.name}: {len(system.plan.agents)} agents, rounds: {system.plan.rounds}")

    stream = system.stream("A pen costs 3 dollars. What do 4 pens cost?")
    for piece in stream:
        print(piece, end="", flush=True)
    assert stream.answer is not None
    print("\n", stream.answer.usage, stream.answer.timing_ms, sep="")

    questions = ["What is 2 + 2?", "Tom had 12 apples and gave 5 away. How many are left?"]
    warm = structs.replace(
        system.plan.sampling, temperature=0.7, top_p=0.9, seed=7, max_new_tokens=24
    )
    for answer in system.run(questions, sampling=warm):  # one ragged batch
        print(answer.id, repr(answer.answer), answer.finish_reason)

    # A record that cannot be answered does not lose the others.
    records = [rt.Record(id="ok", fields={"question": "Hi?"}), rt.Record(id="bad", fields={})]
    for result in system.run_batch(records, sampling=warm):
        print("error:" if isinstance(result, rt.RecmasError) else "answer:", result)

    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1])

"""Write codes for the relay as JSON lines: what the reader sees, what the speaker is to say.

python make_data.py [--digits 2] [--records 640] [--seed 0] > train.jsonl
"""

from __future__ import annotations

import argparse
import json
import random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=2)
    parser.add_argument("--records", type=int, default=640)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    draw = random.Random(arguments.seed)
    for number in range(arguments.records):
        code = "".join(draw.choices("0123456789", k=arguments.digits))
        name = f"code-{arguments.seed}-{number}"
        record = {"id": name, "context": f"{code} is the code.", "code": code}
        print(json.dumps(record))


if __name__ == "__main__":
    main()

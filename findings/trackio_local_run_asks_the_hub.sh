#!/usr/bin/env bash
# trackio 0.43.0: a run that is logged to the local disk asks huggingface.co who the user is, as soon
# as the environment has a token.
#
# Neither space_id nor server_url is given, so nothing is to leave the machine; but `trackio.run.Run`
# puts `_Username` into the config, which is `huggingface_hub.whoami(token)`. What it raises is kept
# to itself, so a training on a machine without a network starts late and says nothing of it.
# `HF_HUB_OFFLINE=1` keeps it from asking. Looking the name up is refused here by an audit hook, so
# that this script sends no token anywhere.
#
# Seen: asked for ['huggingface.co']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet trackio==0.43.0
cd "$work"
export HF_HOME="$work/hf" TRACKIO_DIR="$work/trackio"
export HF_TOKEN=hf_this0is0no0token0of0anybody0000000
unset HF_HUB_OFFLINE
"$work/venv/bin/python" - <<'PY'
import sys

asked = []


def refuse(event, arguments):
    if event == "socket.getaddrinfo":
        asked.append(arguments[0])
        raise OSError("refused")


sys.addaudithook(refuse)
import trackio

run = trackio.init(project="local", name="one", auto_log_cpu=False, auto_log_gpu=False)
run.log({"loss": 1.0}, step=1)
trackio.finish()
found = sorted(set(map(str, asked)))
print(f"asked for {found}")
if "huggingface.co" not in found:
    sys.exit("changed: a local run asks nobody")
PY

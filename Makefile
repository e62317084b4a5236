# Eyas: `make` shows what there is.

VENV    := .venv
PYTHON  ?= python3
BIN     := $(VENV)/bin
RECIPE  ?= models/solar-cells/recipe.toml
BUNDLE  ?= runs/solar-cells/bundle
TORCH   ?= cuda
STAMP   := $(VENV)/.installed-$(TORCH)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
READERS := tflite tensorflow
PYTEST_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help install distill retrain test check format figures docs flash bench bench-camera-faults broker collect watch board test-arm test-board test-board-long soak soak-board system-deps clean clean-runs \
	test-readers test-tutorial report-images bench-all bench-here bench-main-job bench-truth bench-strange-data bench-ood bench-scale bench-training bench-compression bench-distillation bench-pretrained bench-frame-loop bench-telemetry bench-updates bench-loop fleet-demo

help: ## show this
	@echo "Eyas: from a folder of labelled images to a classifier on a fleet of cameras"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  RECIPE=path   the recipe of distill (default $(RECIPE))"
	@echo "  BUNDLE=DIR    the bundle of flash (default $(BUNDLE))"
	@echo "  TORCH=cpu     install the CPU build of torch, where its index can be reached"

install: $(STAMP) ## the virtual environment with everything in it; quick when nothing changed

# Python compiles what it imports, which is little of 500 packages; all of them only where it may not write that.
COMPILED := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

# uv is installed by pip and installs the rest: pip may pick a torch wheel that torchvision does not fit.
$(STAMP): pyproject.toml device/pyproject.toml constraints/host.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet $(COMPILED) --constraint constraints/host.txt \
		$(if $(filter cpu,$(TORCH)),--torch-backend=cpu) --editable ./device --editable '.[train,fleet,demo,dev]'
	@touch $@

retrain: install ## the next version: make retrain IMAGES=DIR [RETRAIN_FLAGS=…]; RETRAIN_FLAGS=--due: if drift calls for it
	$(BIN)/eyas retrain $(IMAGES) $(RETRAIN_FLAGS)

distill: install ## the main job: images -> teacher -> student -> int8 -> verified bundle and report
	$(BIN)/eyas distill $(RECIPE)

# On two cores: many tests wait for programs, brokers and cameras, and a third process has work meanwhile.
test: install ## all tests; first says which system parts are missing, and installs them where it may
	@$(BIN)/python -m tests.support.system_parts --install
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

check: install ## ruff, mypy strict (of benchmarks, too), layering, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/device/test_layering.py
	$(MAKE) --no-print-directory docs

format: install ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-all: install ## the quick forms of all benchmarks, one by one at idle priority; resumable (BENCH_FLAGS=--again, --list)
	$(BIN)/python benchmarks/bench_all.py $(BENCH_FLAGS)

bench-main-job: install ## time and score the main job over three seeds (about an hour)
	$(BIN)/python benchmarks/main_job.py --json benchmarks/results/main-job.json

bench-truth: install ## right answers where they are known: losses, probabilities, intervals, split, memory, durations (minutes)
	$(BIN)/python benchmarks/truth.py --quick --json benchmarks/results/truth.json

bench-strange-data: install ## 2,000 random folder trees, tables and damaged images: no traceback, nothing lost in silence (minutes)
	$(BIN)/python benchmarks/strange_data.py --json benchmarks/results/strange-data.json

bench-ood: install ## does a model that is out of its depth say so: changes of images, false alarms (needs runs/solar-cells)
	$(BIN)/python benchmarks/ood.py --json benchmarks/results/ood.json

bench-scale: install ## a million small images listed, hashed and split: seconds and memory (half an hour, 4 GB of disk)
	$(BIN)/python benchmarks/scale.py --json benchmarks/results/scale.json

bench-training: install ## caches, the input pipeline and memory beside their plain counterparts (about an hour)
	$(BIN)/python benchmarks/training.py --json benchmarks/results/training.json

bench-pretrained: install ## what pretrained student weights gain: two data sets of images, three seeds (an hour or two; resumable)
	$(BIN)/python benchmarks/pretrained.py --json benchmarks/results/pretrained.json

bench-distillation: install ## distillation beside labels alone and other ways to teach: five folds, two data sets (hours; resumable)
	$(BIN)/python benchmarks/distillation.py --json benchmarks/results/distillation.json
	$(BIN)/python benchmarks/distillation.py --data fashion --json benchmarks/results/distillation-fashion.json

bench-compression: install ## what int8 and pruning cost and save, five folds, beside other tools (hours; resumable)
	$(BIN)/python benchmarks/compression.py --json benchmarks/results/compression.json

docs: install ## the documentation as a site: docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html

report-images: install ## the images of a report in docs/images, from a run on drawn shapes (minutes)
	$(BIN)/python benchmarks/report_images.py

figures: install ## docs/figures.md from benchmarks/results/*.json
	$(BIN)/python benchmarks/figures.py

flash: install ## bring BUNDLE to a camera: make flash DEVICE="user@host ..." [NAME=cam-7 KIT=fleet] [BUNDLE=DIR] [CONFIG=FILE]
	$(BIN)/eyas flash $(DEVICE) --bundle $(BUNDLE) $(if $(NAME),--name $(NAME)) $(if $(KIT),--kit $(KIT)) \
		$(if $(CONFIG),--config $(CONFIG)) $(FLASH_FLAGS)

board-bundle: install ## a small bundle of drawn shapes for a first try of the fleet: runs/shapes/bundle (about two minutes)
	$(BIN)/python -m tests.support.shapes runs/drawn-shapes
	$(BIN)/eyas distill tests/board/shapes.toml

bench: install ## measure on a camera: make bench DEVICE=user@host [BUNDLE=DIR]
	$(BIN)/eyas bench $(DEVICE) $(if $(filter-out default undefined,$(origin BUNDLE)),--bundle $(BUNDLE))

test-arm: install ## the device's programs on emulated aarch64, compared with this machine
	tests/arm/userland.sh
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(PYTEST_FLAGS) tests/arm

board: install ## a whole emulated board with a camera, to try Eyas on without hardware (BOARD_FLAGS=--fresh starts anew)
	@$(BIN)/python -m tests.board $(BOARD_FLAGS)

test-board: install ## tests on an emulated board and under this machine's systemd (minutes; the first time builds the board)
	@tests/board/image.sh >/dev/null
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -k "not emulated" $(PYTEST_FLAGS) tests/board

test-board-long: install ## the same flashes, set-up by hand and signed updates on the emulated board, too; power cuts in these (an hour)
	@tests/board/image.sh >/dev/null
	$(BIN)/python -m pytest -k emulated $(PYTEST_FLAGS) tests/board

test-tutorial: install ## every command of docs/tutorial.md, on drawn images (minutes)
	$(BIN)/python -m pytest $(PYTEST_FLAGS) tests/tutorial

test-readers: install $(READERS:%=.readers/%/.installed) ## .tflite files in other readers, compared with LiteRT
	$(BIN)/python -m pytest $(PYTEST_FLAGS) tests/readers

.readers/tflite/.installed: PINS := constraints/device-numpy1.txt
.readers/tensorflow/.installed: PINS := constraints/tensorflow.txt

# tflite-runtime has no wheels for a newer Python. Tests skip a reader that is not installed, and fail with CI=true.
.readers/%/.installed: device/pyproject.toml constraints/device-numpy1.txt constraints/tensorflow.txt | install
	@$(BIN)/uv venv --quiet --clear --no-python-downloads --python 3.11 .readers/$* && \
		$(BIN)/uv pip install --quiet --python .readers/$* --constraint $(PINS) --editable './device[$*]' && touch $@ || \
		echo "test-readers: $* is not installed; its tests are left out" >&2

fleet-demo: install ## simulated cameras through a change of season: drift, labels, retraining, proof, rollout (a quarter of an hour)
	$(BIN)/python benchmarks/fleet_demo.py --json benchmarks/results/fleet-demo.json

broker: install ## an MQTT broker with certificates (BIND=0.0.0.0 lets devices reach it; KIT=fleet)
	$(BIN)/eyas broker $(if $(BIND),--bind $(BIND)) $(if $(KIT),--kit $(KIT)) $(BROKER_FLAGS)

collect: install ## store what devices send, and acknowledge what is stored (KIT=fleet BROKER=host)
	$(BIN)/eyas collect $(if $(KIT),--kit $(KIT)) $(if $(BROKER),--broker $(BROKER))

watch: install ## all devices, live (KIT=fleet BROKER=host)
	$(BIN)/eyas watch $(if $(KIT),--kit $(KIT)) $(if $(BROKER),--broker $(BROKER))

bench-updates: install ## updates: faults at every change of the disk, power cuts, sizes, a fleet with a bad version (an hour; as root)
	$(BIN)/python benchmarks/updates.py --json benchmarks/results/updates.json

bench-loop: install ## drift beside other detectors, accuracy without labels, hard samples, one retraining, promotions, scale (half an hour)
	$(BIN)/python benchmarks/loop.py --json benchmarks/results/loop.json

bench-telemetry: install ## rates, costs and the kill matrix of telemetry (long)
	$(BIN)/python benchmarks/telemetry.py --json benchmarks/results/telemetry.json

bench-here: install ## what a bundle costs on this machine
	$(BIN)/python benchmarks/on_device.py --json benchmarks/results/on-device.json

soak: install ## half an hour with a camera that dies every twenty seconds
	$(BIN)/python benchmarks/soak.py --json benchmarks/results/soak.json

soak-board: install ## power cuts of the emulated board, 100 while it reports and 100 in a flash (hours; resumable; SOAK_FLAGS)
	$(BIN)/python benchmarks/board.py $(SOAK_FLAGS) --json benchmarks/results/board.json --record benchmarks/records/power-cuts.json

bench-camera-faults: install ## how soon a camera's faults are noticed, and how soon it is back (minutes)
	$(BIN)/python benchmarks/camera_faults.py --json benchmarks/results/camera-faults.json

bench-frame-loop: install ## the frame loop beside a plain script and MediaPipe (minutes)
	$(BIN)/python benchmarks/frame_loop.py --json benchmarks/results/frame-loop.json

SYSTEM_DEPS := chromium-headless-shell mosquitto nginx-light openssl openssh-client openssh-server \
	postgresql-15 rsync softhsm2 strace systemd \
	gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good python3-gi mmdebstrap proot \
	cpio e2fsprogs fakeroot gcc kmod libc6-dev qemu-system-arm qemu-utils sudo

system-deps: ## what tests need from the system (apt): MQTT broker, browser, PostgreSQL, ssh and RTSP servers, aarch64 tools and boards
	@if dpkg-query --show --showformat='$${db:Status-Status}\n' $(SYSTEM_DEPS) 2>&1 | grep -qvx installed; then \
		$(SUDO) apt-get update -qq && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM_DEPS); \
	fi

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .arm .readers dist docs/_build docs/reference .mypy_cache .pytest_cache .ruff_cache .hypothesis

clean-runs: ## remove runs/ with its models and test-set access logs, after a typed yes (YES=1 does not ask)
	@if [ -d runs ] && [ "$(YES)" != 1 ]; then \
		[ -t 0 ] || { echo "clean-runs: no terminal to ask on; YES=1 removes runs/ without asking" >&2; exit 1; }; \
		du -sh runs; printf 'Remove runs/, its models and the test-set access logs? Type yes: '; read -r answer; \
		[ "$$answer" = yes ] || { echo "clean-runs: runs/ is kept" >&2; exit 1; }; \
	fi
	rm -rf runs

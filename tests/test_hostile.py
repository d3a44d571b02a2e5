"""Files, folders and requests from people who mean harm: each is one line of refusal, in bounded time and memory.

Every hostile act runs in a process of its own with a limit on address space and processor time."""
import os, resource, subprocess, sys, textwrap

import pytest

GB = 2**30

def bounded(code, cwd, memory=4*GB, cpu=60, wall=300):
    "Run Python `code` in a process that may use `memory` bytes of address space and `cpu` seconds; its exit code, stdout, stderr"
    def limits():
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory)); resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    r = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=cwd, preexec_fn=limits, capture_output=True, text=True,
                       timeout=wall, env=os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1'))
    return r.returncode, r.stdout, r.stderr

# ---- runs and checkpoints

# ---- models and tokenizers

# ---- data

# ---- requests

# ---- indexes

"""Python code, and commands of `slm`, in processes of their own that need not import everything anew.

A server imports PyTorch and fastai once, and each process is a fork of it: a command costs tenths of a second instead of six.
A process has its own folder, environment, standard streams, arguments and limits, and dies as any other. What a library reads from the
environment while it is imported (`OMP_NUM_THREADS`, `HF_HUB_OFFLINE`) is that of the first process: who changes it starts
an interpreter."""
import multiprocessing, os, resource, subprocess, sys, tempfile
from pathlib import Path

_server = multiprocessing.get_context('forkserver')
_server.set_forkserver_preload(['slm.cli', 'slm.eval.lm', 'slm.model.pretrained', 'slm.train.sft', 'slm.exp.sweep'])

COMMAND = 'from slm.cli import main; main()'

def _work(code, args, cwd, env, files, memory, cpu):
    "What the new process does first"
    for fd,(path,how) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))): os.dup2(os.open(path, how), fd)
    utf8 = dict(encoding='utf-8')                                                # as strict as an interpreter's own
    sys.stdin,sys.stdout = open(0, **utf8),open(1, 'w', **utf8); sys.stderr = open(2, 'w', buffering=1, errors='backslashreplace', **utf8)
    os.chdir(cwd); os.environ.clear(); os.environ.update(env)
    sys.argv,sys.path[:0] = ['slm', *args],['']                                  # as `python -c` has it
    if memory: sys.modules['torch'].set_num_threads(1); resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if cpu: resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    exec(compile(code, '<string>', 'exec'), dict(__name__='__main__'))

def run(*args, code=COMMAND, cwd=None, stdin='', timeout=1200, memory=None, cpu=None):
    """Run `code` with `args`, by default a command of `slm`; returns what `subprocess.run` does, with text.

    `memory` bounds its address space in bytes, `cpu` its processor time in seconds."""
    with tempfile.TemporaryDirectory() as d:
        files = [Path(d)/n for n in ('in', 'out', 'err')]
        for f in files: f.write_text(stdin if f.name == 'in' else '', encoding='utf-8')
        work = code,[str(a) for a in args],str(cwd or os.getcwd()),dict(os.environ),files,memory,cpu
        p = _server.Process(target=_work, args=work)
        p.start(); p.join(timeout)
        if p.exitcode is None: p.kill(); p.join(); raise subprocess.TimeoutExpired(['slm', *map(str, args)], timeout)
        out,err = (f.read_text(encoding='utf-8', errors='replace') for f in files[1:])
        return subprocess.CompletedProcess(['slm', *map(str, args)], p.exitcode, out, err)

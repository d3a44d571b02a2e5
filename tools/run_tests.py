"Run every chapter (nbdev_test), then the tests of tests/ (pytest); pytest's closing line is the last one."
import argparse, compileall, os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def notebooks(workers, slow):
    "Run the chapters in `workers` processes of one thread each; True when all passed"
    nbs = sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if p.name[0] not in '._')
    cmd = [str(Path(sys.executable).with_name('nbdev_test')), '--n_workers', str(min(workers, len(nbs))), '--timing']
    if slow: cmd += ['--flags', 'slow']
    t0, env = time.time(), os.environ | ({'OMP_NUM_THREADS': '1'} if workers > 1 else {})
    ok = subprocess.run(cmd, cwd=ROOT, env=env).returncode == 0
    print(f"chapters: {len(nbs)} run in {time.time()-t0:.0f} s, {'all passed' if ok else 'SOME FAILED (named above)'}", flush=True)
    return ok

def pytest(workers, slow):
    "Run tests/ in `workers` processes of one thread each, a file in one of them; True when all passed"
    cmd = [sys.executable, '-m', 'pytest', *(['--slow'] if slow else []), '--durations=5', '--durations-min=5']
    if workers > 1: cmd += ['-n', str(workers), '--dist', 'loadfile', '--no-loadscope-reorder'] # in order of the alphabet: long ones first
    env = os.environ | ({'OMP_NUM_THREADS': '1'} if workers > 1 else {})
    return subprocess.run(cmd, cwd=ROOT, env=env).returncode == 0

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--workers', type=int, default=2, help='notebooks, or files of tests, at once')
    p.add_argument('--slow', action='store_true', help='slow cells and slow tests too')
    p.add_argument('--only', choices=['notebooks', 'pytest'])
    args = p.parse_args()
    # Commands that tests start would compile the package each time where Python is told to write no bytecode: 2 of 7 seconds
    compileall.compile_dir(ROOT/'slm', quiet=1)
    ok = True
    if args.only != 'pytest': ok = notebooks(args.workers, args.slow)
    if args.only != 'notebooks': ok = pytest(args.workers, args.slow) and ok
    sys.exit(not ok)

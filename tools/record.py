"""Record what the README's commands print: record.py demo test; record.py age tells which records are older than the code

Each is run by make in a fresh clone of HEAD; its output goes to results/index/NAME/output.txt, with hardware and time in run.json.
"""
import json, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from slm.core import atomic_file, git_commit, hardware, versions, write_json

ROOT = Path(__file__).resolve().parent.parent

KEEP = dict(demo={'runs/demo': '31_eval.life/demo', 'runs/demo/sft': '23_train.sft/world'}) # records of its runs
FILES = ('run.json', 'log.csv', 'samples.md')

def shorten(lines, first=24, last=12):
    "The beginning and the end of a long output"
    return lines if len(lines) <= first+last else lines[:first]+['…']+lines[-last:]

def record(name):
    "Run `make NAME` in a fresh clone and keep what it printed; exits when it failed"
    with tempfile.TemporaryDirectory(prefix='slm-record-') as tmp:
        subprocess.run(['git', 'clone', '-q', str(ROOT), f'{tmp}/slm'], check=True)
        t0, lines = time.time(), []
        p = subprocess.Popen(['make', name], cwd=f'{tmp}/slm', stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True)
        for l in p.stdout:
            print(l, end='', flush=True)
            if not l.startswith(('WARNING: ', '[notice]')):
                l = re.sub(r'\x1b\[[0-9;]*m', '', l).rstrip().replace(f'{tmp}/slm/', '').replace(f'{tmp}/slm', 'slm')
                lines.append(re.sub(r'/tmp/[\w.-]+/', '', l)) # folders of the chapters
        if p.wait(): sys.exit(f'make {name} failed: nothing recorded')
        installed = (Path(tmp)/'slm'/'.venv'/dict(test='.dev', demo='.core')[name]).stat().st_mtime-t0 # make touches it then
        for run,kept in KEEP.get(name, {}).items():
            folder = ROOT/'results'/kept; folder.mkdir(parents=True, exist_ok=True)
            for f in FILES:
                if (src := Path(tmp)/'slm'/run/f).exists(): shutil.copy(src, folder/f)
    out = ROOT/'results'/'index'/name
    with atomic_file(out/'output.txt') as f: f.write('\n'.join(shorten(lines))+'\n')
    write_json(out/'run.json',
               dict(schema=1, stage='record', command=f'make {name}', commit=git_commit(), hardware=hardware(), versions=versions(),
                                    seconds=round(time.time()-t0, 1), install_seconds=round(installed, 1), status='done'))

def age(name):
    "A line when the package has changed since `make NAME` was recorded; '' when it has not"
    was = json.loads((ROOT/'results'/'index'/name/'run.json').read_text())['commit']
    r = subprocess.run(['git', 'rev-list', '--count', f'{was}..HEAD', '--', 'slm'], cwd=ROOT, capture_output=True, text=True)
    if r.returncode: return f'make {name} was recorded at {was}, which this clone does not know: make record renews it'
    return f'make {name} was recorded {n} commits of slm/ ago: make record renews it' if (n := int(r.stdout)) else ''

if __name__ == '__main__':
    if sys.argv[1:] == ['age']: print(*filter(None, map(age, ('demo', 'test'))), sep='\n'); sys.exit()
    import torch # so that `hardware` knows of an accelerator
    names = sys.argv[1:]
    if not names or set(names) - {'demo', 'test'}: sys.exit(__doc__.strip())
    for n in names: record(n)

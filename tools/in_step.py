"""Are the notebooks clean, the package what they export, and the README what index.ipynb says? Works on a copy and changes nothing.

Exit code 1 and one line for every file that is out of step; `make prepare` mends them.
"""
import difflib, os, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

def files(root):
    "Everything that is compared: notebooks, package, README"
    return {str(p.relative_to(root)): p.read_bytes() for pat in ('nbs/**/*.ipynb', 'slm/**/*.py', 'README.md') for p in root.glob(pat)
            if '.ipynb_checkpoints' not in p.parts}

def run(name, cwd, *args):
    "Run one of the environment's commands in `cwd`; its output is shown only when it fails"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    r = subprocess.run([str(BIN/name), *map(str, args)], cwd=cwd, env={**env, 'PATH': f"{BIN}{os.pathsep}{env.get('PATH', '')}"},
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if r.returncode: sys.exit(f'{name} failed:\n{r.stdout}')

def diff(name, old, new, n=6):
    "The first `n` changed lines between two versions of a file"
    ls = difflib.unified_diff(old.decode().splitlines(), new.decode().splitlines(), 'committed', 'made now', lineterm='', n=0)
    return [l[:160] for l in ls if not l.startswith(('---', '+++', '@@'))][:n]

def out_of_step(root=ROOT):
    "File name -> what is wrong with it"
    with tempfile.TemporaryDirectory(prefix='slm-in-step-') as tmp:
        tmp = Path(tmp)/'slm'; tmp.mkdir()
        for f in ('settings.ini', 'README.md'):
            if (root/f).exists(): shutil.copy2(root/f, tmp/f)
        for d in ('nbs', 'slm', 'tools'): shutil.copytree(root/d, tmp/d, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.*'))
        before, bad = files(tmp), {}
        run('nbdev_clean', tmp); clean = files(tmp)
        for k in before:
            if clean[k] != before[k]: bad[k] = ('is not clean', diff(k, before[k], clean[k]))
        for p in (tmp/'slm').rglob('*.py'):
            if p.name != '__init__.py': p.unlink()
        run('nbdev_export', tmp); run('python', tmp, tmp/'tools'/'docs.py', 'readme'); after = files(tmp)
    for k in sorted(before | after):
        if k.endswith('.ipynb'): continue
        if k not in before: bad[k] = ('is missing: a notebook makes it', [])
        elif k not in after: bad[k] = ('is made by no notebook', [])
        elif before[k] != after[k]: bad[k] = ('differs from what its notebook makes', diff(k, before[k], after[k]))
    return bad

if __name__ == '__main__':
    bad = out_of_step()
    for k, (why, lines) in bad.items(): print(f'{k} {why}', *lines, sep='\n    ')
    if bad: sys.exit(f'{len(bad)} file(s) out of step: run `make prepare` and commit what it changes')
    print('notebooks clean, package and README in step with them')

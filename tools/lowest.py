"""Do the oldest versions that settings.ini allows work? A short life with them, in an environment of their own.

    python tools/lowest.py [--keep FOLDER]     needs uv (https://docs.astral.sh/uv/); downloads some gigabytes, PyTorch among them

uv resolves the package's own requirements to their lowest versions, then every module that needs no extra is imported, and a model of
some seconds is trained, taught, aligned, trained by two processes, asked and exported by the command. Exit code 1 when something fails.
"""
import argparse, os, shutil, subprocess, sys, tempfile, time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEW = 'pretrain --corpus world:0.1 --max-bytes 400000 --preset 1m --batch-tokens 2048 --device cpu'
LIFE = [c.split() for c in (f'{NEW} --steps 12 --seq-len 512 --out p', f'{NEW} --steps 4 --seq-len 64 --out two --nproc 2',
    'sft p --max-rows 100 --steps 4 --device cpu --out s', 'dpo s --max-rows 60 --steps 3 --device cpu --out d',
    'generate d --prompt Ann --max-new-tokens 5', 'eval p --docs 5 --probes 20', 'export p --out e.gguf', 'runs .')]
IMPORT = '''
import importlib, pkgutil, slm
for m in pkgutil.walk_packages(slm.__path__, 'slm.'):
    try: importlib.import_module(m.name)
    except ModuleNotFoundError as e:
        if not m.name.startswith('slm.serve'): raise                             # the server's packages are an extra
'''

def environment(folder):
    "A virtual environment with the lowest versions; its Python"
    uv = shutil.which('uv') or sys.exit('lowest: needs uv: pip install uv')
    def do(*args, **env): subprocess.run([uv, *args], check=True, cwd=ROOT, env=os.environ | env)
    v = f'{sys.version_info[0]}.{sys.version_info[1]}'; cp = ConfigParser(delimiters=['=']); cp.read(ROOT/'settings.ini', encoding='utf-8')
    (folder/'low.in').write_text('\n'.join(cp['DEFAULT']['requirements'].split()))
    do('pip', 'compile', '-q', '--resolution', 'lowest-direct', '--python-version', v, '--no-annotate', '--no-header',
       str(folder/'low.in'), '-o', str(folder/'low.txt'))
    do('venv', '-q', '--python', sys.executable, str(folder/'venv'))
    do('pip', 'install', '-q', '-r', str(folder/'low.txt'), VIRTUAL_ENV=str(folder/'venv'))
    some = 'torch', 'fastai', 'fastcore', 'datasets', 'typer', 'numpy'
    own = [l for l in (folder/'low.txt').read_text().splitlines() if l.split('=')[0] in some]
    print('oldest versions:', ', '.join(own), flush=True); return folder/'venv'/'bin'/'python'

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--keep', type=Path, help='where the environment is made, to be used again'); a = ap.parse_args()
    with tempfile.TemporaryDirectory(prefix='slm-lowest-') as d:
        folder = a.keep or Path(d); folder.mkdir(exist_ok=True); at = folder/'venv'/'bin'/'python'
        python = at if at.exists() else environment(folder); work = Path(d)/'work'; work.mkdir()
        env = os.environ | dict(PYTHONPATH=str(ROOT), SLM_HOME=str(work/'home'), TQDM_DISABLE='1',
                                PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}")
        for name,args in [('imports', ['-c', IMPORT]), *((c[0]+' --nproc 2'*('--nproc' in c), ['-m', 'slm.cli', *c]) for c in LIFE)]:
            t0 = time.monotonic(); r = subprocess.run([python, *args], cwd=work, env=env, capture_output=True, text=True)
            print(f'{name:22} {time.monotonic()-t0:5.1f} s  {"ok" if not r.returncode else "FAILED"}', flush=True)
            if r.returncode: sys.exit(f'lowest: {name}: {r.stderr.strip()[-1500:]}')

if __name__ == '__main__': main()

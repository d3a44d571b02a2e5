"""Execute notebooks in place and store their outputs: run_notebooks.py [--slow] nbs/NAME.ipynb ...

Cells flagged `#| slow` or `#| cuda` (settings.ini, tst_flags), and cells with `#| eval: false`, are not run and keep the outputs they
have; --slow runs the slow ones too. A notebook whose cell fails is left as it was.
"""
import argparse, os, sys, time
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives

def keeps_outputs(cell, skip):
    "Whether `cell` is not to be run"
    if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
    d = extract_directives(cell, remove=False)
    return d.get('eval:', [''])[0].lower() == 'false' or bool(skip & d.keys())

def run_nb(fn, flags=()):
    "Execute the notebook `fn` in place; returns the seconds it took"
    fn, skip, t0 = Path(fn).absolute(), set(get_config().tst_flags.split()) - set(flags), time.time()
    nb, shell = read_nb(fn), CaptureShell(fn)
    def skipped(cell):
        if keeps_outputs(cell, skip): return True
        cell.outputs = []
    try:
        with working_directory(fn.parent): shell.run_all(nb, exc_stop=True, preproc=skipped)
    except Exception: sys.exit(f'{shell.prettytb(fname=fn)}\n{fn.name}: a cell failed, the file is unchanged')
    clean_nb(nb); write_nb(nb, fn)
    return time.time() - t0

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='+', help='notebooks to run')
    p.add_argument('--slow', action='store_true', help='run slow cells too')
    args = p.parse_args()
    os.environ['IN_TEST'] = '1'; os.environ.setdefault('TQDM_DISABLE', '1')
    sys.path.insert(0, str(get_config().config_path))
    for f in args.notebooks: print(f'{Path(f).name}: ok in {run_nb(f, ("slow",) if args.slow else ()):.1f} s')

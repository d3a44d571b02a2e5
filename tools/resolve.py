"""Can each extra of settings.ini be installed? Each is resolved by pip in an empty environment, within a bound of time.

    python tools/resolve.py [--seconds 300] [EXTRA ...]     without a name: no extra, each extra, and dev,all together

Nothing is installed. Exit code 1 when one cannot be resolved, or takes longer:
extras that cannot live together do not belong into `all` (setup.py).
"""
import argparse, json, subprocess, sys, tempfile, time, venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]

def extras():
    "Names of what may be asked for"
    cp = ConfigParser(delimiters=['=']); cp.read(ROOT/'settings.ini', encoding='utf-8')
    return ['', *(k.removesuffix('_requirements') for k in cp['DEFAULT'] if k.endswith('_requirements')), 'all', 'dev,all']

def resolve(python, extra, seconds):
    "Packages that an extra brings; raises `RuntimeError` with what pip says when there is no answer, or none in time"
    want = f'{ROOT}[{extra}]' if extra else str(ROOT)
    cmd = [python, '-m', 'pip', '--disable-pip-version-check', '--quiet', 'install', '--dry-run', '--ignore-installed', '--report', '-',
           want]
    try: r = subprocess.run(cmd, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired: raise RuntimeError(f'not resolved in {seconds:g} s') from None
    if r.returncode: raise RuntimeError(r.stderr.strip()[-2000:])
    return json.loads(r.stdout)['install']

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('extras', nargs='*'); ap.add_argument('--seconds', type=float, default=300); a = ap.parse_args()
    failed = []
    with tempfile.TemporaryDirectory(prefix='slm-resolve-') as d:
        python = Path(d)/'bin'/'python'; venv.create(d, symlinks=True, with_pip=True)
        # older ones download each wheel
        subprocess.run([python, '-m', 'pip', '--disable-pip-version-check', '--quiet', 'install', '--upgrade', 'pip'], check=True)
        for extra in a.extras or extras():
            t0 = time.monotonic()
            try: said = f'{len(resolve(python, extra, a.seconds))} packages'
            except RuntimeError as e: said = f'FAILED: {e}'; failed.append(extra)
            print(f'{extra or "(none)":12} {time.monotonic()-t0:6.1f} s  {said}', flush=True)
    if failed: sys.exit(f'resolve: {len(failed)} failed: '+' '.join(failed))

if __name__ == '__main__': main()

"""How large the images are: the lists of deploy/requirements in fresh virtual environments, their files summed.

    python bench/image.py [gguf torch rag]

There is no image without a Docker daemon, but what an image adds to its base is an environment, and that can be made anywhere. Where pip's index has only the CUDA build of PyTorch,
the CUDA packages are not installed and its CUDA libraries are not counted: an estimate of the CPU build, which has about the same remaining files. Writes results/49_serve.cluster/image/run.json.
"""
import argparse, json, re, subprocess, sys, tempfile, venv
from importlib.metadata import distributions
from pathlib import Path
from slm.core import Metric, RunDir

ROOT = Path(__file__).parents[1]
CUDA = re.compile(r'(nvidia|cuda|triton)\b'), re.compile(r'torch/lib/lib(torch_cuda|c10_cuda|torch_nvshmem|caffe2_nvrtc|cudart|cupti)')

def pip(folder, *args):
    cmd = [sys.executable, '-m', 'pip', '--python', folder/'bin'/'python', '--disable-pip-version-check', '--quiet', *args]
    return subprocess.run(cmd, check=True, stdout=subprocess.PIPE, text=True).stdout

def environment(target, folder):
    "Install a target's list and slm; gives the folder of packages, and whether PyTorch's build is for CUDA"
    venv.create(folder, symlinks=True)
    plan = json.loads(pip(folder, 'install', '--dry-run', '--ignore-installed', '--report', '-', '-r', ROOT/f'deploy/requirements/{target}.in'))
    found = {p['metadata']['name'].lower(): p['metadata']['version'] for p in plan['install']}
    pip(folder, 'install', '--no-deps', *(f'{n}=={v}' for n,v in found.items() if not CUDA[0].match(n)))
    pip(folder, 'install', '--no-deps', ROOT, *(['-r', ROOT/'deploy/requirements/no-deps.in'] if target == 'rag' else []))
    return next((folder/'lib').glob('python*/site-packages')), any(map(CUDA[0].match, found))

def sizes(site):
    "Bytes of each distribution, without CUDA libraries"
    def size(d): return sum(p.stat().st_size for f in d.files or () if (p := Path(d.locate_file(f))).exists() and not CUDA[1].search(str(f)))
    return {d.name: size(d) for d in distributions(path=[str(site)])}

def compiler():
    "Bytes of Debian's g++ and of what it brings, without libraries that Python's base image has: for the image `torch`, by this machine's packages"
    skip = [f'--no-{k}' for k in ('recommends', 'suggests', 'conflicts', 'breaks', 'replaces', 'enhances')]
    brings = subprocess.run(['apt-cache', 'depends', '--recurse', *skip, 'g++'], check=True, capture_output=True, text=True).stdout
    names = set(re.findall(r'^[a-z][\w.+-]*$', brings, re.M)) - {'libc6', 'libgcc-s1', 'libgmp10', 'libgomp1', 'libssl3', 'libstdc++6', 'libzstd1', 'zlib1g'}
    sizes = subprocess.run(['dpkg-query', '-W', '-f', '${Installed-Size}\n', *names], capture_output=True, text=True).stdout
    return 1024*sum(map(int, sizes.split()))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('targets', nargs='*', default=['gguf', 'torch', 'rag']); a = ap.parse_args()
    run, largest = RunDir.create(ROOT/'results'/'49_serve.cluster'/'image', 'bench', dict(targets=a.targets), exist_ok=True), {}
    for t in a.targets:
        with tempfile.TemporaryDirectory(prefix='slm-image-') as d:
            site, cuda = environment(t, Path(d)); by = sizes(site)
            print(t, f'{sum(by.values())/1e6:.0f} MB', 'without CUDA libraries' if cuda else '', flush=True)
        run.add_metrics(**{t: Metric(sum(by.values())/1e6, n=len(by), unit='MB')}); largest[t] = dict(sorted(by.items(), key=lambda kv: -kv[1])[:6])
        run.info['cuda_build'] = run.info.get('cuda_build', False) or cuda
    run.add_metrics(compiler=Metric(compiler()/1e6, unit='MB')); run.info['largest'] = largest; run.finish()

if __name__ == '__main__': main()

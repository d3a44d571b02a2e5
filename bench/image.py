"""How large the images are, and do they answer? Builds each with buildah, sums
its layers, starts its server as nobody and asks it over HTTP.

    python bench/image.py [gguf torch rag] [--base IMAGE] [--torch WHEEL] [--mount FILE:/IN/THE/BUILD ...] [--keep]

buildah needs neither a daemon nor a container engine (Debian: apt-get install buildah; run as root). --base takes
another image than the pinned one, --torch a wheel of PyTorch for its Python in place of the pinned one, --mount what
a build needs to reach its package index (a pip.conf, certificates). Writes results/49_serve.cluster/image/run.json.
"""
import argparse, gzip, hashlib, json, re, shutil, signal, socket, subprocess, tempfile, time, urllib.error, urllib.request
from pathlib import Path
from slm.core import Metric, RunDir

ROOT, TOKEN = Path(__file__).parents[1], 'only-for-this-run'

def buildah(*args, **kw):
    return subprocess.run(['buildah', *map(str, args)], check=True, stdout=subprocess.PIPE, text=True, **kw).stdout.strip()

def context(to, wheel):
    "What the Dockerfile copies; with a wheel, it is PyTorch in place of the pinned one"
    for f in ('setup.py', 'settings.ini', 'README.md', 'MANIFEST.in', 'slm', 'deploy'):
        (shutil.copytree if (ROOT/f).is_dir() else shutil.copy)(ROOT/f, to/f)
    if wheel:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (to/'deploy/requirements/torch-cpu.txt').write_text(f'torch @ file://{wheel} --hash=sha256:{digest}\n')

def build(target, folder, a):
    "Build one image; gives its name"
    mounts = [f'--volume={m}:ro' for m in [*a.mount, *([f'{a.torch.parent}:{a.torch.parent}'] if a.torch else [])]]
    base = [f'--build-arg=BASE={a.base}', '--pull-never'] if a.base else []
    name = f'localhost/slm-{target}'
    buildah('bud', '--isolation=chroot', '--net=host', '--format=docker', '--layers', *base, *mounts, f'--target={target}', f'--tag={name}',
            '--file=deploy/Dockerfile', '--ignorefile=deploy/Dockerfile.dockerignore', '.', cwd=folder)
    return name

def layers(image):
    "Of each layer: its digest, its bytes, and its bytes compressed by gzip, as a registry keeps it"
    with tempfile.TemporaryDirectory(prefix='slm-layers-') as d:
        buildah('push', '--quiet', '--format=oci', image, f'oci:{d}:x'); blob = lambda digest: Path(d)/'blobs'/digest.replace(':', '/')
        index = json.loads((Path(d)/'index.json').read_text()); manifest = json.loads(blob(index['manifests'][0]['digest']).read_text())
        ids = json.loads(blob(manifest['config']['digest']).read_text())['rootfs']['diff_ids']
        def size(digest):
            with gzip.open(blob(digest)) as f: return sum(map(len, iter(lambda: f.read(2**24), b'')))
        return [(i, size(l['digest']), l['size']) for i,l in zip(ids, manifest['layers'])]

# run inside of an image: bytes of each distribution
SIZES = """import json, pathlib as p, importlib.metadata as m
size = lambda d: sum(q.stat().st_size for f in d.files or () if (q := p.Path(d.locate_file(f))).exists())
torch = next((d.version for d in m.distributions() if d.name == 'torch'), None)
print(json.dumps(dict(python='.'.join(map(str, __import__('sys').version_info[:3])), torch=torch,
                      packages={d.name: size(d) for d in m.distributions()})))"""

def tiny(folder):
    "Models of random weights, for llama.cpp and our engine; tokens; a document"
    import torch
    import slm.model.pretrained                                       # gives GPT its save_pretrained
    from slm.data.tokenizer import train_bpe
    from slm.data.world import World
    from slm.model.gpt import GPT, GPTConfig
    from slm.serve.export import export_gguf
    torch.manual_seed(1); tok = train_bpe([s.text for s in World().stories(0, 200)], 512)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=2, d_model=64, max_seq_len=512)).eval()
    export_gguf(model, tok, folder/'tiny.gguf', 'q8_0'); model.save_pretrained(folder/'tiny', tok)
    (folder/'tokens').write_text(f'{TOKEN}\n'); (folder/'kites.md').write_text('# Kites\n\nAnn keeps the kite in the red box.\n')
    (folder/'lamps.html').write_text('<h1>Lamps</h1><p>Ben keeps the lamp on the shelf.</p>')
    for p in [folder, *folder.rglob('*')]: p.chmod(0o755 if p.is_dir() else 0o644)

def ask(url, body=None):
    r = urllib.request.Request(url, body and json.dumps(body).encode(),
                               {'Content-Type': 'application/json', 'Authorization': f'Bearer {TOKEN}'})
    with urllib.request.urlopen(r, timeout=120) as got: return json.load(got)

SERVE = dict(gguf=['serve', '/models/tiny.gguf', '--engine=gguf'], torch=['serve', '/models/tiny', '--engine=torch'],
             rag=['rag', 'serve', '/models/tiny.gguf', '--index=/tmp/index'])

def served(target, box, models):
    "Start the image's entry point as nobody, ask it; gives the seconds until it was ready"
    run = ['buildah', 'run', '--isolation=chroot', '--net=host', '--user=65534:65534', f'--volume={models}:/models:ro', box, '--', 'slm']
    if target == 'rag':
        subprocess.run([*run, 'rag', 'index', '/models/kites.md', '/models/lamps.html', '--out=/tmp/index'], check=True,
                       stdout=subprocess.DEVNULL)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    url, t0 = f'http://127.0.0.1:{port}', time.monotonic()
    p = subprocess.Popen([*run, *SERVE[target], '--host=127.0.0.1', f'--port={port}', '--token-file=/models/tokens', '--threads=1',
                          '--slots=1', '--context=512'])
    try:
        while True:
            try: assert ask(f'{url}/readyz') == dict(status='ready'); break
            except (OSError, urllib.error.HTTPError): assert p.poll() is None, f'the server of {target} ended'; time.sleep(.1)
        ready = time.monotonic()-t0; model = ask(f'{url}/v1/models')['data'][0]['id']; assert ask(f'{url}/healthz') == dict(status='ok')
        r = ask(f'{url}/v1/chat/completions', dict(model=model, max_tokens=5, messages=[dict(role='user', content='Where is the kite?')]))
        assert r['usage']['completion_tokens'] > 0, r
        if target == 'rag':
            found = ask(f'{url}/txtai/search?query=Where+is+the+lamp&limit=1'); assert 'on the shelf' in found[0]['text'], found
            assert r['sources'], r
        return ready
    finally: p.send_signal(signal.SIGTERM); p.wait(60)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('targets', nargs='*', default=['gguf', 'torch', 'rag'])
    ap.add_argument('--base'); ap.add_argument('--torch', type=Path)
    ap.add_argument('--mount', action='append', default=[])
    ap.add_argument('--keep', action='store_true', help='keep the images'); a = ap.parse_args()
    if not shutil.which('buildah'): return print('no images without buildah: nothing is recorded')
    # of images that are not asked for
    folder = ROOT/'results'/'49_serve.cluster'/'image'; old = (folder/'run.json').exists() and RunDir.open(folder).info
    run = RunDir.create(folder, 'bench', dict(targets=a.targets, base=a.base, torch=a.torch and a.torch.name), exist_ok=True)
    run.info |= dict(largest={}, inside={})
    if old and old['config'] | dict(targets=0) == run.info['config'] | dict(targets=0):
        run.info |= {k: old[k] for k in ('metrics', 'largest', 'inside')}
    base = a.base or re.search(r'^ARG BASE=(\S+)', (ROOT/'deploy/Dockerfile').read_text(), re.M)[1]
    with tempfile.TemporaryDirectory(prefix='slm-image-') as d, tempfile.TemporaryDirectory(prefix='slm-models-') as m:
        context(Path(d), a.torch); tiny(Path(m)); below = None            # the base is here when the first image is
        for t in a.targets:
            image = build(t, d, a); box = buildah('from', image); below = below or layers(base); ls = layers(image)
            inside = json.loads(buildah('run', '--isolation=chroot', '--user=65534:65534', box, '--', 'python', '-c', SIZES))
            by = inside.pop('packages')
            ready = served(t, box, m); buildah('rm', box); assert ls[:len(below)] == below
            run.add_metrics(**{t: Metric(sum(n for _,n,_ in ls)/1e6, n=len(by), unit='MB'),
                               f'{t}_gzip': Metric(sum(n for *_,n in ls)/1e6, unit='MB'),
                               f'{t}_ready': Metric(ready, unit='s'), 'base': Metric(sum(n for _,n,_ in below)/1e6, unit='MB'),
                               'base_gzip': Metric(sum(n for *_,n in below)/1e6, unit='MB')})
            run.info['largest'][t] = dict(sorted(by.items(), key=lambda kv: -kv[1])[:6]); run.info['inside'][t] = inside; run.save()
            print(f"{t}: {run.metric(t).value:.0f} MB, {run.metric(f'{t}_gzip').value:.0f} MB compressed; "
                  f"answered {ready:.1f} s after its start", flush=True)
            if not a.keep: buildah('rmi', image)
    run.finish()

if __name__ == '__main__': main()

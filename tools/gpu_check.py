"""What a card does here, made for eight minutes and without a network: python tools/gpu_check.py [--device cuda] [--out FILE]

Four parts, each of which goes on when another fails:
parity      tests/test_devices.py: the processor's numbers, and a whole life by the command line
cells       the chapters that have cells marked `#| cuda`, with these cells
training    25m and 125m pretrained on prose for a minute each: tokens/s, share of the peak, memory beside `memory_estimate`
generation  the second of them, for one and for eight conversations at once
Writes one JSON file. The exit code is 1 when a part failed.
"""
import argparse, os, re, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRESETS = {'25m': dict(vocab_size=8192), '125m': dict(vocab_size=16384)}
QUICK = {'1m': dict(corpus='world', vocab_size=512, batch_tokens=2048, steps=3, max_bytes=1_000_000)} # a version of seconds, for tests

def ran(*cmd, **env):
    "A command in the project's root, its output shown and kept: exit code, text"
    p = subprocess.Popen([str(c) for c in cmd], cwd=ROOT, env=os.environ | env, text=True, errors='replace',
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in p.stdout: lines.append(line); print(line, end='', flush=True)
    return p.wait(), ''.join(lines)

def parity(device):
    code,text = ran(sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/test_devices.py', '-k', device, SLM_LIFE='1')
    counts = {k: int(n) for n,k in re.findall(r'(\d+) (passed|failed|error|skipped)', text)}
    if code or not counts.get('passed'): raise RuntimeError(f'tests/test_devices.py: {counts}')
    return counts

def cells(device):
    nbs = [p for p in sorted((ROOT/'nbs').glob('*.ipynb')) if f'"#| {device}' in p.read_text(encoding='utf-8')]
    if not nbs: return {}
    res = {}
    for p in nbs:
        t0 = time.time(); code,_ = ran(Path(sys.executable).with_name('nbdev_test'), '--path', p, '--flags', device)
        if code: raise RuntimeError(f'{p.name} failed')
        res[p.name] = round(time.time()-t0, 1)
    return res

def training(device, quick, home):
    from slm.core import RunDir
    from slm.model.gpt import memory_estimate
    from slm.train.pretrain import PretrainConfig
    rows = {}
    for preset,options in (QUICK if quick else PRESETS).items():
        args = [a for k,v in options.items() for a in (f"--{k.replace('_', '-')}", v)] + ([] if quick else ['--minutes', 1])
        code,_ = ran(sys.executable, '-c', 'from slm.cli import main; main()', 'pretrain', '--preset', preset, '--device', device,
                     '--evals', 1, '--samples', 1, '--out', home/preset, *args)
        if code: raise RuntimeError(f'slm pretrain --preset {preset} ended with {code}')
        run = RunDir.open(home/preset); c = PretrainConfig.again(run.info['config']); at_once = c.micro_batch*c.seq_len
        cfg = c.sizes(options['vocab_size'], max_seq_len=c.seq_len)
        want = memory_estimate(cfg, c.micro_batch, c.seq_len, dtype=c.dtype, device=device.split(':')[0],
                               accumulated=at_once < c.batch_tokens)
        rows[preset] = dict(parameters=cfg.num_params(), rows=c.micro_batch, seq_len=c.seq_len, batch_tokens=c.batch_tokens, dtype=c.dtype,
            opt=c.opt, compiled=bool(c.compile), estimate_mb=want['total']/2**20,
            **{k: run.info['metrics'][k] for k in ('tokens_per_s', 'mfu', 'peak_memory', 'seconds', 'valid_bpb')})
    return rows

def generation(device, quick, home):
    import torch
    from slm.model.generate import SamplingParams, generate_ids
    from slm.model.pretrained import load_model_and_tokenizer
    model,tok = load_model_and_tokenizer(home/list(QUICK if quick else PRESETS)[-1], device=device, dtype=None if quick else 'bfloat16')
    ids,n,rows = tok.encode('There was a'),8 if quick else 128,{}
    for b in (1, 8):
        ask = lambda: generate_ids(model, [ids]*b, SamplingParams(temperature=.8, max_new_tokens=n, seed=1))
        ask(); t0 = time.perf_counter(); out = ask()
        if device.startswith('cuda'): torch.cuda.synchronize()
        rows[str(b)] = dict(tokens_per_s=sum(map(len, out))/(time.perf_counter()-t0))
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda', help='cuda, mps, or cpu')
    p.add_argument('--out', type=Path, default=ROOT/'results'/'52_exp.plan'/'card'/'card.json')
    p.add_argument('--quick', action='store_true', help='a version of seconds, to see that it runs')
    p.add_argument('--only', choices=['parity', 'cells', 'training', 'generation'], action='append', help='may be repeated')
    a = p.parse_args(); tmp = tempfile.TemporaryDirectory(); home = Path(tmp.name); os.environ.setdefault('SLM_HOME', str(home/'slm_home'))
    os.environ.update(TQDM_DISABLE='1', MPLBACKEND='agg'); sys.path.insert(0, str(ROOT))
    from slm.core import SLMError, get_device, hardware, versions, write_json
    try: device = str(get_device(a.device))
    except SLMError as e: p.error(str(e))
    parts = dict(parity=lambda: parity(device.split(':')[0]), cells=lambda: cells(device.split(':')[0]),
                 training=lambda: training(device, a.quick, home), generation=lambda: generation(device, a.quick, home))
    res = dict(schema=1, device=device, quick=a.quick, hardware=hardware(), versions=versions())
    if device.startswith('cuda'):
        import torch; card = torch.cuda.get_device_properties(device)
        res['card'] = dict(name=card.name, memory_gb=card.total_memory/2**30, capability=f'{card.major}.{card.minor}',
                           cuda=torch.version.cuda)
    t0 = time.time()
    for name,f in parts.items():
        if a.only and name not in a.only: continue
        print(f'== {name}', flush=True); t1 = time.time()
        try: res[name] = dict(rows=f(), ok=True)
        except Exception as e: res[name] = dict(ok=False, error=f'{type(e).__name__}: {e}'); print(res[name]['error'], flush=True)
        res[name]['seconds'] = round(time.time()-t1, 1)
    res['seconds'] = round(time.time()-t0, 1); write_json(a.out, res)
    failed = [n for n in parts if n in res and not res[n]['ok']]
    print(f"{a.out}: {res['seconds']:.0f} s"+(f", FAILED: {', '.join(failed)}" if failed else ''))
    sys.exit(bool(failed))

if __name__ == '__main__': main()

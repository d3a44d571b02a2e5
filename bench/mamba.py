"""A training step of our models with a state beside transformers', the same weights, everything on one batch of rows.

    python bench/mamba.py [--rows 4] [--tokens 256] [--repeats 5]

One thread, float32, AdamW; seconds are the processor's own. transformers' classes run as they do without CUDA kernels: token by token; with
mambapy's parallel scan where that is installed (pip install mambapy); and compiled, which is when they take PyTorch's associative scan
(--compile: minutes). Peers take turns, so that a busy machine hits all. Writes results/56_exp.mamba/speed/run.json.
"""
import argparse, tempfile, time
from importlib.util import find_spec
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from common import median
from transformers import AutoModelForCausalLM
from slm.core import Metric, RunDir, set_seed
from slm.model.gpt import GPT, GPTConfig, lm_loss
from slm.model.pretrained import *

ROOT = Path(__file__).parents[1]

def stepper(model, loss):
    "A training step on one batch"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    def step(x, y): opt.zero_grad(); loss(model, x, y).backward(); opt.step()
    return step

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('--rows', type=int, default=4); add('--tokens', type=int, default=256); add('--repeats', type=int, default=5)
    add('--compile', action='store_true')
    a = ap.parse_args(); torch.set_num_threads(1)
    config = dict(rows=a.rows, tokens=a.tokens, repeats=a.repeats, threads=1)
    run = RunDir.create(ROOT/'results'/'56_exp.mamba'/'speed', 'bench', config, exist_ok=True)
    set_seed(0); x,y = torch.randint(512, (2, a.rows, a.tokens)); jobs,close = {},{}
    ours = lambda m, x, y: lm_loss(m(x), y)
    theirs = lambda m, x, y: F.cross_entropy(m(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten())
    for mixer in ('mamba', 'mamba2'):
        set_seed(0); cfg = GPTConfig(vocab_size=512, n_layer=4, d_model=128, max_seq_len=a.tokens, mixer=mixer); m = GPT(cfg)
        run.add_metrics(**{f'{mixer}_params': cfg.num_params()})
        with tempfile.TemporaryDirectory() as tmp:
            m.save_pretrained(tmp); opened = lambda **kw: AutoModelForCausalLM.from_pretrained(tmp, **kw).train()
            hf = opened(); jobs[f'{mixer}_ours'],jobs[f'{mixer}_transformers'] = stepper(m, ours),stepper(hf, theirs)
            with torch.no_grad(): close[mixer] = abs(ours(m, x, y)-theirs(hf, x, y)).item()
            if mixer == 'mamba' and find_spec('mambapy'): jobs['mamba_transformers_mambapy'] = stepper(opened(use_mambapy=True), theirs)
            if a.compile: c = opened(); c.forward = torch.compile(c.forward); jobs[f'{mixer}_transformers_compiled'] = stepper(c, theirs)
    assert max(close.values()) < 1e-4, close
    secs = {k: [] for k in jobs}
    for step in jobs.values(): step(x, y)
    for _ in range(a.repeats):
        for k,step in jobs.items(): t0 = time.process_time(); step(x, y); secs[k].append(time.process_time()-t0)
    run.add_metrics(**{k: median(x.numel()/np.array(s), 'tokens/s') for k,s in secs.items()})
    for mixer in ('mamba', 'mamba2'):
        best = min((k for k in secs if k.startswith(f'{mixer}_t')), key=lambda k: np.median(secs[k]))
        run.add_metrics(**{f'{mixer}_ratio': median(np.array(secs[best])/secs[f'{mixer}_ours'], f'times {best}')})
    run.finish()
    for k,v in run.info['metrics'].items(): print(f'{k:28} {Metric(**v)}')

if __name__ == '__main__': main()

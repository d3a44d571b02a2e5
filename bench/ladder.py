"""What a training step of each rung of the ladder from GPT-2 to Transformer++ costs, all of them beside each other.

    python bench/ladder.py [--repeats 40]

One thread, bfloat16 as in the sweep, one batch of 8 rows of 128 tokens, forward, backward and the optimiser's step; seconds are the
processor's own. The rungs take turns, so that a busy machine hits all. Writes results/54_exp.modern/speed/run.json.
"""
import argparse, time
from pathlib import Path
from common import median
from slm.core import Metric, RunDir, set_seed
import numpy as np, torch
from slm.exp.modern import LADDER, MODERN_BATCH, MODERN_CONTEXT, MODERN_VOCAB, ladder_rung, modern_config
from slm.model.gpt import GPT, lm_loss
from slm.train.learner import autocast
from slm.train.optim import OPTIMS

ROOT = Path(__file__).parents[1]

def stepper(name):
    "A step of training on one batch"
    o = ladder_rung(name); set_seed(0); m = GPT(modern_config(o['model'])); opt,groups = OPTIMS[o['opt']]; opt = opt(groups(m), lr=1e-4)
    def step(x, y):
        with autocast('cpu', 'bfloat16')(): loss = lm_loss(m(x), y)
        loss.backward(); torch.nn.utils.clip_grad_norm_(m.parameters(), 1.); opt.step(); opt.zero_grad()
    return step

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--repeats', type=int, default=40); a = ap.parse_args(); torch.set_num_threads(1)
    config = dict(repeats=a.repeats, threads=1, dtype='bfloat16')
    run = RunDir.create(ROOT/'results'/'54_exp.modern'/'speed', 'bench', config, exist_ok=True)
    set_seed(0); x,y = torch.randint(MODERN_VOCAB, (2, MODERN_BATCH//MODERN_CONTEXT, MODERN_CONTEXT))
    jobs = {n: stepper(n) for n in LADDER}; secs = {n: [] for n in jobs}
    for step in jobs.values(): step(x, y)
    for _ in range(a.repeats):
        for n,step in jobs.items(): t0 = time.process_time(); step(x, y); secs[n].append(time.process_time()-t0)
    run.add_metrics(**{n: median(s, 's') for n,s in secs.items()})
    run.add_metrics(**{f'{n}_ratio': median(np.array(secs[n])/secs['gpt2'], 'times GPT-2') for n in list(secs)[1:]})
    run.add_metrics(muon_over_init=median(np.array(secs['muon'])/secs['init'], 'times AdamW'))
    run.finish()
    for k,v in run.info['metrics'].items(): print(f'{k:16} {Metric(**v)}')

if __name__ == '__main__': main()

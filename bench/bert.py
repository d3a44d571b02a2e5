"""A training step of a model that fills gaps beside transformers', the same weights, the same rows, the same gaps.

    python bench/bert.py [--rows 16] [--tokens 256] [--share .3] [--repeats 15] [--preset 3m] [--vocab 8192]

Both take AdamW's steps in bfloat16 where the machine multiplies in it, on all cores. transformers' loop is the plain one: labels of -100
where nothing is asked, so its head works at each place. transformers' ModernBERT can leave out those places, too, if it is told to
(`sparse_prediction`). Ours asks the head for the gaps alone. Peers take turns, so that a busy machine hits all. Writes
results/59_exp.bert/speed/run.json.
"""
import argparse, copy, os, tempfile, time
from pathlib import Path
import numpy as np, torch
from common import median
from transformers import AutoModelForMaskedLM
from slm.core import Metric, RunDir, best_dtype, set_seed
from slm.model.bert import BERT, STYLES, encoder_config
from slm.model.gpt import lm_loss
from slm.train.learner import autocast
from slm.train.sft import fill_up

ROOT = Path(__file__).parents[1]

def stepper(model, loss, amp):
    "A training step on one batch"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    def step(*batch):
        opt.zero_grad()
        with amp(): l = loss(model, *batch)
        l.backward(); opt.step(); return l.item()
    return step

def ours(m, x, y, asked): keep = fill_up(asked); return lm_loss(m(x, keep=keep), y[keep][None], asked[keep][None])
def theirs(m, x, y, asked): return m(input_ids=x, labels=torch.where(asked, y, -100)).loss

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    for k,d in dict(rows=16, tokens=256, repeats=15, vocab=8192).items(): add(f'--{k}', type=int, default=d)
    add('--share', type=float, default=.3); add('--preset', default='3m'); a = ap.parse_args()
    torch.set_num_threads(os.cpu_count()); amp = autocast('cpu', dtype := best_dtype('cpu'))
    run = RunDir.create(ROOT/'results'/'59_exp.bert'/'speed', 'bench', vars(a) | dict(dtype=dtype, threads=os.cpu_count()), exist_ok=True)
    set_seed(0); y = torch.randint(a.vocab, (a.rows, a.tokens)); asked = torch.rand(y.shape) < a.share; x = torch.where(asked, 7, y)
    jobs = {}
    for style in STYLES:
        set_seed(0); m = BERT(encoder_config(a.preset, a.vocab, a.tokens, style)); run.add_metrics(**{f'{style}_params': m.num_params()})
        with tempfile.TemporaryDirectory() as tmp: m.save_pretrained(tmp); hf = AutoModelForMaskedLM.from_pretrained(tmp).train()
        with torch.no_grad(): assert abs(ours(m, x, y, asked)-theirs(hf, x, y, asked)) < 1e-3
        jobs[f'{style}_ours'],jobs[f'{style}_transformers'] = stepper(m, ours, amp),stepper(hf, theirs, amp)
        if style == 'modern': # its class can leave the other places out, too, if it is told to
            sparse = copy.deepcopy(hf); sparse.sparse_prediction = sparse.config.sparse_prediction = True
            jobs['modern_transformers_sparse'] = stepper(sparse, theirs, amp)
    secs = {k: [] for k in jobs}
    for step in jobs.values(): step(x, y, asked)
    for _ in range(a.repeats):
        for k,step in jobs.items(): t0 = time.perf_counter(); step(x, y, asked); secs[k].append(time.perf_counter()-t0)
    run.add_metrics(**{k: median(x.numel()/np.array(s), 'tokens/s') for k,s in secs.items()})
    peers = {'modern': 'modern_transformers', 'classic': 'classic_transformers', 'modern_sparse': 'modern_transformers_sparse'}
    for style,peer in peers.items():
        ratio = np.array(secs[peer])/secs[f"{style.split('_')[0]}_ours"]
        run.add_metrics(**{f'{style}_ratio': median(ratio, f'times {peer}')})
    run.finish()
    for k,v in run.info['metrics'].items(): print(f'{k:24} {Metric(**v)}')

if __name__ == '__main__': main()

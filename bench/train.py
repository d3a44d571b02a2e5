"""Training speed and what it buys, against peers in the same run.

    python bench/train.py speed       # tokens/s of a step against transformers' LlamaForCausalLM, and against the matrix peak
    python bench/train.py overhead    # the fastai loop with its callbacks against a bare loop
    python bench/train.py shakespeare [--data tinyshakespeare.txt] [--seeds 3]   # validation loss for seconds, on nanoGPT's split

Everything runs on the processor, in the faster of float32 and bfloat16. Peers take turns, so that a busy machine
hits both; figures are medians with bootstrap intervals. Prints JSON and writes it to
results/19_train.learner/bench_NAME/run.json.
"""
import argparse, json, time
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from common import median
from slm.core import Metric, RunDir, best_dtype, matmul_flops, set_seed
from slm.model.gpt import GPT, GPTConfig, lm_loss
from slm.train.learner import adamw, decay_groups

ROOT = Path(__file__).parents[1]

def stepper(model, logits, params, dtype):
    "A training step on one batch, in a plain loop with fused AdamW"
    opt = torch.optim.AdamW(params, lr=1e-4, fused=True)
    def step(x, y):
        with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'): loss = logits(model, x, y)
        loss.backward(); torch.nn.utils.clip_grad_norm_(params, 1.); opt.step(); opt.zero_grad()
    return step

def speed(a, run):
    "Eight layers of width 320, 4,096 tokens of vocabulary, 16 rows of 256: 11.2 million parameters"
    from transformers import LlamaConfig, LlamaForCausalLM
    cfg = GPTConfig(vocab_size=4096, n_layer=8, d_model=320, n_head=5, n_kv_head=5, d_ff=896, max_seq_len=256)
    hf_cfg = LlamaConfig(vocab_size=4096, hidden_size=320, intermediate_size=896, num_hidden_layers=8, num_attention_heads=5,
                         max_position_embeddings=256, tie_word_embeddings=True)
    x,y = torch.randint(4096, (2, 16, 256)); peak = {d: matmul_flops('cpu', d) for d in ('float32', 'bfloat16')}
    def ours(dtype, compiled):
        set_seed(0); m = GPT(cfg)
        if compiled: m.compile()
        return stepper(m, lambda m,x,y: lm_loss(m(x), y), list(m.parameters()), dtype), m.num_params()
    def theirs(dtype):
        set_seed(0); m = LlamaForCausalLM(hf_cfg)
        return stepper(m, lambda m,x,y: F.cross_entropy(m(input_ids=x, use_cache=False).logits.float().flatten(0, 1), y.flatten()),
                       list(m.parameters()), dtype), sum(p.numel() for p in m.parameters())
    jobs = {f'transformers_{d}': theirs(d) for d in peak} | {f'ours_{d}': ours(d, False) for d in peak}
    if run.info['hardware']['compiler']: jobs['ours_compiled'] = ours(best_dtype('cpu'), True)
    secs = {k: [] for k in jobs}
    for k,(step,_) in jobs.items(): step(x, y); step(x, y)
    for _ in range(a.repeats):
        for k,(step,_) in jobs.items(): t0 = time.perf_counter(); step(x, y); secs[k].append(time.perf_counter()-t0)
    n = jobs['ours_float32'][1]; best = min((k for k in secs if k.startswith('transformers')), key=lambda k: np.median(secs[k]))
    run.add_metrics(params=n, params_transformers=jobs['transformers_float32'][1],
                    peak_float32=Metric(peak['float32']/1e9, unit='GFLOP/s'), peak_bfloat16=Metric(peak['bfloat16']/1e9, unit='GFLOP/s'))
    for k,s in secs.items():
        run.add_metrics(**{k: median(x.numel()/np.array(s), 'tokens/s'),
                           f'{k}_peak_share': median(6*n*x.numel()/np.array(s)/max(peak.values()), 'of the matrix peak')})
        if k.startswith('ours'): run.add_metrics(**{f'{k}_ratio': median(np.array(secs[best])/s, f'times {best}')})

def overhead(a, run):
    "One million parameters, 8,192 tokens a step: fastai's loop with every callback of a pretraining, and eight lines"
    import tempfile
    from slm.data.loaders import token_dls
    from slm.train.learner import AutoCast, Bar, CSVLog, GradClip, LMLearner, Schedule, TrainLog
    from slm.train.pretrain import PretrainConfig, prepare
    _,tok,data = prepare(PretrainConfig(corpus='pydocs', vocab_size=1024, steps=1, max_bytes=3_000_000))
    cfg = GPTConfig.preset('1m', vocab_size=1024, max_seq_len=256)
    dls = lambda: token_dls(data, bs=32, seq_len=256, seed=0); dtype = best_dtype('cpu'); n = 8
    def bare():
        set_seed(0); m = GPT(cfg); it = iter(dls().train); groups = decay_groups(m); opt = adamw(groups).opt; ps = list(m.parameters())
        def run_():
            for _ in range(n):
                x,y,mask,_ = next(it)
                with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'): loss = lm_loss(m(x), y, mask)
                loss.backward(); torch.nn.utils.clip_grad_norm_(ps, 1.).item(); opt.step(); opt.zero_grad()
        return run_
    def loop(tmp):
        set_seed(0)
        learn = LMLearner(dls(), GPT(cfg),
                          cbs=[AutoCast(dtype), GradClip(), Schedule(10**6), TrainLog(10, peak=1e12), CSVLog(tmp/'log.csv'), Bar()])
        return lambda: learn.fit_steps(learn.opt_steps+n)
    with tempfile.TemporaryDirectory() as tmp:
        jobs = dict(bare=bare(), learner=loop(Path(tmp))); secs = {k: [] for k in jobs}
        for f in jobs.values(): f()
        for _ in range(a.repeats):
            for k,f in jobs.items(): t0 = time.perf_counter(); f(); secs[k].append(time.perf_counter()-t0)
    for k,s in secs.items(): run.add_metrics(**{k: median(8192*n/np.array(s), 'tokens/s')})
    run.add_metrics(overhead=median(100*(np.array(secs['learner'])/secs['bare']-1), '%'))

SHAKESPEARE = dict( # name: model, context, rows, steps, rate, dropout
    target=(dict(n_layer=4, d_model=128, n_head=4), 64, 32, 180, 1e-2,
            0.), # nanoGPT's small model and context: 1.8857 in 192 s on two cores
    three_minutes=(dict(n_layer=3, d_model=192, n_head=3), 256, 16, 1500, 5e-3, .05))

def shakespeare(a, run):
    """Validation loss (whole split, fixed windows at the training's context, at
    the end) and seconds from start to finish, without evaluation"""
    from slm.data.loaders import token_dls
    from slm.train.learner import AutoCast, GradClip, LMLearner, Schedule, autocast, evaluate
    from slm.train.optim import muon, muon_groups
    from slm.train.pretrain import PretrainConfig, prepare
    _,tok,data = prepare(PretrainConfig(corpus=f'shakespeare:{a.data}' if a.data else 'shakespeare', tokenizer='char', steps=1))
    for name,(shape,t,bs,steps,lr,drop) in SHAKESPEARE.items():
        loss,secs = [],[]
        for seed in range(a.seeds):
            t0 = time.perf_counter(); set_seed(seed)
            m = GPT(GPTConfig(vocab_size=tok.vocab_size, max_seq_len=t, dropout=drop, **shape))
            dls = token_dls(data, bs=bs, seq_len=t, seed=seed)
            learn = LMLearner(dls, m, opt_func=muon, splitter=muon_groups, lr=lr,
                              cbs=[AutoCast(), GradClip(), Schedule(steps, warmup=max(5, steps//50))])
            learn.fit_steps(steps); secs.append(time.perf_counter()-t0)
            loss.append(evaluate(m, dls.valid, tok.token_bytes(), autocast('cpu', 'auto'))['loss'].value)
            print(name, seed, f'{secs[-1]:.1f} s, {loss[-1]:.4f}', flush=True)
        run.add_metrics(**{f'{name}_loss': Metric(float(np.mean(loss)), min(loss), max(loss), len(loss),
                                                  'nats/character, lowest and highest of the seeds'),
                           f'{name}_seconds': Metric(float(np.mean(secs)), min(secs), max(secs), len(secs),
                                                     's, lowest and highest of the seeds')})

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['speed', 'overhead', 'shakespeare'], nargs='*'); ap.add_argument('--repeats', type=int, default=9)
    ap.add_argument('--data', help='tinyshakespeare.txt; fetched if not given'); ap.add_argument('--seeds', type=int, default=3)
    a = ap.parse_args()
    for what in a.what or ['speed', 'overhead']:
        run = RunDir.create(ROOT/'results'/'19_train.learner'/f'bench_{what}', 'bench', config=dict(repeats=a.repeats, seeds=a.seeds),
                            seed=0, exist_ok=True)
        globals()[what](a, run); run.finish(); print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__': main()

"""Full fine-tuning, LoRA and QLoRA on the same rows: memory, time, and what is learnt.

    python bench/lora.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data instructions.json [--dtype auto] [--steps 60] [--name smollm2]

Each variant runs in a process of its own, with the same batches, and prints JSON. Its peak memory is the process's
largest resident size minus what it was after all imports (the same in each); freed memory goes back to the system at
once in all of them. Writes results/26_train.lora/NAME/run.json.
"""
import argparse, hashlib, json, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIANTS = dict( # peak rate, optimiser, 4-bit base?, blocks computed twice?
    full=(5e-5, 'adamw', False, False),
    lora=(5e-4, 'adamw', False, False),
    qlora=(5e-4, 'adamw8bit', True, False),
    qlora_recompute=(5e-4, 'adamw8bit', True, True))

def child(a):
    import bitsandbytes, peft, numpy as np, torch, tqdm.auto
    from fastai.callback.core import Callback
    from slm.core import best_dtype, set_seed
    from slm.model.pretrained import load_model_and_tokenizer
    from slm.train.learner import AutoCast, GradClip, LMLearner, Schedule, TokenAccumulation, autocast, evaluate
    from slm.model.gpt import give_back, recompute
    from slm.train.lora import add_lora, load_4bit, param_counts, weight_bytes
    from slm.train.optim import OPTIMS
    from slm.train.pretrain import peak_memory
    from slm.train.sft import AnswersOnly, chat_dls, load_chats
    class Clock(Callback):
        order,run_valid = 99,False
        def before_fit(self): self.t,self.secs = time.perf_counter(),[]
        def after_batch(self):
            if self.stepped: t = time.perf_counter(); self.secs.append(t-self.t); self.t = t
    dtype = best_dtype('cpu') if a.dtype == 'auto' else a.dtype
    start = peak_memory('cpu'); above = lambda: (peak_memory('cpu')-start)/2**20
    lr,opt,four,twice = VARIANTS[a.variant]; set_seed(a.seed); give_back()
    model,tok = load_4bit(a.model) if four else load_model_and_tokenizer(a.model)
    loaded,weights = above(),weight_bytes(model)/2**20
    if a.variant != 'full': add_lora(model, rank=a.rank, alpha=2*a.rank)
    if twice: recompute(model)
    data = load_chats(a.data, tok, a.seq_len, val_frac=.15); dls = chat_dls(data, a.bs, a.seq_len, a.seed, pad_id=tok.pad_id)
    amp = autocast('cpu', dtype); bpb = lambda: vars(evaluate(model, dls.valid, tok.token_bytes(), amp)['bpb'])
    before,unchanged = bpb(),frozen(model); f,split = OPTIMS[opt]; clock = Clock()
    learn = LMLearner(dls, model.train(), opt_func=lambda ps, lr: f(ps, lr=lr, wd=0.), splitter=split, lr=lr,
                      cbs=[AutoCast(dtype), GradClip(), AnswersOnly(), TokenAccumulation(n_batches=a.accumulate),
                           Schedule(a.steps, warmup=max(1, a.steps//20), cooldown=1.), clock])
    learn.fit_steps(a.steps); peak = above(); model.eval()
    print(json.dumps(dict(variant=a.variant, dtype=dtype, lr=lr, opt=opt, peak=peak, loaded=loaded, weights=weights, before=before,
                          after=bpb(),
                          secs=clock.secs, base_unchanged=a.variant == 'full' or frozen(model) == unchanged, train_rows=len(data.train),
                          fingerprint=data.fingerprint, tokens=learn.tokens, **param_counts(model))))

def frozen(model):
    "A hash of what is not trained"
    import torch
    h = hashlib.sha256()
    for p in model.parameters():
        if not p.requires_grad: h.update(p.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return h.hexdigest()

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--model', required=True); ap.add_argument('--data', required=True); ap.add_argument('--name', default='smollm2')
    ap.add_argument('--steps', type=int, default=60); ap.add_argument('--bs', type=int, default=2, help='packed rows at once')
    ap.add_argument('--accumulate', type=int, default=2, help='batches of a step')
    ap.add_argument('--seq-len', type=int, default=256)
    ap.add_argument('--rank', type=int, default=8); ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--dtype', default='auto'); ap.add_argument('--variant', choices=VARIANTS, help='run this one here and print JSON')
    ap.add_argument('--variants', nargs='*', default=list(VARIANTS), choices=VARIANTS)
    a = ap.parse_args()
    if a.variant: return child(a)
    import numpy as np
    from slm.core import Metric, RunDir, bootstrap_ratio, portable
    res = {}
    for v in a.variants:
        r = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--variant', v], stdout=subprocess.PIPE, text=True, check=True)
        res[v] = json.loads(r.stdout.splitlines()[-1]); print(r.stdout.splitlines()[-1][:400], flush=True)
    first = next(iter(res.values()))
    run = RunDir.create(ROOT/'results'/'26_train.lora'/a.name, 'bench', exist_ok=True, seed=a.seed, parent=Path(a.model).name,
        config=dict(steps=a.steps, rows=a.bs, accumulate=a.accumulate, row_len=a.seq_len, rank=a.rank, alpha=2*a.rank, dtype=first['dtype'],
                    variants={v: dict(lr=r['lr'], opt=r['opt']) for v,r in res.items()}),
        data=dict(name=portable(a.data), fingerprint=first['fingerprint'], train_rows=first['train_rows']))
    for v,r in res.items():
        if not r['base_unchanged']: raise SystemExit(f'{v}: the base has changed')
        run.add_metrics(**{f'{v}_peak': Metric(r['peak'], unit='MB above imports'),
                           f'{v}_loaded': Metric(r['loaded'], unit='MB above imports'),
            f'{v}_weights': Metric(r['weights'], unit='MB'), f'{v}_trained': r['trained'], f'{v}_bpb_before': Metric(**r['before']),
            f'{v}_bpb': Metric(**r['after']), f'{v}_step': bootstrap_ratio(np.array(r['secs'][1:]), unit='s a step')})
        if 'full' in res: run.add_metrics(**{f'{v}_peak_share': Metric(r['peak']/res['full']['peak'], unit='of full fine-tuning')})
    run.finish(); print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__': main()

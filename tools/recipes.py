"""Write recipes/{cpu,m1,rtx3090}.md: what to run on which machine, with memory and time by formula.

    python tools/recipes.py           # rewrite the pages
    python tools/recipes.py --check   # exit 1 when a page on disk differs from what the formulas say
"""
import sys
from pathlib import Path
from slm.model.gpt import GPTConfig, memory_estimate
from slm.train.pretrain import PretrainConfig, resolve

HERE = Path(__file__).resolve().parent.parent/'recipes'
MACHINES = dict(
    cpu=dict(title='Two to four CPU cores', flops=180e9,
             how='180 GFLOP/s: 45 % of the 400 GFLOP/s that a bfloat16 matrix product was measured to reach on two AMD EPYC cores with AVX512-BF16 '
             '(`slm.core.matmul_flops`). Cores without bfloat16 instructions (AVX2) reach about 100.', dtype='bfloat16', device='cpu',
             memory_gb=16,
             rows=[('1m', 'pydocs', 3, 'minutes', 1024, 'the demo'),
                   ('3m', 'files:books/*.txt', 30, 'minutes', 4096, 'a shelf of books of your own'),
                   ('10m', 'tinystories', 600, 'minutes', 8192, 'over night')]),
    m1=dict(title='MacBook M1, 16 GB', flops=.3*2.6e12,
            how='0.78 TFLOP/s: 30 % of the 2.6 TFLOP/s in float32 that the data sheet of the 8-core GPU gives. Not measured by us: look at `mfu` in your `log.csv`.',
            dtype='float32', device='mps', memory_gb=16,
            rows=[('3m', 'files:books/*.txt', 20, 'minutes', 4096, 'a shelf of books of your own'),
                  ('10m', 'tinystories', 240, 'minutes', 8192, 'an evening'), ('25m', 'tinystories', 720, 'minutes', 8192, 'over night')]),
    rtx3090=dict(title='One RTX 3090, 24 GB', flops=.4*71e12,
                 how='28 TFLOP/s: 40 % of the 71 TFLOP/s in bfloat16 with float32 accumulation that the data sheet gives. Not measured by us: look at `mfu` in your `log.csv`.',
                 dtype='bfloat16', device='cuda', memory_gb=24,
                 rows=[('25m', 'tinystories', 500_000_000, 'tokens', 16384, 'stories, coherent'),
                       ('50m', 'fineweb-edu', 1_000_000_000, 'tokens', 32768, 'about twenty tokens a parameter'),
                       ('125m', 'fineweb-edu', 2_900_000_000, 'tokens', 32768, 'about a day; the compute-optimal size of that day')]))

def gib(x): return f'{x/2**30:.1f} GiB' if x >= 2**30 else f'{x/2**20:.0f} MiB'
def span(s): return f'{s/86400:.1f} days' if s >= 1.5*86400 else f'{s/3600:.1f} h' if s >= 5400 else f'{s/60:.0f} min'

def row(m, preset, corpus, amount, unit, vocab, what):
    "One run: what it costs and the command"
    c = resolve(PretrainConfig(corpus=corpus, preset=preset, steps=1, device='cpu', dtype=m['dtype']))
    cfg = GPTConfig.preset(preset, vocab_size=vocab, max_seq_len=c.seq_len); per_token = cfg.flops_per_token(c.seq_len)
    tokens = amount if unit=='tokens' else amount*60*m['flops']/per_token
    seconds = tokens*per_token/m['flops']; mem = memory_estimate(cfg, c.micro_batch, c.seq_len, dtype=m['dtype'])
    assert mem['total'] < m['memory_gb']*2**30, (preset, mem)
    quote = f'"{corpus}"' if '*' in corpus else corpus
    cmd = f'slm pretrain --corpus {quote} --preset {preset} --vocab-size {vocab} --{unit} {amount} --device {m["device"]} --out runs/{preset}'
    return f'| `{preset}` | {cfg.num_params()/1e6:.1f}M | {c.seq_len} | {c.micro_batch} × {c.seq_len} | {tokens/1e6:,.0f}M | {span(seconds)} | {gib(mem["total"])} | {what} |', cmd

def page(name):
    m = MACHINES[name]; rows,cmds = zip(*(row(m, *r) for r in m['rows']))
    return f'''# {m['title']}

<!-- Written by tools/recipes.py: do not edit. -->

| preset | parameters | context | micro-batch | tokens | time | memory | what for |
| --- | --- | --- | --- | --- | --- | --- | --- |
''' + '\n'.join(rows) + f'''

```sh
''' + '\n'.join(cmds) + f'''
```

**Time** is tokens × `GPTConfig.flops_per_token` (6N and attention) / speed, with a speed of {m['how']}

**Memory** is `memory_estimate`: weights, gradients and AdamW's two moments in float32, activations of one micro-batch, and the logits. When it does not fit, lower `--micro-batch`: gradients are
accumulated to the same number of tokens a step, and the result is the same.

`--minutes` may stand for `--tokens`: the number of steps is then measured at the start. Ctrl-C leaves a checkpoint; `slm resume runs/NAME` goes on.
'''

if __name__=='__main__':
    HERE.mkdir(exist_ok=True); stale = []
    for name in MACHINES:
        path,text = HERE/f'{name}.md',page(name)
        if '--check' in sys.argv: stale += [path.name] if not path.exists() or path.read_text() != text else []
        else: path.write_text(text)
    if stale: print('not in step with tools/recipes.py:', ', '.join(stale)); sys.exit(1)

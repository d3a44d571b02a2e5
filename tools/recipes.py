"""Write recipes/{cpu,m1,rtx3090}.md: what to run on which machine, with memory and time by formula.

    python tools/recipes.py           # rewrite the pages
    python tools/recipes.py --check   # exit 1 when a page on disk differs from what the formulas say
"""
import sys
from pathlib import Path
from slm.exp.plan import MACHINES as PROFILES
from slm.model.gpt import GPTConfig, memory_estimate
from slm.train.pretrain import PretrainConfig, resolve, rows_that_fit

HERE = Path(__file__).resolve().parent.parent/'recipes'
MACHINES = dict( # page -> profile of slm.exp.plan, and rows
    cpu=('i3-10100t', [('1m', 'pydocs', 3, 'minutes', 1024, 'the demo'),
                       ('3m', 'files:books/*.txt', 30, 'minutes', 4096, 'a shelf of books of your own'),
                       ('10m', 'tinystories', 600, 'minutes', 8192, 'over night')]),
    m1=('m1', [('3m', 'files:books/*.txt', 20, 'minutes', 4096, 'a shelf of books of your own'),
               ('10m', 'tinystories', 240, 'minutes', 8192, 'an evening'),
               ('25m', 'tinystories', 720, 'minutes', 8192, 'over night')]),
    rtx3090=('rtx-3090', [('25m', 'tinystories', 500_000_000, 'tokens', 16384, 'stories, coherent'),
                          ('50m', 'fineweb-edu', 1_000_000_000, 'tokens', 32768, 'about twenty tokens a parameter'),
                          ('125m', 'fineweb-edu', 2_900_000_000, 'tokens', 32768, 'about a day; the compute-optimal size of that day')]))

def gib(x): return f'{x/2**30:.1f} GiB' if x >= 2**30 else f'{x/2**20:.0f} MiB'
def span(s): return f'{s/86400:.1f} days' if s >= 1.5*86400 else f'{s/3600:.1f} h' if s >= 5400 else f'{s/60:.0f} min'

def row(m, preset, corpus, amount, unit, vocab, what):
    "One run: what it costs and the command"
    c = resolve(PretrainConfig(corpus=corpus, preset=preset, steps=1, device='cpu', dtype=m.dtype))
    cfg = GPTConfig.preset(preset, vocab_size=vocab, max_seq_len=c.seq_len)
    if m.device != 'cpu': c.micro_batch = rows_that_fit(cfg, c.batch_tokens, c.seq_len, m.device, m.dtype, .9*m.memory)
    at_once = c.micro_batch*c.seq_len
    per_token = m.token_seconds(cfg, c.seq_len, c.batch_tokens, at_once)
    tokens = amount if unit=='tokens' else amount*60/per_token; seconds = tokens*per_token
    mem = memory_estimate(cfg, c.micro_batch, c.seq_len, dtype=m.dtype, device=m.device, accumulated=at_once < c.batch_tokens)['total']
    assert mem < m.memory, (preset, mem)
    quote = f'"{corpus}"' if '*' in corpus else corpus
    cmd = f'slm pretrain --corpus {quote} --preset {preset} --vocab-size {vocab} --{unit} {amount} --device {m.device} --out runs/{preset}'
    cells = (f'`{preset}`', f'{cfg.num_params()/1e6:.1f}M', c.seq_len, f'{c.micro_batch} × {c.seq_len}', f'{tokens/1e6:,.0f}M',
             f'{1/per_token:,.0f}', span(seconds), gib(mem), what)
    return f"| {' | '.join(map(str, cells))} |", cmd

def page(name):
    profile,rows = MACHINES[name]; m = PROFILES[profile]; rows,cmds = zip(*(row(m, *r) for r in rows))
    return f'''# {m.title}

<!-- Written by tools/recipes.py: do not edit. -->

| preset | parameters | context | micro-batch | tokens | tokens/s | time | memory | what for |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
''' + '\n'.join(rows) + f'''

```sh
''' + '\n'.join(cmds) + f'''
```

**Time** is by the formula of `slm.exp.plan`: products, traffic and launches of a machine. Where its constants are from: {m.source}.
Look at `tokens_per_s` in your `log.csv`.

**Memory** is `memory_estimate`: weights, gradients and AdamW's two moments in float32, activations of one micro-batch, and the logits.
On a card `--micro-batch` is chosen by its memory. When it does not fit, lower it: gradients are accumulated to the same number of
tokens a step, and the result is the same.

`slm plan --gpu {profile} --days 1` says what is best there for a time of your choice. `--minutes` may stand for `--tokens`: the number of
steps is then measured at the start. Ctrl-C leaves a checkpoint; `slm resume runs/NAME` goes on.
'''

if __name__=='__main__':
    HERE.mkdir(exist_ok=True); stale = []
    for name in MACHINES:
        path,text = HERE/f'{name}.md',page(name)
        if '--check' in sys.argv: stale += [path.name] if not path.exists() or path.read_text() != text else []
        else: path.write_text(text)
    if stale: print('not in step with tools/recipes.py:', ', '.join(stale)); sys.exit(1)

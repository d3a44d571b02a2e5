"""What a training takes at most, by the operating system, beside `memory_estimate`: python bench/memory.py

Against: the formula that `slm pretrain` refuses models by, and that `slm plan` plans with. Each shape trains two steps in a process of
its own. Writes results/52_exp.plan/memory/memory.json.
"""
import itertools, json, subprocess, sys
from pathlib import Path
from slm.core import hardware, versions, write_json

OUT = Path(__file__).resolve().parent.parent/'results'/'52_exp.plan'/'memory'/'memory.json'
SHAPES = [ # layers, width, vocabulary, rows, context
    (4, 256, 8192, 16, 256), (8, 512, 8192, 8, 512), (6, 384, 16384, 16, 256), (12, 768, 16384, 2, 512),
    (3, 192, 2048, 64, 384), (10, 640, 4096, 8, 512), (8, 512, 32768, 4, 1024)]
FRUGAL = [(6, 384, 4096, 32, 512), (8, 512, 8192, 16, 512), (12, 768, 16384, 8, 512)] # 10, 30 and 100 million parameters, about

CHILD = """
import json, sys, torch
from pathlib import Path
from slm.model.gpt import GPT, GPTConfig, give_back, lm_loss, memory_estimate, recompute
from slm.train.learner import autocast
l, d, v, b, t, dtype, frugal = json.loads(sys.argv[1])
cfg = GPTConfig(n_layer=l, d_model=d, vocab_size=v, max_seq_len=t, n_head=d//64, n_kv_head=max(1, d//128))
def of(name): return 1024*int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(name)).split()[1])
def step(model, opt, b, t):
    x = torch.randint(v, (b, t))
    with autocast('cpu', dtype)(): loss = lm_loss(model(x), x)
    loss.backward(); opt.step(); opt.zero_grad()
small = GPT(GPTConfig(n_layer=1, d_model=64, vocab_size=64, max_seq_len=16)) # what the first step of a process loads
v, full = 64, v; step(small, torch.optim.AdamW(small.parameters(), fused=True), 1, 16); v = full; del small
if frugal: give_back()
before = of('VmRSS'); Path('/proc/self/clear_refs').write_text('5')
model = (recompute if frugal else lambda m: m)(GPT(cfg)); opt = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(2): step(model, opt, b, t)
estimate = memory_estimate(cfg, b, t, dtype=dtype, accumulated=False, frugal=frugal)['total']
print(json.dumps(dict(measured=of('VmHWM')-before, estimate=estimate)))
"""

def measure(shape, dtype, frugal):
    "One training in a process of its own"
    done = subprocess.run([sys.executable, '-c', CHILD, json.dumps([*shape, dtype, frugal])], capture_output=True, text=True)
    if done.returncode: sys.exit(f'{shape} {dtype}: {done.stderr[-2000:]}')
    return dict(zip(('n_layer', 'd_model', 'vocab_size', 'rows', 'seq_len'), shape), dtype=dtype, frugal=frugal, **json.loads(done.stdout))

if __name__ == '__main__':
    rows = []
    kinds = [(s, False) for s in SHAPES]+[(s, True) for s in FRUGAL]
    for (shape,frugal),dtype in itertools.product(kinds, ('float32', 'bfloat16')):
        rows.append(r := measure(shape, dtype, frugal))
        print(f"{shape} {dtype:8}{' frugal' if frugal else ''}: "
              f"{r['measured']/2**20:7,.0f} MiB measured, {r['estimate']/2**20:7,.0f} by formula, "
              f"{r['estimate']/r['measured']-1:+.1%}", flush=True)
    write_json(OUT, dict(hardware=hardware(), versions=versions(), rows=rows))

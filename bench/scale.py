"""Tokens a second and memory of a training against size, context and processes: python bench/scale.py [--rounds 3]

Each training is `slm pretrain --nproc N` as a person starts it, in processes of their own on this machine, float32, Muon; the same
tokens a step for all. What is compared: one process with two and four, which share the same cores. The rounds
take turns; the middle one counts, all are kept. Writes results/39_train.distributed/scale/scale.json.
"""
import argparse, json, os, sys, tempfile
from pathlib import Path
from statistics import median
from slm.core import RunDir, hardware, versions, write_json
from slm.model.gpt import GPTConfig
from slm.train.distributed import launch, step_traffic

OUT = Path(__file__).resolve().parent.parent/'results'/'39_train.distributed'/'scale'/'scale.json'
SIZES = [('1m', 128, 4096), ('1m', 512, 4096), ('10m', 512, 4096)] # preset, context, tokens a step
VOCAB, STEPS = 2048, 12

def train(preset, seq_len, tokens, nproc, opt, out):
    "One training; what its run says"
    given = dict(corpus='pydocs', max_bytes=2_000_000, vocab_size=VOCAB, preset=preset, seq_len=seq_len, batch_tokens=tokens, steps=STEPS,
                 opt=opt, evals=1, samples=0, device='cpu', dtype='float32', out=out, nproc=nproc)
    args = [o for k,v in given.items() for o in (f"--{k.replace('_', '-')}", v)]
    if launch(nproc, ['-m', 'slm.cli', 'pretrain', *args]): sys.exit(f'{preset} {nproc}: failed')
    run = RunDir.open(out); return run.metric('tokens_per_s').value, run.metric('peak_memory').value

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--rounds', type=int, default=3); ap.add_argument('--out', type=Path, default=OUT); a = ap.parse_args()
    kinds = [(*s, n, 'muon') for s in SIZES for n in (1, 2, 4)]; got = {k: [] for k in kinds}
    for i in range(a.rounds):
        for k in kinds:
            with tempfile.TemporaryDirectory() as d: got[k].append(train(*k, f'{d}/run'))
            speed,mb = got[k][-1]
            print(f'round {i+1}: {k[0]:4} context {k[1]:4} {k[3]} processes {speed:8,.0f} tokens/s {mb:6,.0f} MB', flush=True)
    rows = [dict(preset=p, seq_len=t, step_tokens=n, processes=k, opt=o, tokens_per_s=median(s for s,_ in r), rounds=[s for s,_ in r],
                 memory_mb=median(m for _,m in r), traffic=step_traffic(GPTConfig.preset(p, vocab_size=VOCAB, max_seq_len=t), k, o))
            for (p,t,n,k,o),r in got.items()]
    write_json(a.out, dict(hardware=hardware(), versions=versions(), threads=os.environ.get('OMP_NUM_THREADS'), steps=STEPS, rows=rows))

if __name__ == '__main__': main()

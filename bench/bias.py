"""Do measures of bias measure bias, what does it cost to remove it, and how fast are pairs scored?

    python bench/bias.py train [--seeds 3]        # small models of worlds with the dial at 0 … 1, and of a balanced one: runs/bias/
"""
import argparse, json
from pathlib import Path
from slm.core import write_json
from slm.data.world import World, Tale
from slm.train.pretrain import pretrain

ROOT = Path(__file__).parents[1]
RUNS, DIALS, N_DOCS, STEPS = ROOT/'runs'/'bias', (0., .25, .5, .75, 1.), 80_000, 600

class Introductions(World):
    "The world, but a story ends when two people are introduced."
    def story(self, v):
        t = Tale(self, v); t.hero(); v.say(t.people[0].his); t.companion(False); return t

def train(a):
    "0.9M parameters, 2.5M tokens each; the tokenizer of the first serves all"
    for seed in range(a.seeds):
        for dial,balanced in [(d, False) for d in DIALS]+[(1., True)]:
            name = f'{dial:g}{"_balanced" if balanced else ""}_{seed}'; run,tok = RUNS/name,RUNS/'0_0'
            if (run/'model.safetensors').exists(): continue
            w = Introductions(dial); docs = w.stories(1+seed, N_DOCS//(1+balanced)); (RUNS/'text').mkdir(parents=True, exist_ok=True)
            with open(text := RUNS/'text'/f'{name}.jsonl', 'w') as f:
                for s in docs:
                    for t in (s, w.mirror(s))[:1+balanced]: f.write(json.dumps(dict(text=t.text))+'\n')
            pretrain(f'files:{text}', run, steps=STEPS, vocab_size=None if tok.exists() else 1536, tokenizer=str(tok/'tokenizer.json') if tok.exists() else 'bpe',
                     seq_len=128, batch_tokens=4096, evals=2, samples=1, seed=seed, device='cpu', model=dict(n_layer=3, d_model=128))
            write_json(run/'bias.json', dict(dial=dial, balanced=balanced, seed=seed)); text.unlink()

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['train'], nargs='+'); ap.add_argument('--seeds', type=int, default=3)
    a = ap.parse_args()
    for what in a.what: globals()[what](a)

if __name__ == '__main__': main()

"""How good is the judge of toxicity, does the protocol measure toxicity, and how fast are continuations made?

    python bench/toxicity.py classifier --data DATA          # errors of the default classifier, also on a list of bad words
    python bench/toxicity.py prompts --data DATA             # halves of these answers as prompts, into runs/toxicity/prompts.jsonl
    python bench/toxicity.py train calibrate [--seeds 3]     # small models of worlds with a known share of rude stories
    python bench/toxicity.py speed --model MODEL --data DATA # continuations a second: prompts read once, read for each, and transformers

DATA is a folder with sft/preferences.json (instruction, input, chosen, rejected) and bias/ldnoobw_en.txt (one word a line).
Writes results/34_eval.toxicity/NAME/run.json.
"""
import argparse, itertools, json, random, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from slm.core import RunDir, bootstrap_ratio, read_json, write_json
from slm.data.tokenizer import train_bpe
from slm.data.world import World
from slm.eval.pairs import Example, open_causal
from slm.eval.stats import linear_fit
from slm.eval.toxicity import fan_out, judge_classifier, observe_toxicity, open_toxicity, prompt_figures, rude_stories
from slm.model.generate import generate
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.pretrain import pretrain

ROOT = Path(__file__).parents[1]
RUNS, DIALS, N_DOCS, STEPS, HELD_OUT = ROOT/'runs'/'toxicity', (0., .05, .1, .2, .5), 20_000, 150, 99

def classifier(a, run):
    "Rude answers and bad words are toxic; polite answers and occupations in the same sentence are not"
    clf, pairs = open_toxicity(), read_json(Path(a.data)/'sft'/'preferences.json')
    run.info['data'] |= dict(classifier=f'{clf.name} ({clf.version})')
    bad = (Path(a.data)/'bias'/'ldnoobw_en.txt').read_text(encoding='utf-8').split('\n'); bad = [w.strip() for w in bad if w.strip()]
    samples = dict(manners=([p['rejected'] for p in pairs], [p['chosen'] for p in pairs]),
                   words=([f'You are a {w}.' for w in bad], [f'You are a {w}.' for w in World().job.texts]))
    for name,(toxic,fine) in samples.items():
        y = [True]*len(toxic)+[False]*len(fine)
        run.add_metrics(**{f'{name}_{k}': m for k,m in judge_classifier(y, clf.scores(toxic+fine)).items()})

def prompts(a, run):
    "First halves of answers of eight words or more, those of toxic first halves in front, in the published format"
    clf, rows = open_toxicity(), []
    for p in read_json(Path(a.data)/'sft'/'preferences.json'):
        for text in (p['chosen'], p['rejected']):
            w = text.split(' '); h = len(w)//2
            if len(w) >= 8 and ' '.join(w[:h]).strip(): rows.append((' '.join(w[:h]), ' '+' '.join(w[h:])))
    rows = sorted(set(rows))
    random.Random(0).shuffle(rows); rows = [r for _,r in sorted(zip(clf.scores([r[0] for r in rows]) < .5, rows), key=lambda x: x[0])]
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(RUNS/'prompts.jsonl', 'w', encoding='utf-8') as f:
        for b,c in rows: print(json.dumps(dict(prompt=dict(text=b, toxicity=None), continuation=dict(text=c))), file=f)

def train(a, run):
    "A few hundred thousand parameters, three hundred thousand tokens each; one tokenizer serves all"
    (RUNS/'text').mkdir(parents=True, exist_ok=True); tok = RUNS/'tokenizer.json'
    if not tok.exists(): train_bpe((t for _,t in rude_stories(.5, 1, 10_000)), 1024).save(tok)
    for seed,dial in itertools.product(range(a.seeds), DIALS):
        path = RUNS/f'{dial:g}_{seed}'
        if (path/'model.safetensors').exists(): continue
        with open(text := RUNS/'text'/f'{path.name}.jsonl', 'w') as f:
            for _,t in rude_stories(dial, 1+seed, N_DOCS): f.write(json.dumps(dict(text=t))+'\n')
        pretrain(f'files:{text}', path, steps=STEPS, tokenizer=str(tok), seq_len=64, batch_tokens=2048, evals=1, samples=1, seed=seed,
                 device='cpu', model=dict(n_layer=2, d_model=96))
        write_json(path/'toxicity.json', dict(dial=dial, seed=seed)); text.unlink()

def calibrate(a, run):
    "200 unread stories, 25 continuations each, with all of the distribution and with its nucleus"
    points, clf = [], open_toxicity(); run.info['data'] |= dict(classifier=f'{clf.name} ({clf.version})')
    items = [Example(f'story {i}', '', [t], ['text'], about=(0., None)) for i,(t,_) in enumerate(rude_stories(0., HELD_OUT, 200))]
    for seed,dial in itertools.product(range(a.seeds), DIALS):
        model,tok = load_model_and_tokenizer(RUNS/f'{dial:g}_{seed}')
        for top_p in (1., .9):
            m = prompt_figures(list(observe_toxicity(model, tok, items, clf, top_p=top_p, rows=500)))
            points += [dict(dial=dial, seed=seed, top_p=top_p, measure=k, value=m[f'nontoxic_{k}'].value, lo=m[f'nontoxic_{k}'].lo,
                            hi=m[f'nontoxic_{k}'].hi) for k in ('rate', 'prob', 'max')]
        print(dial, seed, flush=True)
    p = pd.DataFrame(points); p.to_csv(run/'points.csv', index=False, float_format='%.5g'); run.info['data']['models'] = a.seeds*len(DIALS)
    for t,g in p[p.measure == 'rate'].groupby('top_p'): run.add_metrics(**{f'{k}_{t:g}': m for k,m in linear_fit(g.dial, g.value).items()})

def speed(a, run):
    "Four prompts a turn, 25 continuations of 20 tokens each, weights in 32 bits on both sides"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model,tok,_ = open_causal(a.model, 'cpu'); folder,name = Path(a.model).parent,Path(a.model).name; run.info['parent'] = name
    theirs,their_tok = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32).eval(),AutoTokenizer.from_pretrained(folder, gguf_file=name)
    texts = [p['chosen'] for p in read_json(Path(a.data)/'sft'/'preferences.json')]
    texts = [' '.join(t.split()[:8]) for t in texts if len(t.split()) > 8][:4*a.repeats]
    def fan(ps): fan_out(model, tok, ps, 25, max_new_tokens=20, top_p=.9, seed=list(range(25*len(ps))))
    def plain(ps): generate(model, tok, [p for p in ps for _ in range(25)], max_new_tokens=20, top_p=.9, seed=list(range(25*len(ps))))
    def hf(ps):
        their_tok.padding_side = 'left'; x = their_tok(ps, return_tensors='pt', padding=True)
        with torch.no_grad():
            theirs.generate(**x, do_sample=True, top_p=.9, top_k=0, max_new_tokens=20, num_return_sequences=25,
                            pad_token_id=their_tok.eos_token_id)
    def timed(f, ps): t0 = time.perf_counter(); f(ps); return time.perf_counter()-t0
    secs = np.array([[timed(f, texts[4*r:4*r+4]) for f in (fan, plain, hf)] for r in range(a.repeats)]); made = np.full(a.repeats, 100.)
    run.add_metrics(params=sum(p.numel() for p in theirs.parameters()),
                    **{k: bootstrap_ratio(made, s, unit='continuations/s') for k,s in zip(('fan', 'generate', 'hf'), secs.T)},
                    ratio=bootstrap_ratio(secs[:, 1], secs[:, 0], unit='times'),
                    ratio_hf=bootstrap_ratio(secs[:, 2], secs[:, 0], unit='times'))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['classifier', 'prompts', 'train', 'calibrate', 'speed'], nargs='+')
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--data', help='folder of labelled texts')
    ap.add_argument('--model', help='a .gguf file'); ap.add_argument('--repeats', type=int, default=3)
    a = ap.parse_args()
    for what in a.what:
        run = what not in ('train', 'prompts') and RunDir.create(ROOT/'results'/'34_eval.toxicity'/what, 'bench',
                                                                 dict(seeds=a.seeds, repeats=a.repeats, threads=torch.get_num_threads()),
                                                                 seed=0, exist_ok=True)
        globals()[what](a, run)
        if run: run.finish(); print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__': main()

"""Do measures of bias measure bias, what does it cost to remove it, and how fast are pairs scored?

    python bench/bias.py train calibrate [--seeds 2]  # small models of worlds with the dial at 0 … 1 and of a balanced one; all measures
    python bench/bias.py speed --data blimp           # pairs a second against lm-eval at its best batch size, the same weights and pairs
    python bench/bias.py many --data blimp            # 67,000 pairs of BLiMP's lengths
    python bench/bias.py agree --data crows.csv --model MODEL   # item by item against lm-eval

`speed` and `agree` need lm-eval (pip install lm-eval); `speed` and `many` need a folder of BLiMP's .jsonl files.
Writes run.json into results/33_eval.bias/calibrate, and into results/32_eval.pairs/NAME for the others.
"""
import argparse, itertools, json, math, random, resource, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from slm.core import Metric, RunDir, bootstrap_ratio, set_seed, write_json
from slm.data.tokenizer import Tokenizer, train_bpe
from slm.eval.stats import linear_fit, wilson
from slm.eval.bias import Introductions, table_rows, true_bias, world_measures
from slm.eval.lm import doc_nats, read_pairs
from slm.eval.pairs import Example, data_files, read_crows, score_items
from slm.model.gpt import GPT, GPTConfig
from slm.model.pretrained import load_model_and_tokenizer
from slm.train.pretrain import pretrain

ROOT = Path(__file__).parents[1]
RUNS, DIALS, N_DOCS, STEPS, HELD_OUT = ROOT/'runs'/'bias', (0., .25, .5, .75, 1.), 120_000, 1000, 99

def train(a, run):
    "0.8M parameters, 4M tokens each; one tokenizer serves all"
    (RUNS/'text').mkdir(parents=True, exist_ok=True); tok = RUNS/'tokenizer.json'
    if not tok.exists(): train_bpe((s.text for s in Introductions(0.).stories(1, 30_000)), 1024).save(tok)
    for seed in range(a.seeds):
        for dial,balanced in [(1., False), (1., True), *((d, False) for d in DIALS[:-1])]:
            name = f'{dial:g}{"_balanced" if balanced else ""}_{seed}'; path = RUNS/name
            if (path/'model.safetensors').exists(): continue
            w = Introductions(dial); docs = w.stories(1+seed, N_DOCS//(1+balanced))
            with open(text := RUNS/'text'/f'{name}.jsonl', 'w') as f:
                for s in docs:
                    for t in (s, w.mirror(s))[:1+balanced]: f.write(json.dumps(dict(text=t.text))+'\n')
            pretrain(f'files:{text}', path, steps=STEPS, tokenizer=str(tok), seq_len=64, batch_tokens=4096, evals=2, samples=1, seed=seed,
                     device='cpu', model=dict(n_layer=3, d_model=128))
            write_json(path/'bias.json', dict(dial=dial, balanced=balanced, seed=seed)); text.unlink()

def calibrate(a, run):
    """All measures on all models; lines through those that are not balanced; the
    balanced ones' price on a biased world's text, in bits per byte"""
    points, nats = [], {}
    for dial,balanced,seed in [(d, b, s) for s in range(a.seeds) for d,b in [(d, False) for d in DIALS]+[(1., True)]]:
        model,tok = load_model_and_tokenizer(RUNS/f'{dial:g}{"_balanced" if balanced else ""}_{seed}')
        stories = list(Introductions(dial).stories(HELD_OUT, 2000)); bits = doc_nats(model, tok, [s.text for s in stories])/math.log(2)
        floor,nbytes = np.array([s.bits for s in stories]),np.array([len(s.text.encode()) for s in stories])
        if dial == 1: nats[balanced, seed] = bits
        for k,m in (dict(world_measures(model, tok)) | dict(excess=bootstrap_ratio(bits-floor, nbytes, unit='bits/byte'))).items():
            points.append(dict(dial=dial, balanced=balanced, seed=seed, measure=k, value=m.value, lo=m.lo, hi=m.hi,
                               truth=true_bias(0 if balanced else dial).get(k)))
        print(dial, balanced, seed, flush=True)
    p = pd.DataFrame(points)
    p.to_csv(run/'points.csv', index=False, float_format='%.5g'); run.info['data']['models'] = len(p)//p.measure.nunique()
    for k,g in p[~p.balanced].groupby('measure'):
        known = k in ('log_odds', 'gap', 'written') # 'pairs' has a truth too, but no line goes through a step
        for name,m in linear_fit(g.truth if known else g.dial, g.value).items(): run.add_metrics(**{f'{k}_{name}': m})
    world = Introductions(1.); price = [math.log2(2/(1+2**(s.bits-world.mirror(s).bits))) for s in stories] # what the true mixture pays
    run.add_metrics(balance_cost=bootstrap_ratio(np.mean([nats[True, s]-nats[False, s] for s in range(a.seeds)], 0), nbytes,
                                                 unit='bits/byte'),
                    balance_cost_truth=bootstrap_ratio(price, nbytes, unit='bits/byte'))

def ten_million(folder):
    "A model with about ten million parameters and random weights, and a tokenizer for English"
    from slm.data.corpus import build_corpus
    set_seed(0); tok = train_bpe(build_corpus('pydocs', max_bytes=3_000_000).docs('train'), 4096)
    GPT(GPTConfig.preset('10m', vocab_size=4096, max_seq_len=256)).save_pretrained(folder, tok); tok.save(folder/'tokenizer.json')

def peer(folder, bs):
    "lm-eval on the same weights and token ids"
    import logging; logging.disable(logging.WARNING)
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer.load(folder/'tokenizer.json'); name = lambda i: tok.tok.id_to_token(i)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok.tok, eos_token=name(tok.eot_id), bos_token=name(tok.bos_id),
                                   pad_token=name(tok.pad_id))
    return HFLM(pretrained=str(folder), tokenizer=fast, device='cpu', batch_size=bs, dtype='float32')

def ask_peer(lm, texts):
    from lm_eval.api.instance import Instance
    asked = [Instance(request_type='loglikelihood', doc={}, arguments=('', t), idx=i) for i,t in enumerate(texts)]
    return [x for x,_ in lm.loglikelihood(asked, disable_tqdm=True)]

def timed(f): t0 = time.perf_counter(); r = f(); return time.perf_counter()-t0, r

def blimp(a):
    rows = [r for f in data_files(a.data, '*.jsonl') for r in read_pairs(f)]
    return [Example(f'row {i}', r['UID'], [r['sentence_good'], r['sentence_bad']], ['sentence_good', 'sentence_bad'])
            for i,r in enumerate(rows, 1)]

def agreement(ours, theirs):
    d = np.array(theirs).reshape(-1, 2); a, b = ours[:, 0] > ours[:, 1], d[:, 0] > d[:, 1]
    return dict(agreement=wilson(int((a == b).sum()), len(a), 'of pairs'),
                largest_difference=Metric(float(abs(ours-d).max()), n=d.size, unit='nats'))

def speed(a, run):
    "Tokenizing included on both sides; lm-eval first shows its best batch size, then both take turns"
    items = blimp(a); texts = [o for it in items for o in it.options]
    with tempfile.TemporaryDirectory() as tmp:
        ten_million(Path(tmp)); model,tok = load_model_and_tokenizer(tmp); n = model.num_params(); model.fuse_()
        ours = lambda: np.array([logp for _,logp,_ in score_items(model, tok, items)])
        theirs = {bs: timed(lambda: ask_peer(peer(Path(tmp), bs), texts))[0] for bs in (16, 32, 64, 128, 256)}
        best = min(theirs, key=theirs.get)
        lm = peer(Path(tmp), best); secs = [(timed(ours), timed(lambda: ask_peer(lm, texts))) for _ in range(a.repeats)]
    x,y = (np.array([s[k][0] for s in secs]) for k in (0, 1))
    run.add_metrics(params=n, pairs=len(items), ratio=bootstrap_ratio(y, x, unit='times'),
                    ours=bootstrap_ratio(np.full(len(x), len(items)), x, unit='pairs/s'),
                    lm_eval=bootstrap_ratio(np.full(len(y), len(items)), y, unit='pairs/s'), best_batch=best,
                    **agreement(secs[-1][0][1], secs[-1][1][1]),
                    **{f'lm_eval_batch_{bs}': Metric(s, unit='s') for bs,s in theirs.items()})

def many(a, run):
    "67 sets of 1,000 pairs: BLiMP's own, with each set's words exchanged for one another"
    items = blimp(a)
    words = sorted({w for it in items for o in it.options for w in o.rstrip('.').split()})
    rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    def synthetic():
        for k in range(67):
            other = words[:]; random.Random(k).shuffle(other); swap = dict(zip(words, other))
            for it in itertools.islice(itertools.cycle(items), k*1000, (k+1)*1000):
                yield Example(it.where, f'set {k}', [' '.join(swap[w] for w in o.rstrip('.').split())+'.' for o in it.options], it.columns)
    with tempfile.TemporaryDirectory() as tmp: ten_million(Path(tmp)); model,tok = load_model_and_tokenizer(tmp); model.fuse_()
    ask = lambda its: sum(logp[0] > logp[1] for _,logp,_ in score_items(model, tok, its))
    peak = {}
    def watched():
        for n,it in enumerate(synthetic()):
            if n in (3000, 20_000, 40_000): peak[f'peak_memory_{n}'] = Metric(rss(), unit='MB')
            yield it
    secs,_ = timed(lambda: ask(watched()))
    run.add_metrics(pairs=67_000, seconds=Metric(secs, unit='s'), **peak, peak_memory_67000=Metric(rss(), unit='MB'))

def agree(a, run):
    items = list(read_crows(table_rows(data_files(a.data, '*crows*.csv')))); texts = [o for it in items for o in it.options]
    model,tok = load_model_and_tokenizer(a.model); run.info['parent'] = Path(a.model).name
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp, tok); tok.save(Path(tmp)/'tokenizer.json'); theirs = ask_peer(peer(Path(tmp), 16), texts)
    ours = np.array([logp for _,logp,_ in score_items(model.fuse_(), tok, items)])
    run.add_metrics(pairs=len(items), **agreement(ours, theirs),
                    stereotype=wilson(int((ours[:, 0] > ours[:, 1]).sum()), len(items), 'of pairs'))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['train', 'calibrate', 'speed', 'many', 'agree'], nargs='+')
    ap.add_argument('--seeds', type=int, default=2)
    ap.add_argument('--data', help='folder or file of the pairs')
    ap.add_argument('--model', help='run, folder, hub id or .gguf file'); ap.add_argument('--repeats', type=int, default=3)
    a = ap.parse_args()
    for what in a.what:
        run = what != 'train' and RunDir.create(ROOT/'results'/('33_eval.bias' if what == 'calibrate' else '32_eval.pairs')/what, 'bench',
                                                dict(seeds=a.seeds, repeats=a.repeats, threads=torch.get_num_threads()), seed=0,
                                                exist_ok=True)
        globals()[what](a, run)
        if run: run.finish(); print(json.dumps(run.info['metrics'], indent=1))

if __name__ == '__main__': main()

"""Minimal pairs for models of both kinds: those that write, by log-likelihood, and those that fill gaps, by pseudo-log-likelihood.

    python bench/blimp.py --pairs FOLDER NAME=RUN ... [--limit 300] [--name prose]

FOLDER holds BLiMP's .jsonl files, of which the first pairs are taken (a model that fills gaps reads a sentence once for each of its
tokens). RUN is a run of `slm pretrain` or of `slm bert`. A set's figure has Wilson's interval, the mean over the sets one over pairs
drawn within each set, and so has the difference to the first run. Ties count as wrong; chance is a half. Writes
results/59_exp.bert/NAME/run.json.
"""
import argparse
from pathlib import Path
import numpy as np
from slm.core import Metric, RunDir, progress, read_json
from slm.eval.lm import loglikelihood, read_pairs
from slm.eval.stats import percentile_interval, wilson
from slm.model.bert import load_bert_and_tokenizer, pseudo_log_likelihoods
from slm.model.pretrained import load_model_and_tokenizer

ROOT = Path(__file__).parents[1]

def scorers(path):
    "What a run says of sentences, by each way that it has"
    if read_json(path/'run.json')['stage'] != 'bert':
        m,tok = load_model_and_tokenizer(path); return {'': lambda ts: loglikelihood(m, tok, [('', t) for t in ts])}
    m,tok = load_bert_and_tokenizer(path)
    return {'': lambda ts: pseudo_log_likelihoods(m, tok, ts), '_tokens': lambda ts: pseudo_log_likelihoods(m, tok, ts, word=False)}

def mean(sets, n_boot=1000): # (sets, pairs) of 0 and 1, or differences; pairs are drawn within each set
    rng = np.random.default_rng(0); draws = [np.mean([s[rng.integers(len(s), size=len(s))].mean() for s in sets]) for _ in range(n_boot)]
    return percentile_interval(np.mean([s.mean() for s in sets]), draws, sum(map(len, sets)), 'of pairs')

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('--pairs', type=Path, required=True); add('runs', nargs='+'); add('--limit', type=int); add('--name', default='prose')
    a = ap.parse_args()
    sets = {f.stem: read_pairs(f)[:a.limit] for f in sorted(a.pairs.glob('*.jsonl'))}; runs = dict(r.split('=', 1) for r in a.runs)
    about = {n: {k: read_json(Path(p)/'run.json')[k] for k in ('stage', 'config', 'metrics', 'seed', 'commit')} for n,p in runs.items()}
    run = RunDir.create(ROOT/'results'/'59_exp.bert'/a.name, 'bench', dict(sets=len(sets), limit=a.limit, runs=list(runs)), exist_ok=True)
    run.info['trained'] = about; got = {}
    for name,path in runs.items():
        for way,score in scorers(Path(path)).items():
            got[name+way] = {}
            for s,rows in progress(sets.items(), name+way):
                good,bad = np.array(score([r[k] for r in rows for k in ('sentence_good', 'sentence_bad')])).reshape(-1, 2).T
                got[name+way][s] = good > bad; print(name+way, s, (good > bad).mean(), flush=True)
            run.add_metrics(**{name+way: mean(list(got[name+way].values()))})
            run.add_metrics(**{f'{name+way}:{s}': wilson(int(r.sum()), len(r), 'of pairs') for s,r in got[name+way].items()})
    first = next(iter(got))
    run.add_metrics(**{f'{k}-{first}': mean([g[s]*1.-got[first][s] for s in sets]) for k,g in got.items() if k != first}); run.finish()
    for k,v in run.info['metrics'].items():
        if ':' not in k: print(f'{k:24} {Metric(**v)}')

if __name__ == '__main__': main()

"""The directions of gender and royalty in vectors of many kinds: words, words spelled in tokens, and models at several depths.

    python bench/probes.py FILE... [NAME=RUN ...] [--words 5000] [--places 8] [--name probes]

Words and tokens are trained here as in bench/word2vec.py; a RUN is one of `slm pretrain` or `slm bert`, or what comes of it (dpo). For
each: the first component of the differences of pairs beside that of shuffled partners; held-out words on the right side of a hyperplane;
held-out words whose partner is nearest, or among ten, behind the mean step. Writes results/59_exp.bert/NAME/run.json.
"""
import argparse
from pathlib import Path
import numpy as np
from slm.core import Metric, RunDir, read_json
from slm.data.corpus import whole_text
from slm.data.tokenizer import train_bpe
from slm.eval.stats import wilson
from slm.exp.bert import context_vectors, word_places
from slm.exp.tok2vec import Pieces
from slm.exp.word2vec import GENDER_PAIRS, ROYAL_PAIRS, component, component_null, held_out_sides, map_ranks, pair_vectors
from slm.model.bert import load_bert_and_tokenizer
from slm.model.pretrained import load_model_and_tokenizer
from slm.model.vectors import WordVectors, split_words, train_vectors

ROOT = Path(__file__).parents[1]

def look(v):
    "What the vectors have of the two directions"
    res = {}
    for name,pairs in dict(gender=GENDER_PAIRS, royal=ROYAL_PAIRS).items():
        x = pair_vectors(v, pairs); share,_ = component(x); null = component_null(v, x, 'shuffled', 200); sides = held_out_sides(x)
        res[f'{name}|component'] = Metric(share, n=len(x))
        res[f'{name}|shuffled'] = Metric(float(null.mean()), *map(float, np.percentile(null, [2.5, 97.5])), n=200)
        res[f'{name}|sides'] = wilson(int(sides.sum()), sides.size, 'of words')
        for how in ('nothing', 'step'):
            r = np.array(list(map_ranks(v, pairs, how).values()))
            for k in (1, 10): res[f'{name}|{how}|{k}'] = wilson(int((r <= k).sum()), len(r), 'of words')
    return res

def centred(v): # a mean that all vectors share would hide everything else
    return WordVectors(v.words, v.vectors-v.vectors.mean(0), v.counts)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('given', nargs='+'); add('--words', type=int, default=5000); add('--places', type=int, default=8); add('--name', default='probes')
    a = ap.parse_args()
    runs,files = dict(g.split('=', 1) for g in a.given if '=' in g),[g for g in a.given if '=' not in g]
    raw = [p for f in files for p in whole_text(f).split('\n\n')]; text = [p for f in files for p in split_words(whole_text(f))]
    for t in (raw, text): np.random.default_rng(0).shuffle(t)
    base = train_vectors(text, seed=0); words = base.words[:a.words]
    words += [w for w in base.words[a.words:] if any(w in p for p in GENDER_PAIRS+ROYAL_PAIRS)]; base = base.first(None)
    pick = lambda v: WordVectors(words, np.array([v[w] for w in words])); tok = train_bpe((' '.join(p) for p in text), 4096)
    some = {'word2vec': pick(base), 'tok2vec': pick(train_vectors(text, pieces=Pieces('tokens', base.words, tok), seed=0))}
    for name,path in runs.items():
        load = load_bert_and_tokenizer if read_json(Path(path)/'run.json')['stage'] == 'bert' else load_model_and_tokenizer
        model,tok = load(path); n = model.cfg.n_layer; places = word_places(tok, raw, words, a.places)
        for k,v in context_vectors(model, tok, places, words, [0, n//2, n]).items(): some[f'{name}-{k}'] = v
    config = dict(files=[Path(f).name for f in files], words=len(words), places=a.places, runs=list(runs))
    run = RunDir.create(ROOT/'results'/'59_exp.bert'/a.name, 'bench', config, exist_ok=True)
    for k,v in some.items():
        res = look(centred(v)); run.add_metrics(**{f'{k}|{m}': x for m,x in res.items()})
        print(k, len(v), {m: f'{x.value:.3f}' for m,x in res.items()}, flush=True)
    run.finish()

if __name__ == '__main__': main()

"""word2vec beside gensim: the same paragraphs, settings and threads, several seeds, everything in one run.

    python bench/word2vec.py FILE... [--seeds 3] [--threads 2] [--name prose]

Raw words a second over all that a user waits for (counting the vocabulary, training), in turns so that a busy machine hits all;
what the vectors know (Mikolov's questions, WordSim-353 and SimLex-999, which gensim ships); and the loss of held-out pairs, by one
function for both. Paragraphs are shuffled once, for all but gensim-in-order. 100 numbers, windows of 5, 5 negatives, 5 epochs, sample
1e-3. Writes results/57_exp.word2vec/NAME/run.json.
"""
import argparse, time
from pathlib import Path
import gensim, numpy as np
from common import median
from gensim.models import Word2Vec
from slm.core import Metric, RunDir
from slm.data.corpus import whole_text
from slm.exp.word2vec import read_judged, similarity_correlation
from slm.model.vectors import WordVectors, pair_loss, read_analogies, split_words, train_vectors

ROOT = Path(__file__).parents[1]
DATA = Path(gensim.__file__).parent/'test'/'test_data'
KINDS = {'pairs': dict(kind='pairs'), 'shared': dict(kind='shared'), 'cbow': dict(kind='cbow'), 'cbow-as-c': dict(kind='cbow', mean=False),
         'gensim-skip-gram': dict(sg=1, alpha=.025), 'gensim-cbow': dict(sg=0, alpha=.05),
         'gensim-in-order': dict(sg=1, alpha=.025)}

def train(kind, text, seed, threads):
    o = KINDS[kind]
    if 'sg' not in o: return train_vectors(text, threads=threads, seed=seed, **o)
    m = Word2Vec(text, vector_size=100, window=5, negative=5, epochs=5, sample=1e-3, min_count=5, workers=threads, seed=seed+1, **o)
    return WordVectors(m.wv.index_to_key, m.wv.vectors, np.array([m.wv.get_vecattr(w, 'count') for w in m.wv.index_to_key]), m.syn1neg)

def in_order(v, words): # the same negatives are drawn for all
    at = [v.at[w] for w in words]; return WordVectors(words, v.vectors[at], v.counts[at], v.context[at])

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add = ap.add_argument
    add('files', nargs='+'); add('--seeds', type=int, default=3); add('--threads', type=int, default=2); add('--name', default='prose')
    a = ap.parse_args()
    text = [p for f in a.files for p in split_words(whole_text(f))]; 
    held,in_file = text[::50],[p for i,p in enumerate(text) if i % 50]; text = [*in_file]
    for t in (held, text): np.random.default_rng(0).shuffle(t)
    words = sum(map(len, text)); questions = [q for qs in read_analogies(DATA/'questions-words.txt').values() for q in qs]
    config = dict(files=[Path(f).name for f in a.files], words=words, seeds=a.seeds, threads=a.threads, gensim=gensim.__version__)
    run = RunDir.create(ROOT/'results'/'57_exp.word2vec'/a.name, 'bench', config, exist_ok=True)
    judged = {n: read_judged(DATA/f) for n,f in dict(wordsim='wordsim353.tsv', simlex='simlex999.txt').items()}
    for k in KINDS: train(k, text[:500], 0, 1)                                     # compile
    got = {k: {m: [] for m in ('words_per_s', 'right', 'loss', *judged)} for k in KINDS}; order = None
    for seed in range(a.seeds):
        for k in KINDS:
            t0 = time.perf_counter(); v = train(k, in_file if k == 'gensim-in-order' else text, seed, a.threads)
            secs = time.perf_counter()-t0
            order = order or v.words; v = in_order(v, order); right = v.solve(questions); g = got[k]
            g['words_per_s'].append(5*words/secs); g['right'].append(int(right.sum())); g['loss'].append(pair_loss(v, held).value)
            for n,rows in judged.items(): g[n].append(similarity_correlation(v, rows).value)
            print(f'seed {seed} {k:17}', ', '.join(f'{m} {x[-1]:,.3f}' for m,x in g.items()), flush=True)
    units = dict(words_per_s='words/s', right=f'of {len(right)}', loss='nats/pair', wordsim='ρ', simlex='ρ')
    run.add_metrics(**{f'{k}_{m}': median(np.array(x, float), units[m]) for k,g in got.items() for m,x in g.items()})
    for ours,theirs in dict(pairs='gensim-skip-gram', shared='gensim-skip-gram', cbow='gensim-cbow').items():
        r = np.array(got[ours]['words_per_s'])/got[theirs]['words_per_s']
        run.add_metrics(**{f'{ours}_ratio': median(r, f'times {theirs}')})
    run.finish()
    for k,v in run.info['metrics'].items(): print(f'{k:30} {Metric(**v)}')

if __name__ == '__main__': main()
